"""Turns a list of pictures into a folder of pictures of one size, in parallel; a restart skips those already made.

Pictures are written atomically, so a file under its final name is complete. `.preparation.json` in the folder records
its source and settings, so that a restart with other ones is refused instead of mixing two sizes.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastdiff.errors import UserError
from fastdiff.runtime.files import atomic_write, remove_partial_files, write_text
from fastdiff.runtime.program import trainer

if TYPE_CHECKING:
    from fastdiff.images.unreadable import Unreadable

RECORD = ".preparation.json"
CHUNK = 16
"""Pictures per task of a worker: enough to hide the overhead, few enough to use all workers for a small folder."""
TOLERATED = 0.01
"""Share of unreadable pictures above which the source is considered damaged."""
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A picture's file stored inside a larger file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Task:
    """One picture to make."""

    name: str
    """File name in the folder; the part before the first underscore is the class."""
    source: Path | Slice | bytes | memoryview | np.ndarray
    """A picture's file, or finished pixels [H, W, 3] uint8, which are written as they are."""
    origin: str
    """The picture's name in messages."""


class Problem(NamedTuple):
    """Why a picture can't be made."""

    text: str
    """The picture's name and the reason."""
    source: Unreadable | None
    """None for a picture that has no file of its own."""


@dataclass(frozen=True)
class Target:
    """The folder to fill."""

    folder: Path
    size: tuple[int, int]
    format: str = "png"

    def claim(self, total: int, made_by: str, **made_of: str | int) -> None:
        """Create the folder for `total` images, or check that this script began it with the same settings."""
        if not total:
            raise UserError("no images found in the source")
        record = {"made_by": made_by, "size": list(self.size), "format": self.format, **made_of}
        path = self.folder / RECORD
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._compare(json.loads(path.read_text()), record)
            elif any(not name.startswith(".") for name in os.listdir(self.folder)):
                raise UserError(f"{self.folder} is not empty and was not begun by {made_by}; choose an empty --out")
            write_text(path, json.dumps(record) + "\n")
            remove_partial_files(self.folder)
        except OSError as error:
            raise UserError(f"can't write to {self.folder}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{path} is damaged; choose another --out or delete {self.folder}") from None

    def _compare(self, old: Any, new: dict[str, Any]) -> None:
        if not isinstance(old, dict):
            raise ValueError("not a record")
        for key in new:
            if old.get(key) != new[key]:
                raise UserError(
                    f"{self.folder} was begun with another {key.replace('_', ' ')} ({old.get(key)}, now {new[key]}); "
                    "choose another --out"
                )

    def holds(self, name: str) -> bool:
        try:
            return os.stat(self.folder / name).st_size > 0  # a machine that lost power can leave empty files
        except OSError:
            return False


@dataclass
class Summary:
    target: Target
    images: int = 0
    kept: int = 0
    skipped: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str) -> None:
        self.images += 1
        self.classes[class_of(name)] += 1

    def __str__(self) -> str:
        n = len(self.classes)
        text = f"{self.images:,} images of {n:,} class{'es' * (n != 1)} in {self.target.folder}"
        notes = []
        if self.kept:
            notes.append(f"{self.kept:,} were there already")
        if self.skipped:
            notes.append(f"{self.skipped:,} unreadable ones were left out")
        return f"{text} ({', '.join(notes)})" if notes else text

    def with_training(self) -> str:
        """The classes, and the summary with the command that trains on the folder, which scripts print last."""
        from fastdiff.images.labels import class_order, counted

        height, width = self.target.size
        flags = f"--data_dir {shlex.quote(str(self.target.folder))} --image_size "
        flags += str(height) if height == width else f"{height}x{width}"
        if len(self.classes) > 1:
            flags += f" --class_cond True --num_classes {len(self.classes)}"
        classes = counted((name, self.classes[name]) for name in class_order(self.classes))
        return f"labels: from prefixes: {classes}\n{self}; to train on them: {trainer()} {flags}"

    def check(self) -> None:
        """UserError if too many pictures were unreadable, which are then listed in files beside the folder."""
        total = self.images + self.skipped
        if self.skipped <= TOLERATED * total:
            return
        text = (
            f"{self.skipped:,} of {total:,} images are unreadable, more than {TOLERATED:.0%}; "
            f"{self.target.folder} holds the others, but the source looks damaged"
        )
        if self.unreadable:
            from fastdiff.images.unreadable import STEM, write_lists

            folder = self.target.folder.absolute()
            text += f"; {write_lists(folder.with_name(f'{folder.name}.{STEM}'), self.unreadable, total)}"
        raise UserError(text)


