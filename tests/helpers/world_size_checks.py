"""Resumes a run from its newest checkpoint for some steps, on any number of ranks. test_world_sizes.py runs this.

torchrun --nproc_per_node W world_size_checks.py DATA_FOLDER WORK_FOLDER STEPS ZERO_STAGE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastdiff.training.checkpoints.folder import newest_whole
from fastdiff.training.checkpoints.format import Snapshot, read_snapshot
from fastdiff.training.trainer import Trainer
from helpers import resume_checks

BATCH = 12  # divisible by 1, 2 and 3 ranks


def differing(trainer: Trainer, snapshot: Snapshot) -> list[str]:
    """Return the names of tensors that differ from the checkpoint, on rank 0; empty on other ranks."""
    state = resume_checks.state(trainer)
    stored = {"model": snapshot.model, **snapshot.ema, "exp_avg": snapshot.exp_avg, "exp_avg_sq": snapshot.exp_avg_sq}
    wanted = {f"{kind}/{name}": value for kind, tensors in stored.items() for name, value in tensors.items()}
    wanted |= {"history": snapshot.state["timestep_sampler"]["history"], "updates": torch.tensor(snapshot.step)}
    return [] if state is None else [name for name in wanted if not torch.equal(wanted[name], state[name])]


def main(data: Path, work: Path, count: int, stage: int) -> None:
    newest, notes = newest_whole(work)
    assert not notes
    snapshot = read_snapshot(newest, ["0.9", "0.99"]) if newest else None
    trainer = resume_checks.make_trainer(data, snapshot, batch_size=BATCH, zero_stage=stage)
    processes = trainer.processes
    wrong = differing(trainer, snapshot) if snapshot else []
    seen = []  # (position in the stream, label, pixels)
    losses = []
    for _ in range(count):
        losses += resume_checks.steps(trainer, 1)
        batch = trainer.last_batch
        seen.extend(zip(batch.positions.tolist(), batch.labels.tolist(), batch.images.flatten(1), strict=True))
    torch.save(seen, work / f"seen_{trainer.step}_{processes.rank}.pt")
    trainer.save(work, {})
    if processes.is_main:
        report = {"step": trainer.step, "world_size": processes.world_size, "wrong": wrong, "losses": losses}
        torch.save(report, work / f"report_{trainer.step}.pt")
    trainer.loader.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
