"""A step with a non-finite loss or gradient is as if it hadn't been. Run by test_guards.py, alone or by torchrun.

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
from torch import Tensor

from fastdiff.training.diagnostics.diagnosis import diagnose
from fastdiff.training.trainer import Trainer
from helpers.small_trainer import small_trainer

SETTINGS: dict[str, Any] = {"lr_warmup_steps": 5, "lr_anneal_steps": 20, "weight_decay": 0.1}
THROUGH_ENGINE = {"wall_clock_breakdown": False}
"""A section that only DeepSpeed can follow, and that changes nothing in the numbers."""


@contextmanager
def spoilt(trainer: Trainer, what: str, micro: int = 1, rank: int = 0) -> Iterator[None]:
    """In here one micro-batch of one rank has a bad loss ("loss": inf, its gradients finite) or bad gradients."""
    losses, seen = trainer.stepper.losses, iter(range(1000))

    def spoil(network: Any, batch: Any) -> Tensor:
        loss = losses(network, batch)
        if next(seen) % trainer.accumulation != micro or trainer.processes.rank != rank:
            return loss
        if what == "loss":
            return loss + math.inf
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    trainer.stepper.losses = spoil
    yield
    trainer.stepper.losses = losses


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a step changes, on rank 0; on others nothing."""
    moments, updates = trainer._moments()
    sets = {"model": trainer.masters.flats, **trainer.ema, **moments}
    gathered = {kind: trainer.masters.gather(tensors) or {} for kind, tensors in sets.items()}
    whole = {f"{kind}/{name}": value for kind, state in gathered.items() for name, value in state.items()}
    return {**whole, "updates": torch.tensor(updates)}


def check_skip(stage: int, precision: str, what: str, deepspeed: dict[str, Any] | None = None, **settings: Any) -> None:
    """Good, bad, good equals good, nothing, good, bit for bit; a bad step alone changes no bit."""
    made = {"zero_stage": stage, "precision": precision, "batch_size": 8, **SETTINGS, **settings}
    trainer = small_trainer(deepspeed=deepspeed, **made)
    case = (type(trainer.stepper).__name__, stage, precision, what, trainer.processes.world_size)
    assert trainer.accumulation > 1
    trainer.take_step()
    before = state(trainer)
    with spoilt(trainer, what, rank=trainer.processes.world_size - 1):
        trainer.take_step()
    assert trainer.step == 2
    assert trainer.stepper.skipped_steps == trainer.stepper.bad_streak() == 1, case
    for name, value in state(trainer).items():
        assert torch.equal(value, before[name]), (*case, name)
    trainer.take_step()
    assert trainer.stepper.state_dict() == {"skipped_steps": 1, "bad_streak": 0}, case

    other = small_trainer(deepspeed=deepspeed, **made)
    other.take_step()
    next(other.loader)
    other.step += 1
    other.stepper.load_state_dict({"skipped_steps": 1, "bad_streak": 1})
    other.take_step()
    after, wanted = state(trainer), state(other)
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
    """Of a step whose gradients were spoilt: the images, timesteps and losses of the step, finite norms by block."""
    trainer = small_trainer(lr_anneal_steps=10, **settings)
    trainer.loader.batch_size = trainer.micro * trainer.accumulation  # a rank's share, as real loaders give
    trainer.take_step()
    trainer.read_metrics()
    with spoilt(trainer, "gradient"):
        trainer.take_step()
    lines, content = diagnose(trainer)
    images = trainer.processes.world_size * len(trainer.last_batch.positions)
    assert (content["images"], content["step"], content["skipped_steps"], content["skipped_in_a_row"]) == (
        images,
        2,
        1,
        1,
    )
    assert content["lr"] == trainer.train.lr * 0.9
    t, _ = trainer.draw_timesteps(trainer.last_batch)
    timesteps = dict(zip(trainer.last_batch.positions.tolist(), t.tolist(), strict=True))
    assert all(timesteps[each["position"]] == each["timestep"] for each in content["worst"])
    losses = [each["loss"] for each in content["worst"]]
    assert losses == sorted(losses, reverse=True)
    if trainer.processes.world_size == 1:  # MadeUp gives all ranks the same images, but not the same dropout
        assert math.isclose(sum(losses) / len(losses), trainer.read_metrics()["loss"], rel_tol=1e-2)
    assert list(content["blocks"]) == [
        *("time_embed", "input_blocks.0", "input_blocks.1", "input_blocks.2", "input_blocks.3", "middle_block"),
        *("output_blocks.0", "output_blocks.1", "output_blocks.2", "output_blocks.3", "out"),
    ]
    for numbers in content["blocks"].values():
        assert all(math.isfinite(number) and number > 0 for number in numbers.values())
    assert not content["bad_weights"] + content["bad_gradients"]
    assert lines[0].startswith("diagnosis after step 2: 1 steps skipped, the last 1 in a row")
    trainer.take_step()  # nothing was changed by looking
    assert trainer.stepper.bad_streak() == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_diagnosis({"zero_stage": 2, "batch_size": 8})
    for case in sys.argv[1:]:
        zero_stage, dtype, kind = case.split(":")
        check_skip(int(zero_stage), dtype, kind, microbatch=2)
        if dist.get_rank() == 0:
            print(f"skipped: {case}", flush=True)
