"""On a GPU too, a run resumes and goes back exactly, with fp16's loss scale, and saving does not disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_trainer import losses_of, small_trainer, weights_of

from fastdiff.runtime.machine import prepare_cudnn
from fastdiff.training.checkpoints.folder import newest_whole
from fastdiff.training.checkpoints.format import read_snapshot
from fastdiff.training.checkpoints.saver import Saver
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"precision": "fp16", "cuda_graph": True},
    {"precision": "bf16", "cuda_graph": True, "schedule_sampler": "loss-second-moment"},
    {"precision": "bf16", "zero_stage": 2},
    {"precision": "fp16", "zero_stage": 3},
]
IDS = ["-".join(map(str, way.values())) for way in WAYS]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    prepare_cudnn(deterministic=True)
    yield
    prepare_cudnn()


def same(a: Trainer, b: Trainer) -> list[str]:
    """Return the names of what differs between two trainers."""
    ours, theirs = weights_of(a), weights_of(b)
    wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if a.stepper.scaler_state() != b.stepper.scaler_state():
        wrong.append(f"loss scale {a.stepper.scaler_state()} {b.stepper.scaler_state()}")
    if a.stepper.state_dict() != b.stepper.state_dict():
        wrong.append("skipped steps")
    return wrong


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("at", [1, 4, 7])
def test_exact_resume_gpu(way: dict[str, Any], at: int, tmp_path: Path) -> None:
    """Ten steps equal k steps, a checkpoint and the rest. fp16 skips its first steps, as its scale starts at 2^20."""
    straight = small_trainer(**way)
    first = losses_of(straight, at)
    straight.save(tmp_path, {})
    rest = losses_of(straight, 10 - at)
    resumed = small_trainer(read_snapshot(tmp_path / f"step_{at:06d}", ["0.9", "0.99"]), **way)
    assert repr(losses_of(resumed, 10 - at)) == repr(rest), first  # a skipped step's norm may be NaN
    assert same(resumed, straight) == []


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_going_back_gpu(way: dict[str, Any], tmp_path: Path) -> None:
    trainer = small_trainer(**way)
    losses_of(trainer, 4)
    trainer.save(tmp_path, {})
    losses_of(trainer, 4)
    snapshot = read_snapshot(tmp_path / "step_000004", ["0.9", "0.99"])
    trainer.roll_back(snapshot)
    other = losses_of(trainer, 6)
    snapshot.state |= {"rollbacks": 1, "stream_seed": trainer.stream_seed}
    fresh = small_trainer(snapshot, **way)
    assert repr(losses_of(fresh, 6)) == repr(other)
    assert same(trainer, fresh) == []


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_saving_beside_gpu(way: dict[str, Any], tmp_path: Path) -> None:
    """The file holds the state at the time of saving although training goes on, and training is not disturbed."""
    saving, alone = small_trainer(**way), small_trainer(**way)
    saver = Saver(tmp_path, background=True)
    losses_of(saving, 5)
    saver.save(saving.step, saving.checkpoint_files({}), saving.state_bytes)
    losses_of(saving, 5)
    saver.wait()
    saver.close()
    losses_of(alone, 5)
    alone.save(tmp_path / "alone", {})
    losses_of(alone, 5)
    assert same(saving, alone) == []
    a, b = (newest_whole(folder)[0] for folder in (tmp_path, tmp_path / "alone"))
    assert a is not None
    assert b is not None
    ours, theirs = read_snapshot(a, ["0.9", "0.99"]), read_snapshot(b, ["0.9", "0.99"])
    assert all(torch.equal(ours.model[name], value) for name, value in theirs.model.items())
    assert all(torch.equal(ours.exp_avg[name], value) for name, value in theirs.exp_avg.items())
    assert ours.state["loss_scaler"] == theirs.state["loss_scaler"]
