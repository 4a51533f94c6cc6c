"""A part of gpu_proof.py, the context in which it runs, and functions that run commands."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.proof_log import Log

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 5.0
"""Seconds before its limit at which a part ends a command of its own, to record that command's results."""


@dataclass(frozen=True)
class Context:
    """The device, folders and mode of a part."""

    part: str
    log: Log
    out: Path
    """Folder of the results, the log and the picture."""
    work: Path
    """Scratch: images, runs, compiled code. It may be on another disk."""
    images: Path | None
    """A folder of pictures, or a tar file of one, to train on; None: made-up ones."""
    tiny: bool
    rehearsal: bool
    """Whether the GPU is a simulated one, which computes nothing, so that numbers aren't judged."""
    until: float
    """time.monotonic() at which the part is stopped."""

    def emit(self, kind: str, **fields: Any) -> None:
        self.log.write(self.part, kind, **fields)

    @property
    def left(self) -> float:
        """Seconds that a command of this part may take."""
        return max(1.0, self.until - time.monotonic() - MARGIN)


@dataclass(frozen=True)
class Part:
    """One thing to prove."""

    name: str
    seconds: float
    """Predicted seconds on an H100 that finds compiled code. It is stopped after four times as long and 20 s more."""
    run: Callable[[Context], None]
    alone: bool = True
    """Whether it needs the GPU for itself, like everything that is timed."""


class LeftOut(Exception):
    """The part needs something that isn't here; the message says what."""


class OutOfTime(Exception):
    """A command of the part was cut off at the part's limit."""


def run_command(context: Context, argv: Sequence[str], **env: str) -> int:
    """Run a command of the checkout until it ends or the part's time is over; returns its exit code, or 124."""
    print("$ " + " ".join(argv), flush=True)
    try:
        return subprocess.run(argv, cwd=ROOT, env={**os.environ, **env}, timeout=context.left).returncode
    except subprocess.TimeoutExpired:
        return 124


def succeed(code: int, what: str) -> None:
    """Raise an exception unless a command's exit code is 0."""
    if code == 124:
        raise OutOfTime(f"{what} was cut off at the part's limit")
    if code:
        raise RuntimeError(f"{what} ended with exit code {code}")
