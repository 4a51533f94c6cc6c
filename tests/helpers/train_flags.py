"""Flags of train.py for a tiny network."""

from __future__ import annotations

from pathlib import Path

from helpers import tiny

PROCESS = {"diffusion_steps": 100, "noise_schedule": "cosine", "learn_sigma": True}


def flags(data: Path, run: Path, *more: str) -> list[str]:
    """Return the flags that train on the pictures in `data` into the folder `run`, followed by `more`."""
    given = {"data_dir": data, "run_dir": run, "batch_size": 4, "lr": 1e-3, "log_interval": 2}
    return [*tiny.flags({**tiny.MODEL, **PROCESS, **given}), *more]
