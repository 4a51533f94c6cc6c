"""Checks that N steps and a run resumed after k of N steps are bit-identical. test_resume.py runs this program.

python resume_checks.py DATA_FOLDER WORK_FOLDER STAGE:PRECISION:LOADER:K,K.. [...] [back:STAGE:PRECISION ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings
from fastdiff.models import UNetSettings, build_model
from fastdiff.training.checkpoints.format import Snapshot, read_snapshot
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step
from fastdiff.training.trainer import Trainer
from helpers.small_trainer import state_of

MODEL = UNetSettings(
    image_size=8,
    num_channels=32,
    channel_mult="1,2",
    num_res_blocks=1,
    attention_resolutions="4",
    learn_sigma=True,
    dropout=0.1,
    class_cond=True,
    num_classes=5,
)
DIFFUSION = DiffusionSettings(diffusion_steps=2, noise_schedule="cosine")


def make_trainer(data: Path, snapshot: Snapshot | None = None, loader: str = "pillow", **settings: Any) -> Trainer:
    """Make a trainer with every kind of state: averages, dropout, micro-batches, a loss-aware timestep sampler."""
    processes = start_processes()
    given = {
        "batch_size": 8,
        "microbatch": 2,
        "lr": 1e-3,
        "lr_warmup_steps": 2,
        "lr_anneal_steps": 20,
        "weight_decay": 0.01,
        "ema_rate": "0.9,0.99",
        "schedule_sampler": "loss-second-moment",
        "grad_clip": 1.0,
        "seed": 3,
    }
    train = TrainSettings(**{**given, **settings})
    images = open_images(
        DataSettings(data_dir=str(data), loader=loader, random_flip=True),
        size_hw=MODEL.size_hw,
        channels=3,
        batch_size=train.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=train.seed,
    )
    torch.manual_seed(train.seed)
    diffusion = create_diffusion(DIFFUSION, MODEL.learn_sigma)
    # By default ZeRO-3 would not partition parameters as small as those of these networks.
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 3000}} if train.zero_stage == 3 else {}
    plan = plan_step(train, deepspeed, processes)
    return Trainer(plan, build_model(MODEL), diffusion, images, processes, snapshot)


def steps(trainer: Trainer, count: int) -> list[float]:
    """Take `count` steps and return their losses."""
    losses = []
    for _ in range(count):
        trainer.take_step()
        losses.append(trainer.read_metrics()["loss"])
    return losses


def state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """All tensors that training changes, by name, on rank 0; None on other ranks. Collective."""
    whole = state_of(trainer)
    return {**whole, "history": trainer.timestep_sampler.history} if trainer.processes.is_main else None


def check_exact_resume(
    data: Path, work: Path, stage: int, precision: str, loader: str, at: list[int]
) -> dict[str, torch.Tensor] | None:
    """Check that five steps equal k steps, a checkpoint and 5 - k steps. Returns the final state on rank 0."""
    settings = {"zero_stage": stage, "precision": precision}
    straight = make_trainer(data, None, loader, **settings)
    folder = work / f"zero{stage}-{precision}-{loader}-{straight.processes.world_size}"
    losses = []
    for step in range(1, 6):
        losses += steps(straight, 1)
        if step in at:
            straight.save(folder, {})
    final = state(straight)
    straight.loader.close()
    for k in at:
        snapshot = read_snapshot(folder / f"step_{k:06d}", ["0.9", "0.99"])
        assert not snapshot.notes, snapshot.notes
        resumed = make_trainer(data, snapshot, loader, **settings)
        assert resumed.step == k
        again = steps(resumed, 5 - k)
        assert again == losses[k:], (stage, precision, loader, k, again, losses[k:])
        resumed_final = state(resumed)
        resumed.loader.close()
        if final is not None and resumed_final is not None:
            for name, value in final.items():
                assert torch.equal(value, resumed_final[name]), (stage, precision, loader, k, name)
            assert all(torch.isfinite(value).all() for value in final.values())
    return final


def check_roll_back(data: Path, work: Path, stage: int, precision: str) -> None:
    """Check that `roll_back` equals a new trainer from the checkpoint with the same new stream seed."""
    settings = {"zero_stage": stage, "precision": precision}
    trainer = make_trainer(data, None, **settings)
    steps(trainer, 2)
    folder = work / f"back{stage}-{precision}-{trainer.processes.world_size}"
    trainer.save(folder, {})
    first = steps(trainer, 3)
    snapshot = read_snapshot(folder / "step_000002", ["0.9", "0.99"])
    trainer.roll_back(snapshot)
    assert (trainer.step, trainer.rollbacks) == (2, 1)
    other = steps(trainer, 3)
    assert other != first
    final = state(trainer)
    trainer.save(folder, {})
    trainer.loader.close()

    snapshot.state |= {"rollbacks": 1, "stream_seed": trainer.stream_seed}
    fresh = make_trainer(data, snapshot, **settings)
    assert steps(fresh, 3) == other
    fresh_final = state(fresh)
    fresh.loader.close()
    if final is not None and fresh_final is not None:
        assert all(torch.equal(value, fresh_final[name]) for name, value in final.items())

    later = make_trainer(data, read_snapshot(folder / "step_000005", ["0.9", "0.99"]), **settings)
    assert (later.stream_seed, later.rollbacks) == (trainer.stream_seed, 1)  # kept by the checkpoint
    later.loader.close()


def parts_of(case: str) -> tuple[int, str, str, list[int]]:
    """Split STAGE:PRECISION:LOADER:K,K.. into its parts."""
    stage, precision, loader, at = case.split(":")
    return int(stage), precision, loader, [int(k) for k in at.split(",")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    data_folder, work_folder = Path(sys.argv[1]), Path(sys.argv[2])
    for case in sys.argv[3:]:
        if case.startswith("back:"):
            _, zero_stage, dtype = case.split(":")
            check_roll_back(data_folder, work_folder, int(zero_stage), dtype)
            continue
        zero_stage, dtype, pixels, after = parts_of(case)
        result = check_exact_resume(data_folder, work_folder, zero_stage, dtype, pixels, after)
        if result is not None:
            torch.save(result, work_folder / f"final-{zero_stage}-{dtype}-{pixels}.pt")
            print(f"exact: {case}", flush=True)
