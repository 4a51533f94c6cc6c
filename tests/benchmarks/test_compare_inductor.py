"""Inductor's kernels are found on the simulated GPU, and cost what the model of kernel_cost.py says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")

from fastdiff.kernels.launch import Launch

from benchmarks import compare_inductor, inductor_kernels
from benchmarks.compare_inductor import COPY
from benchmarks.inductor_kernels import Traced
from benchmarks.kernel_cost import RAMP, Cost
from benchmarks.op_cases import Case, meta, with_gradients
from fastdiff import ops

PYTHON = ROOT / ".rehearsal/venv/bin/python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment of make rehearse")
def test_one_op(tmp_path: Path) -> None:
    """Both sides are one kernel that reads bytes, noise and two coefficients per image, and writes 8 bf16 channels."""
    script, file = ROOT / "benchmarks/compare_inductor.py", tmp_path / "costs.json"
    command = [PYTHON, ROOT / "benchmarks/rehearsal/run.py", PYTHON, script, "--processes", "1", "--json", file]
    chosen = ["--configs", "cifar10_uncond", "--ops", "q_sample with given noise"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| q_sample with given noise | forward | 1 |" in done.stdout
    written = json.loads(file.read_text())
    assert written["predicted"] is True
    (row,) = written["rows"]
    for side in (row["ours"], row["inductor"]):
        assert (side["launches"], side["others"]) == (1, [])
        assert side["bytes"] == 256 * (32 * 32 * (3 * 1 + 3 * 4 + 8 * 2) + 2 * 4)
    assert row["ratio"] == pytest.approx(row["inductor"]["us"] / row["ours"]["us"], rel=1e-3)
    assert row["inductor"]["us"] > 1e6 * (RAMP + row["inductor"]["bytes"] / COPY)


def test_bytes_of_a_kernel_of_inductors() -> None:
    """A tensor that is read counts once, one that is read and written twice, whatever the loads' number."""
    source = "tl.load(in_ptr0 + x0); tl.load(in_ptr0 + x1); tl.load(in_out_ptr0 + x0); tl.store(in_out_ptr0 + x0, t)"
    kernel = SimpleNamespace(src=source, arg_names=["in_ptr0", "in_out_ptr0", "in_ptr01", "xnumel"])
    launch = Launch(kernel, (1,), (meta(10), meta(100), meta(1000), 100), {"XBLOCK": 128}, 4, 1)
    assert inductor_kernels.work(launch).least_bytes == 4 * (10 + 2 * 100)


def test_our_launches() -> None:
    """The kernels of both directions, and what PyTorch computes beside them, which costs its bytes."""
    tensors = with_gradients(meta(2, 64, 4, 4, dtype=torch.bfloat16), meta(64), meta(64))
    case = Case("group_norm_silu", "2x64x4x4", 2048, tensors, lambda x, w, b: 2 * ops.group_norm_silu(x, w, b))
    found = compare_inductor.our_launches(case)
    names = {way: [one.kernel.__name__ for (one,) in traced.launches] for way, traced in found.items()}
    assert names == {"forward": ["_norm_forward"], "backward": ["_norm_backward", "_parameter_gradients"]}
    assert found["forward"].others == ["mul.Tensor"]
    assert "mul.Tensor" in found["backward"].others
    assert found["forward"].other_bytes == [2 * 2 * 2048]


def test_the_cheapest_configuration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_inductor, "key", lambda one: one)
    cost = lambda us: Cost(1.0, 32, 64, 1e3, 3e6, 3e6, us, "issue")
    costs = {"slow": cost(20.0), "fast": cost(10.0), "broken": "CompilationError: no"}
    launches: list[Any] = [["slow", "fast", "broken"], ["slow"]]
    us = pytest.approx(1e6 * (3 * RAMP + 3e6 / COPY) + 10 + 20, abs=0.01)
    expected = {"us": us, "bytes": 9e6, "launches": 3, "others": ["mul.Tensor"]}
    assert compare_inductor.summed(Traced(launches, ["mul.Tensor"], [3e6]), costs) == expected


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_inductor, "key", lambda one: "broken")
    launch: Any = SimpleNamespace(kernel=test_our_launches)
    found = compare_inductor.summed(Traced([[launch]]), {"broken": "CompilationError: no"})
    assert found["failed"] == "test_our_launches: CompilationError: no"


def test_table() -> None:
    row = {"step": "demo 8", "op": "q_sample", "direction": "forward", "count": 2, "elements": 100}
    side = lambda us, moved: {"us": us, "bytes": moved, "launches": 1, "others": []}
    rows = [
        {**row, "shape": "a", "ours": side(2.0, 400), "inductor": side(3.0, 800), "ratio": 1.5},
        {**row, "shape": "b", "ours": side(2.0, 400), "inductor": side(1.0, 400), "ratio": 0.5},
    ]
    lines = list(compare_inductor.table(rows))
    assert lines[4] == "| q_sample | forward | 2 | 8 | 4 | 4.0 | 8 | 4 | 6.0 |  | 1.00 | 0.50 to 1.50 |"
    assert lines[6] == "- demo 8 q_sample forward b: 0.5 (2.0, 1.0)"
    assert len(lines) == 7
