"""A checkpoint and a half-done sampling job that version 0.1.0 wrote can be continued.

written_before.tar.xz contains a run that was stopped after 3 steps, a job that was killed after 8 of 12 images, their
pictures, and expected.json: the flags, the weights after 6 steps, and the machine that computed them.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TESTS

from fastdiff import ops, sample, train
from fastdiff.runtime.machine import device_name


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Unpack the archive, make it the working folder, and return the content of expected.json."""
    with tarfile.open(TESTS / "written_before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "written_before")
    monkeypatch.setattr(ops, "_channels_last", False)  # restored afterwards
    return json.loads(Path("expected.json").read_text())


def same_machine(expected: dict[str, Any]) -> bool:
    """Return whether sums have the same last bits here: the same PyTorch on a CPU with the same instructions.

    The recording machine had an AMD EPYC; on another maker's CPU libraries choose other code for the same instructions.
    """
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return expected["machine"] == here and device_name(torch.device("cpu")).startswith("AMD")


def test_the_run_goes_on(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*expected["train"], "--max_steps", "6"])
    assert "resuming from run/checkpoints/step_000003 at step 3" in capsys.readouterr().out
    for name, content in expected["files"].items():
        state = torch.load(Path("run/checkpoints/step_000006") / name, weights_only=True)
        if same_machine(expected):
            digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values()))
            assert digest.hexdigest() == content["sha256"]
        assert list(state) == list(content["norms"])
        for key, value in state.items():  # other CPUs sum float32 numbers in another order in six steps
            furthest = 6 * 1e-3 * value.numel() ** 0.5  # of AdamW at this learning rate
            assert value.double().norm().item() == pytest.approx(content["norms"][key], rel=1e-4, abs=3e-3 * furthest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_layout_is_kept(expected: dict[str, Any]) -> None:
    """On a CPU a run of version 0.1.0 stays channels-last, also when it is resumed again; a new one has other maps."""
    for run, steps, channels_last in (("run", "4", True), ("run", "5", True), ("new", "1", False)):
        train.main([*expected["train"], "--max_steps", steps, "--run_dir", run])
        state = torch.load(Path(run, f"checkpoints/step_{int(steps):06d}/state.pt"), weights_only=True)
        assert state["channels_last"] == ops.keeps_channels_last() == channels_last


def test_the_job_is_completed(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(expected["sample"])
    assert "8 of 12 images are there already, in job" in capsys.readouterr().out
    with np.load("job/samples_12x8x8x3.npz") as made, np.load("samples.npz") as wanted:
        assert set(made) == {*wanted, "class_names"}  # version 0.1 had no names there
        for name in ("arr_1", "seed", "index"):
            np.testing.assert_array_equal(made[name], wanted[name])
        np.testing.assert_array_equal(made["arr_0"][:8], wanted["arr_0"][:8])
        levels = np.abs(made["arr_0"].astype(int) - wanted["arr_0"].astype(int)).max()
        assert levels <= (0 if same_machine(expected) else 1)
    assert not Path("job/parts").exists()
    assert not Path("job/claims").exists()