def prefix_of(class_name: str) -> str:
    """A class's name as the prefix of file names, where an underscore would end it."""
    return class_name.replace("_", "-").replace("/", "-")


def check_prefixes(class_names: Iterable[str]) -> None:
    for prefix, count in Counter(map(prefix_of, class_names)).items():
        if count > 1:
            raise UserError(f"{count} classes would share the prefix {prefix}, where - stands for _ and /; rename one")


def class_of(name: str) -> str:
    return name.split("_", 1)[0]


def prepare(tasks: Iterable[Task], total: int, target: Target, workers: int) -> Summary:
    """Make every picture that the claimed folder does not hold yet. UserError if one can't be written."""
    summary = Summary(target)
    interval = 0.1 if sys.stderr.isatty() else 30.0  # a log file needs fewer lines than ten per second
    with tqdm(total=total, unit="img", desc=target.folder.name, mininterval=interval) as bar:

        def missing() -> Iterator[Task]:
            for task in tasks:
                if target.holds(task.name):
                    summary.add(task.name)
                    summary.kept += 1
                    bar.update()
                elif isinstance(task.source, memoryview):
                    yield replace(task, source=bytes(task.source))  # read from disk only now that it is needed
                else:
                    yield task

        for task, problem in _make_all(missing(), target, min(workers, -(-total // CHUNK))):
            if problem is None:
                summary.add(task)
            else:
                summary.skipped += 1
                summary.unreadable += [problem.source] if problem.source else []
                bar.write(f"left out, unreadable: {problem.text}", file=sys.stderr)
            bar.update()
    return summary


def _make_all(tasks: Iterator[Task], target: Target, workers: int) -> Iterator[tuple[str, Problem | None]]:
    """Yield (file name, why the picture can't be read or None) for every task, in order."""
    chunks = iter(lambda: list(itertools.islice(tasks, CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield from _make_chunk(chunk, target)
        return
    # Spawned, not forked: tqdm runs a thread, and only a spawned worker sees its parent die.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[Future[list[tuple[str, Problem | None]]]] = deque()
    try:
        for chunk in chunks:
            with _ctrl_c_held_back():  # a worker that is being started can't handle it
                pending.append(pool.submit(_make_chunk, chunk, target))
            if len(pending) > 4 * workers:  # bounds the memory that undecoded pictures take
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for want of memory; give the same command with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Deliver SIGINT only after the block, and never to processes that are started in it.

    The mask, which those processes inherit, is that of the main thread alone: another thread, such as tqdm's, may take
    the signal, which Python then handles in the main thread. Therefore the handler is replaced as well.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when the parent ends, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_chunk(tasks: list[Task], target: Target) -> list[tuple[str, Problem | None]]:
    return [(task.name, _make(task, target)) for task in tasks]


def _make(task: Task, target: Target) -> Problem | None:
    """Write one picture; returns the problem if it can't be read."""
    source = task.source
    assert not isinstance(source, memoryview)  # prepare copies these
    try:
        if isinstance(source, np.ndarray):
            pixels = source
        else:
            from fastdiff.images.pixels import load_image  # imported here: scripts with finished pixels don't need it

            pixels = load_image(source.read() if isinstance(source, Slice) else source, target.size, "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        return _problem(task, error)

    path = target.folder / task.name
    try:
        with atomic_write(path, sync=False) as file:
            Image.fromarray(pixels).save(file, **SAVE_OPTIONS[target.format])
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None
    return None


def _problem(task: Task, error: Exception) -> Problem:
    from fastdiff.images.unreadable import Unreadable, is_to_blame, what_is_wrong

    unknown = isinstance(error, UnidentifiedImageError)
    reason, path = "not a picture, or of an unknown kind" if unknown else what_is_wrong(error), task.source
    own = Unreadable(path, reason, is_to_blame(error, path)) if isinstance(path, Path) else None
    return Problem(f"{task.origin}: {reason}", own)
