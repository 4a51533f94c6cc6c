"""The plan of a step: how the batch is split, what needs DeepSpeed's engine, and whether the network is compiled."""

from __future__ import annotations

import pytest
import torch
from helpers.small_trainer import small_trainer

from fastdiff.errors import UserError
from fastdiff.runtime import machine
from fastdiff.runtime.processes import Processes
from fastdiff.training.microbatch import BUCKET, LARGEST_BUCKET
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import WORTHWHILE_STEPS, decide_compile, needs_engine, plan_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("batch", "microbatch", "world_size", "expected"),
    [
        (128, -1, 1, (128, 1)),
        (128, -1, 8, (16, 1)),
        (128, 5, 8, (4, 4)),
        (128, 1000, 8, (16, 1)),
        (7, 3, 1, (1, 7)),
        (12, 5, 1, (4, 3)),
    ],
)
def test_split_batch(batch: int, microbatch: int, world_size: int, expected: tuple[int, int]) -> None:
    """The micro-batch is the largest one within the limit that divides a process's share of the batch evenly."""
    plan = plan_step(TrainSettings(batch_size=batch, microbatch=microbatch), {}, Processes(0, 0, world_size, CPU))
    assert (plan.micro, plan.accumulation) == expected


def test_what_needs_the_engine() -> None:
    plain = TrainSettings()
    assert needs_engine(plain, {}, 1) == ""
    given = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "gradient_clipping": 1,
    }
    assert needs_engine(plain, given, 1) == ""
    assert needs_engine(plain, {}, 2) == "2 processes"
    assert needs_engine(TrainSettings(zero_stage=2), {}, 1) == "zero_stage 2"
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert needs_engine(plain, offload, 1) == "deepspeed.zero_optimization.offload_optimizer"
    assert needs_engine(plain, {"fp16": {"enabled": True, "loss_scale": 8}}, 1) == "deepspeed.fp16.loss_scale"
    with pytest.raises(UserError, match="--cuda_graph True can't be combined with deepspeed.flops_profiler; leave one"):
        small_trainer(cuda_graph=True, deepspeed={"flops_profiler": {"enabled": False}})


def test_what_overlaps() -> None:
    """Gradients are reduced during the backward pass at stages 1 and 2 of several processes, from two buckets."""
    for world_size, stage, overlaps in ((1, 2, False), (2, 0, False), (2, 1, True), (2, 2, True), (2, 3, False)):
        plan = plan_step(TrainSettings(batch_size=2, zero_stage=stage), {}, Processes(0, 0, world_size, CPU))
        zero = plan.deepspeed_json(parameters=30_001)["zero_optimization"]
        assert zero.get("overlap_comm", False) == plan.overlaps == overlaps
        assert zero.get("reduce_bucket_size") == (None if stage == 0 else 10_001 if overlaps else BUCKET)
        in_regions = [plan.resolved(1, compiles, cuda_graph=False).in_regions for compiles in (False, True)]
        assert in_regions == [False, overlaps]
    plan = plan_step(TrainSettings(batch_size=2, zero_stage=1), {}, Processes(0, 0, 2, CPU))
    assert plan.deepspeed_json(10**9)["zero_optimization"]["reduce_bucket_size"] == LARGEST_BUCKET
    given = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 7}}
    plan = plan_step(TrainSettings(batch_size=2, zero_stage=1), given, Processes(0, 0, 2, CPU))
    assert plan.deepspeed_json(30_001)["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": 7,
    }


def test_decide_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a setting, long runs are compiled where that is possible, and a resumed run keeps to its decision."""
    auto = TrainSettings()
    assert decide_compile(auto, GPU, 1)[0]
    assert not decide_compile(TrainSettings(zero_stage=3), GPU, 10**6)[0]
    assert not decide_compile(TrainSettings(compile=False), GPU, 10**6)[0]
    assert decide_compile(TrainSettings(compile=True), CPU, 1)[0]
    assert not decide_compile(auto, CPU, WORTHWHILE_STEPS - 1)[0]
    assert decide_compile(auto, CPU, 10**6, before=False) == (False, "as the run began")
    for compiler in (None, "/usr/bin/g++"):
        monkeypatch.setattr(machine.shutil, "which", lambda name, compiler=compiler: compiler)
        compiles, why = decide_compile(auto, CPU, 10**6)
        assert compiles == decide_compile(auto, CPU, 10, before=True)[0] == bool(compiler)
        assert ("C++ compiler" in why) == (not compiler)
