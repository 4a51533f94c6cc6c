"""Writing checkpoints: piece by piece, or beside training from a copy in memory.

checkpoints/step_NNNNNN/
    modelNNNNNN.pt  ema_RATE_NNNNNN.pt  optNNNNNN.pt   as improved-diffusion's, N counting the steps they are after
    state.pt                                            the rest of what a restart needs
    manifest.json                                       sizes and checksums
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models import weights
from fastdiff.runtime.machine import free_memory
from fastdiff.training.checkpoints import folder as checkpoint_files

MEMORY_SHARE = 0.5
"""Of the free memory, what a copy of the training state may take."""


class Sink(Protocol):
    """What takes the pieces of a checkpoint."""

    def weights(self, rate: str | None, state: dict[str, Tensor]) -> None:
        """The model (rate None) or an average of it, on the CPU."""

    def optimizer(
        self, exp_avg: dict[str, Tensor], exp_avg_sq: dict[str, Tensor], updates: int, group: dict[str, Any]
    ) -> None:
        """AdamW's moments by parameter name, and the settings of its group."""


Fill = Callable[[Sink], dict[str, Any]]
"""Gives a sink its pieces one after another, and returns the rest of the state."""


class Writer:
    """Writes one checkpoint folder, piece by piece so that only one piece is in memory, whole or not at all."""

    def __init__(self, folder: Path, step: int, info: dict[str, Any]) -> None:
        self.folder, self.step, self.info = folder, step, info
        self.partial = checkpoint_files.begin(folder, step)

    def weights(self, rate: str | None, state: dict[str, Tensor]) -> None:
        name = f"model{self.step:06d}.pt" if rate is None else f"ema_{rate}_{self.step:06d}.pt"
        _save(weights.with_info(state, self.info), self.partial / name)

    def optimizer(
        self, exp_avg: dict[str, Tensor], exp_avg_sq: dict[str, Tensor], updates: int, group: dict[str, Any]
    ) -> None:
        """As torch.optim.AdamW.state_dict() has it, parameters numbered in the model's order."""
        state = {
            i: {"step": torch.tensor(float(updates)), "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
            for i, name in enumerate(exp_avg)
        }
        groups = [{**group, "params": list(range(len(state)))}]
        _save({"state": state, "param_groups": groups}, self.partial / f"opt{self.step:06d}.pt")

    def finish(self, state: dict[str, Any]) -> Path:
        """The rest, then the folder's real name."""
        _save(state, self.partial / "state.pt")
        return checkpoint_files.commit(self.partial, self.folder, self.step)


def _save(content: Any, file: Path) -> None:
    """torch.save, whose RuntimeErrors are about the disk and don't say so."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        full = shutil.disk_usage(file.parent).free < 1 << 20
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


class _Kept:
    """Pieces in memory, to be written later."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, tuple[Any, ...]]] = []

    def weights(self, *piece: Any) -> None:
        self._pieces.append(("weights", piece))

    def optimizer(self, *piece: Any) -> None:
        self._pieces.append(("optimizer", piece))

    def fill(self, state: dict[str, Any]) -> Fill:
        """What `write` needs. Each piece is let go of when it is written."""

        def give(sink: Sink) -> dict[str, Any]:
            while self._pieces:
                method, piece = self._pieces.pop(0)
                getattr(sink, method)(*piece)
            return state

        return give


def write(folder: Path, step: int, info: dict[str, Any], fill: Fill, size: int = 0) -> Path:
    """A checkpoint folder with the pieces that `fill` gives, size bytes as far as known.

    UserError, in one sentence, when the disk won't take it; then nothing of it is left, and older ones are whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(
                f"--run_dir: the checkpoint of step {step} needs {_size(size)}, {folder} has "
                f"{_size(free)} left; {_advice(folder)}"
            )
        writer = Writer(folder, step, info)
        return writer.finish(fill(writer))
    except OSError as error:
        shutil.rmtree(folder / f".step_{step:06d}.partial", ignore_errors=True)
        reason = error.strerror or str(error)
        raise UserError(
            f"--run_dir: the checkpoint of step {step} can't be written to {folder} ({reason}); {_advice(folder)}"
        ) from error


def _advice(folder: Path) -> str:
    older = checkpoint_files.listed(folder) if folder.is_dir() else []
    left = f"{older[-1].name} is whole, and the same command goes on from there" if older else "nothing is saved yet"
    return f"make room, or keep fewer with --keep_last ({left})"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class Saver:
    """Writes the checkpoints of a run and removes old ones, in a thread where memory allows a copy of the state.

    background  True, False, or "auto": whether the copy fits (MEMORY_SHARE).
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool | str = False,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.keep_last, self.keep_every, self.background = folder, keep_last, keep_every, background
        self._told = told
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: futures.Future[tuple[int, list[int]]] | None = None

    def save(self, step: int, info: dict[str, Any], fill: Fill, size: int, sound: int | None = None) -> None:
        """Take the state of now, and write it: when this returns, or some time later (`wait`).

        sound is the last step up to which no numbers were bad (see `checkpoint_files.prune`); None: this one. Raises
        UserError for this or an earlier checkpoint that the disk didn't take.
        """
        self.wait()
        beside = self.background
        if beside == "auto":
            beside = size < MEMORY_SHARE * free_memory(torch.device("cpu"))
        if beside:
            kept = _Kept()
            state = fill(kept)
            self._running = self._thread.submit(self._write, step, info, kept.fill(state), size, sound)
        else:
            self._report(self._write(step, info, fill, size, sound))

    def _write(
        self, step: int, info: dict[str, Any], fill: Fill, size: int, sound: int | None
    ) -> tuple[int, list[int]]:
        removed: list[int] = []
        if self.folder.is_dir() and shutil.disk_usage(self.folder).free < size:
            removed = self._prune(sound)  # more lie there than may since keep_last is another
        write(self.folder, step, info, fill, size)
        return step, [*removed, *self._prune(sound)]

    def _prune(self, sound: int | None) -> list[int]:
        return checkpoint_files.prune(self.folder, self.keep_last, self.keep_every, sound)

    def _report(self, done: tuple[int, list[int]]) -> None:
        step, removed = done
        self._told(f"saved {checkpoint_files.folder_of(self.folder, step)}")
        if removed:
            self._told(f"removed the checkpoints of steps {', '.join(map(str, removed))}")

    def check(self) -> None:
        """Report a write that has ended; UserError if it failed."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Until everything is on disk, or so long: whether it is. UserError if that failed."""
        if self._running is None or not futures.wait([self._running], seconds).done:
            return self._running is None
        running, self._running = self._running, None
        self._report(running.result())
        return True

    def close(self) -> None:
        """End the thread, once it has written."""
        self._thread.shutdown(wait=True)
