"""Runs a sampling job for the scripts: chooses the folder, prints what computes, and draws."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fastdiff.errors import blaming
from fastdiff.runtime.processes import Processes, make_writable
from fastdiff.sampling.build import Cascade
from fastdiff.sampling.job.job import run_job
from fastdiff.sampling.job.manifest import NAME, Job
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

    identity holds what the images depend on besides the sampler. note ends the closing line.
    """
    identity = {**sampler.identity(), **(identity or {})}
    first, last = (sampler.base, sampler.upsampler) if isinstance(sampler, Cascade) else (sampler, sampler)
    folder = _folder(settings, first, identity)
    if not (folder / NAME).is_file():
        with blaming("--out_dir"):
            make_writable(folder)
    if processes.is_main:
        print("\n".join([*notes, *sampler.notes]), flush=True)
    labels, shape = first.labels, last.network.settings
    job = Job(
        identity=identity,
        count=count,
        shape=(*shape.size_hw, shape.in_channels),
        labelled=first.network.settings.class_cond,
        seed=settings.seed,
        chunk_size=max(1, min(first.batch_size, -(-count // processes.world_size))),
        save_as=settings.save_as,
        grid_images=settings.grid_images,
        grid_classes=len(set(labels.chosen)) if labels is not None and labels.in_turn else 0,
        class_names=first.network.class_names,
        trajectory=min(settings.trajectory, count),
        note=note,
    )
    return run_job(sampler.draw, job, processes, folder, overwrite=settings.overwrite, trace=sampler.trace)


def _folder(settings: DrawSettings, sampler: Sampler, identity: dict[str, Any]) -> Path:
    """The folder of --out_dir or OPENAI_LOGDIR (improved-diffusion's variable), else one named after the job."""
    named = settings.out_dir or os.environ.get("OPENAI_LOGDIR", "")
    if named:
        return Path(named)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs/samples") / f"{sampler.network.file.stem}-{digest}"
