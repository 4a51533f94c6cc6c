"""Writing checkpoints file by file: immediately, or in the background from a copy in memory.

checkpoints/step_NNNNNN/
    modelNNNNNN.pt  ema_RATE_NNNNNN.pt  optNNNNNN.pt   as in improved-diffusion; NNNNNN is the number of steps taken
    state.pt                                            everything else that a resumed run needs
    manifest.json                                       sizes and checksums
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError
from fastdiff.runtime.machine import free_memory
from fastdiff.training.checkpoints.folder import list_checkpoints, new_checkpoint, prune_checkpoints, step_folder

MEMORY_SHARE = 0.5
"""Largest share of the free memory that a copy of the training state may take."""

Files = Iterable[tuple[str, Any]]
"""The files of a checkpoint: (name, content for torch.save). A generator makes each only when it is asked for."""


def write_checkpoint(folder: Path, step: int, files: Files, size: int = 0) -> Path:
    """Write a checkpoint into a run's checkpoint folder, with one file's content in memory at a time.

    `size` is its approximate number of bytes. Raises UserError when the disk is full or fails; then nothing of the
    checkpoint is left, and older ones are unchanged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(
                f"--run_dir: the checkpoint of step {step} needs {_size(size)}, {folder} has "
                f"{_size(free)} left; {_advice(folder)}"
            )
        with new_checkpoint(folder, step) as partial:
            for name, content in files:
                save_file(content, partial / name)
                del content  # before the next one is made
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--run_dir: the checkpoint of step {step} can't be written to {folder} ({reason}); {_advice(folder)}"
        ) from error
    return step_folder(folder, step)


def save_file(content: Any, file: Path) -> None:
    """Call torch.save; the RuntimeError that it raises when the disk is full or fails becomes an OSError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        full = shutil.disk_usage(file.parent).free < 1 << 20
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def _advice(folder: Path) -> str:
    older = list_checkpoints(folder) if folder.is_dir() else []
    left = f"{older[-1].name} is whole, and the same command resumes from there" if older else "nothing is saved yet"
    return f"make room, or keep fewer with --keep_last ({left})"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _emptying(files: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Iterate over a list and free each item once the next one is asked for."""
    while files:
        yield files.pop(0)


class Saver:
    """Writes the checkpoints of a run and removes old ones.

    background  True copies the state in memory and writes the copy in a thread, "auto" does so if the copy fits
                (MEMORY_SHARE), False writes before `save` returns.
    log         receives a line about each checkpoint that was written, and about those that were removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool | str = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.keep_last, self.keep_every, self.background = folder, keep_last, keep_every, background
        self._log = log
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: futures.Future[tuple[int, list[int]]] | None = None

    def save(self, step: int, files: Files, size: int, last_good: int | None = None) -> None:
        """Write a checkpoint; in the background it is on disk after `wait`.

        `files` is read to the end before this returns. last_good is passed to `prune_checkpoints`; None means `step`.
        Raises UserError if this checkpoint or the one before could not be written.
        """
        self.wait()
        background = self.background
        if background == "auto":
            background = size < MEMORY_SHARE * free_memory(torch.device("cpu"))
        if background:
            self._running = self._thread.submit(self._write, step, _emptying(list(files)), size, last_good)
        else:
            self._report(self._write(step, files, size, last_good))

    def _write(self, step: int, files: Files, size: int, last_good: int | None) -> tuple[int, list[int]]:
        removed: list[int] = []
        if self.folder.is_dir() and shutil.disk_usage(self.folder).free < size:
            removed = self._prune(last_good)  # a lower keep_last than before makes room here
        write_checkpoint(self.folder, step, files, size)
        return step, [*removed, *self._prune(last_good)]

    def _prune(self, last_good: int | None) -> list[int]:
        return prune_checkpoints(self.folder, self.keep_last, self.keep_every, last_good)

    def _report(self, done: tuple[int, list[int]]) -> None:
        step, removed = done
        self._log(f"saved {step_folder(self.folder, step)}")
        if removed:
            self._log(f"removed the checkpoints of steps {', '.join(map(str, removed))}")

    def check(self) -> None:
        """Report a write in the background that has ended; UserError if it failed."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most `seconds` until everything is on disk; returns whether it is. UserError if writing failed."""
        if self._running is None or not futures.wait([self._running], seconds).done:
            return self._running is None
        running, self._running = self._running, None
        self._report(running.result())
        return True

    def close(self) -> None:
        """End the thread, after it has written."""
        self._thread.shutdown(wait=True)
