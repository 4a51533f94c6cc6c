"""What both sampling scripts do with a sampler: a folder, a job, and lines that say what computes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fastdiff.errors import blaming
from fastdiff.runtime.processes import Processes, make_writable
from fastdiff.sampling.build import Cascade
from fastdiff.sampling.job.job import Job, run_job
from fastdiff.sampling.job.manifest import NAME
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import DrawSettings


def run(
    sampler: Sampler | Cascade,
    settings: DrawSettings,
    processes: Processes,
    *,
    notes: list[str],
    count: int,
    identity: dict[str, Any] | None = None,
    note: str = "",
) -> list[Path]:
    """Draw images 0 to count - 1 into the settings' folder; returns the files.

    identity is what else makes the images what they are. note ends the closing line.
    """
    identity = {**sampler.identity(), **(identity or {})}
    last = sampler.upsampler if isinstance(sampler, Cascade) else sampler
    first = sampler.base if isinstance(sampler, Cascade) else sampler
    shape = last.network.settings
    folder = _folder(settings, first, identity)
    if not (folder / NAME).is_file():
        with blaming("--out_dir"):
            make_writable(folder)
    if processes.is_main:
        print("\n".join([*notes, *sampler.notes]), flush=True)
    labels = first.labels
    job = Job(
        identity=identity,
        count=count,
        shape=(*shape.size_hw, shape.in_channels),
        labelled=first.network.settings.class_cond,
        seed=settings.seed,
        part_size=max(1, min(first.batch_size, -(-count // processes.world_size))),
        save_as=settings.save_as,
        grid_images=settings.grid_images,
        grid_classes=len(set(labels.chosen)) if labels is not None and labels.in_turn else 0,
        class_names=first.network.class_names,
        trajectory=min(settings.trajectory, count),
        note=note,
    )
    return run_job(sampler.draw, job, processes, folder, overwrite=settings.overwrite, trace=sampler.trace)


def _folder(settings: DrawSettings, sampler: Sampler, identity: dict[str, Any]) -> Path:
    """Where the settings say, or OPENAI_LOGDIR (improved-diffusion's variable), else a folder of the job's own."""
    named = settings.out_dir or os.environ.get("OPENAI_LOGDIR", "")
    if named:
        return Path(named)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs/samples") / f"{sampler.network.file.stem}-{digest}"
