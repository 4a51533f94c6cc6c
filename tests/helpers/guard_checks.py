"""Checks that a step with a non-finite loss or gradient changes nothing. test_guards.py uses it, alone and by torchrun.

python guard_checks.py STAGE:PRECISION:WHAT [STAGE:PRECISION:WHAT ...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.training.diagnostics.diagnosis import diagnose
from fastdiff.training.metrics import LossResult
from fastdiff.training.trainer import Trainer
from helpers.small_trainer import small_trainer, state_of

SETTINGS: dict[str, Any] = {"lr_warmup_steps": 5, "lr_anneal_steps": 20, "weight_decay": 0.1}


@contextmanager
def spoilt(trainer: Trainer, what: str, micro: int = 1, rank: int = 0) -> Iterator[None]:
    """In the block, one micro-batch of one rank has an infinite loss with finite gradients (what="loss"), or NaN
    gradients (what="gradient").
    """
    losses, seen = trainer.stepper.losses, iter(range(1000))

    def spoil(network: Any, batch: Any) -> LossResult:
        result = losses(network, batch)
        if next(seen) % trainer.plan.accumulation != micro or trainer.processes.rank != rank:
            return result
        if what == "loss":
            return result._replace(loss=result.loss + math.inf)
        result.loss.register_hook(lambda gradient: gradient * math.nan)
        return result

    trainer.stepper.losses = spoil
    yield
    trainer.stepper.losses = losses


def check_skip(stage: int, precision: str, what: str, deepspeed: dict[str, Any] | None = None, **settings: Any) -> None:
    """A non-finite step between two normal ones changes no bit, and has the same effect as no step at all."""
    made = {"zero_stage": stage, "precision": precision, "batch_size": 8, **SETTINGS, **settings}
    trainer = small_trainer(deepspeed=deepspeed, **made)
    case = (type(trainer.stepper).__name__, stage, precision, what, trainer.processes.world_size)
    assert trainer.plan.accumulation > 1
    trainer.take_step()
    before = state_of(trainer)
    with spoilt(trainer, what, rank=trainer.processes.world_size - 1):
        trainer.take_step()
    assert trainer.step == 2
    assert trainer.stepper.skipped_steps == trainer.stepper.bad_streak() == 1, case
    for name, value in state_of(trainer).items():
        assert torch.equal(value, before[name]), (*case, name)
    trainer.take_step()
    assert trainer.stepper.state_dict() == {"skipped_steps": 1, "bad_streak": 0}, case

    other = small_trainer(deepspeed=deepspeed, **made)
    other.take_step()
    next(other.loader)
    other.step += 1
    other.stepper.load_state_dict({"skipped_steps": 1, "bad_streak": 1})
    other.take_step()
    after, wanted = state_of(trainer), state_of(other)
    for name, value in wanted.items():
        assert torch.equal(after[name], value), (*case, name)
    assert int(wanted["updates"]) == 2
    if wanted.keys() != {"updates"}:
        assert not torch.equal(before["model/out.2.weight"], wanted["model/out.2.weight"])
    metrics = trainer.read_metrics()
    assert metrics["skipped_steps"] == 1
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["grad_norm"])


def check_diagnosis(settings: dict[str, Any]) -> None:
    """The diagnosis of a step with NaN gradients lists its images, timesteps and losses, and finite norms by block."""
    trainer = small_trainer(lr_anneal_steps=10, **settings)
    trainer.loader.batch_size = trainer.plan.share  # a rank's share, as real loaders give
    trainer.take_step()
    trainer.read_metrics()
    with spoilt(trainer, "gradient"):
        trainer.take_step()
    lines, content = diagnose(trainer)
    images = trainer.processes.world_size * len(trainer.last_batch.positions)
    wanted = {"images": images, "step": 2, "skipped_steps": 1, "skipped_in_a_row": 1}
    assert {name: content[name] for name in wanted} == wanted
    assert content["lr"] == trainer.train.lr * 0.9
    t, _ = trainer.draw_timesteps(trainer.last_batch)
    timesteps = dict(zip(trainer.last_batch.positions.tolist(), t.tolist(), strict=True))
    assert all(timesteps[each["position"]] == each["timestep"] for each in content["worst"])
    losses = [each["loss"] for each in content["worst"]]
    assert losses == sorted(losses, reverse=True)
    if trainer.processes.world_size == 1:  # ranks see the same images from MadeUp, but different dropout
        assert math.isclose(sum(losses) / len(losses), trainer.read_metrics()["loss"], rel_tol=1e-2)
    assert list(content["blocks"]) == [
        *("time_embed", "input_blocks.0", "input_blocks.1", "input_blocks.2", "input_blocks.3", "middle_block"),
        *("output_blocks.0", "output_blocks.1", "output_blocks.2", "output_blocks.3", "out"),
    ]
    for numbers in content["blocks"].values():
        assert all(math.isfinite(number) and number > 0 for number in numbers.values())
    assert not content["bad_weights"] + content["bad_gradients"]
    assert lines[0].startswith("diagnosis after step 2: 1 steps skipped, the last 1 in a row")
    trainer.take_step()  # the diagnosis has changed nothing
    assert trainer.stepper.bad_streak() == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_diagnosis({"zero_stage": 2, "batch_size": 8})
    for case in sys.argv[1:]:
        zero_stage, dtype, kind = case.split(":")
        check_skip(int(zero_stage), dtype, kind, microbatch=2)
        if dist.get_rank() == 0:
            print(f"skipped: {case}", flush=True)
