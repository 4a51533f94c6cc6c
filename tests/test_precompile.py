"""A run finds every kernel that was compiled ahead, and a failed compilation does not affect it."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import HELPERS, tritons

from fastdiff import ops, precompile

pytestmark = pytest.mark.slow

GPU = torch.device("cuda")


@tritons.TRITONS
def test_a_run_finds_what_was_compiled_ahead(triton: str, tmp_path: Path) -> None:
    """On a simulated GPU, training and drawing compile no further kernel."""
    script = HELPERS / "kernels_on_no_gpu.py"
    done = tritons.run(triton, script, TRITON_CACHE_DIR=str(tmp_path))
    assert not done.returncode, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["compiled"] == []
    assert {"_q_sample", "_norm_backward", "_diffusion_loss", "_adamw_ema", "_sampler_step"} <= set(seen["found"])
    assert seen["ahead"] > len(seen["found"])


def test_equal_launches_are_all_there() -> None:
    """Predictions of a step's time count them."""
    x = torch.empty(2, 64, 8, 8, device="meta").to(memory_format=torch.channels_last)
    C = torch.empty(64, device="meta")
    launches = precompile.launches_of(lambda: [ops.group_norm_silu(x, C, C) for _ in range(3)])
    assert [each.kernel.__name__ for each in launches] == ["_norm_forward"] * 3


@pytest.fixture
def _named_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate what `start` asks of a GPU."""
    monkeypatch.setattr(ops, "uses_kernels", lambda x: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _launches(count: int) -> list[Any]:
    return [f"{{launch {i}}}" for i in range(count)]


@pytest.mark.usefixtures("_named_gpu")
def test_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Equal launches count once and cached ones not at all, and there are no more processes than free cores."""
    from fastdiff.kernels import aot

    shares: list[list[str]] = []
    monkeypatch.setattr(aot, "to_json", str)
    monkeypatch.setattr(precompile, "free_cores", lambda: 3)
    monkeypatch.setattr(precompile, "spawn", lambda arch, lines: shares.append(lines))
    assert precompile.start(lambda: _launches(20) * 2, GPU) == [
        "Triton kernels: compiling 20 of 20 beforehand, processes: 3"
    ]
    assert sorted(line for share in shares for line in share) == sorted(_launches(20))
    (tmp_path / "fastdiff").write_text("".join(f"{aot._digest(line, 90)}\n" for line in _launches(18)))
    assert precompile.start(lambda: _launches(20), GPU) == [
        "Triton kernels: compiling 2 of 20 beforehand, processes: 1"
    ]
    assert precompile.start(lambda: _launches(18), GPU) == ["Triton kernels: all 18 in the cache"]


@pytest.mark.usefixtures("_named_gpu")
def test_failures_are_only_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[Any]:
        raise RuntimeError("no such shape")

    assert precompile.start(fails, GPU) == ["Triton kernels: not compiled beforehand (RuntimeError: no such shape)"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # only the first rank of a machine compiles
    assert precompile.start(fails, GPU) == []


def test_nothing_without_a_gpu() -> None:
    assert precompile.start(lambda: pytest.fail("nothing is to be compiled"), torch.device("cpu")) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks into the current folder")
def test_modules_of_the_current_folder_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("open('was_run', 'w')\nraise SystemExit(5)\n")
    monkeypatch.chdir(tmp_path)
    assert precompile.spawn(90, ["{}"]).wait() == 0
    assert not (tmp_path / "was_run").exists()


def test_a_process_that_fails_or_dies() -> None:
    """Invalid lines are skipped, and the run does not wait for the process to read its input or to stay alive."""
    assert precompile.spawn(90, ["{}", "nonsense"]).wait() == 0
    worker = precompile.spawn(90, ["{}"] * 100_000)
    assert worker.poll() is None
    worker.kill()
    assert worker.wait() == -9


def test_a_process_ends_with_its_run() -> None:
    """The process is killed at the end of the run, and ends by itself if the run died without one."""
    script = (
        "import os, sys; from fastdiff import precompile\n"
        "print(precompile.spawn(90, ['{}'] * 10**6).pid, flush=True)\n"
        "os._exit(0) if sys.argv[1] == 'at once' else sys.exit(0)"
    )
    for how in ("at once", "in order"):
        pid = int(tritons.run("", "-c", script, how).stdout)
        end = time.monotonic() + 60
        while _lives(pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not _lives(pid), how


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
