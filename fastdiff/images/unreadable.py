"""Lists all unreadable images of a data set in files, once a run gives up because of them.

A run reads images in a random order and gives up after a few, and finding the others one start at a time would take
days. `naming_all` therefore tries every image when that happens, and writes

    STEM.txt    path of each unreadable image, one a line, for `xargs -d '\\n' rm < STEM.txt`
    STEM.csv    path of each, the reason, and whether STEM.txt has it

STEM.txt omits images that may be in order: those that the system doesn't open or read (no permission, a server that
doesn't answer), and names with a line break, which would be two lines. Nothing is deleted here.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import UnidentifiedImageError
from tqdm import tqdm

from fastdiff.errors import UserError, one_line
from fastdiff.images.pixels import load_image
from fastdiff.runtime.files import FileLock, write_text

STEM = "unreadable_images"
CHUNK = 64
"""Images per task of a thread."""
ALIVE_SECONDS = 5.0
"""Time between two calls of `alive`."""


class Unreadable(NamedTuple):
    """An image that can't be read."""

    path: Path
    reason: str
    """On one line."""
    is_to_blame: bool
    """Whether the file itself is at fault, not the system that should read it."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files, and how a run decodes them."""

    count: int
    path: Callable[[int], Path]
    """Path of file i. Paths for ImageNet would take 0.5 GB."""
    size_hw: tuple[int, int]
    mode: str
    """Pillow's."""

    def attempt(self, index: int) -> Unreadable | None:
        """Decode an image as the run does; None if that succeeds."""
        path = self.path(index)
        try:
            load_image(path, self.size_hw, self.mode)
        except Exception as error:  # Pillow's decoders raise many types, all about this one file
            return Unreadable(path, what_is_wrong(error), is_to_blame(error, path))
        return None


class GaveUp(UserError):
    """A run gives up because of unreadable images, of which it has found some; `files` are all that may be tried."""

    def __init__(self, message: str, subject: str, files: ImageFiles | None) -> None:
        """subject is the start of the message, such as "--data_dir"."""
        super().__init__(f"{subject}: {message}")
        self.subject, self.files = subject, files


def what_is_wrong(error: Exception) -> str:
    """A short reason, on one line, why an image can't be read."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # str(error) would name the file again
    return one_line(str(error))[:200] or type(error).__name__


def is_to_blame(error: Exception, path: Path) -> bool:
    """Whether an error shows that the file is damaged or is no picture, rather than that it couldn't be read now."""
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own OSErrors have no number
        return error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO) and os.path.lexists(path)
    return not isinstance(error, MemoryError)


@contextmanager
def naming_all(stem: Path | None = None, alive: Callable[[], None] = lambda: None) -> Iterator[None]:
    """If the block ends with `GaveUp`, try every image, write STEM.txt and STEM.csv, and raise a UserError about them.

    Of several processes that give up together one tries the images, and the others wait. Without a stem the files lie
    in a new temporary folder. alive is called every few seconds meanwhile.
    """
    try:
        yield
    except GaveUp as error:
        if error.files is None:
            raise
        stem = stem or Path(tempfile.mkdtemp(prefix="fastdiff-")) / STEM
        try:
            raise UserError(_name_all(error, error.files, stem, alive)) from error
        except OSError as failure:
            raise UserError(f"{error}; the others can't be listed in {stem.parent} ({failure.strerror})") from error


def _name_all(error: GaveUp, files: ImageFiles, stem: Path, alive: Callable[[], None]) -> str:
    stem.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(stem.with_name(f".{stem.name}.lock"), remove=True)
    try:
        waited = not lock.acquire(timeout=0)
        while waited and not lock.acquire(timeout=ALIVE_SECONDS):
            alive()
    except OSError:  # a file system without locks: each process tries the images
        waited = False
    try:
        if waited:
            return f"{error}; another process has listed all of them in {stem}.txt"
        found = try_all(files, alive)
        advice = write_lists(stem, found, files.count)
        if not found:
            return f"{error}; but when tried again, all {files.count} could be read, so check the storage"
        named = "; ".join(f"{one.path} ({one.reason})" for one in found[:3]) + ("; ..." if len(found) > 3 else "")
        number = f"{len(found)} of {files.count}"
        return f"{error.subject}: {number} images can't be read, which is too many to go on: {named}; {advice}"
    finally:
        lock.release()


def try_all(files: ImageFiles, alive: Callable[[], None] = lambda: None) -> list[Unreadable]:
    """Decode every image, in threads and with a progress bar. Returns those that can't be read, in order."""
    from fastdiff.runtime.machine import allowed_cores  # imports PyTorch, which processes that only decode don't need

    def attempt(indices: range) -> list[Unreadable]:
        return [found for index in indices if (found := files.attempt(index))]

    unreadable: list[Unreadable] = []
    chunks = [range(i, min(i + CHUNK, files.count)) for i in range(0, files.count, CHUNK)]
    pool = ThreadPoolExecutor(allowed_cores(), thread_name_prefix="trying")
    interval = 0.1 if sys.stderr.isatty() else 30.0  # in a log file every update is a line
    last = time.monotonic()
    with tqdm(total=files.count, unit="img", desc="trying every image", mininterval=interval) as bar:
        try:
            for chunk, found in zip(chunks, pool.map(attempt, chunks), strict=True):
                unreadable += found
                bar.update(len(chunk))
                if time.monotonic() - last > ALIVE_SECONDS:
                    alive()
                    last = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
    return unreadable


def write_lists(stem: Path, unreadable: Iterable[Unreadable], count: int) -> str:
    """Write STEM.txt and STEM.csv about the unreadable ones of `count` images. Returns what to do with them."""
    absolute = [found._replace(path=found.path.absolute()) for found in unreadable]
    listed = [found for found in absolute if found.is_to_blame and "\n" not in str(found.path)]
    names, reasons = (stem.with_name(stem.name + suffix) for suffix in (".txt", ".csv"))
    write_text(names, "".join(f"{found.path}\n" for found in listed))
    table = io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow(("file", "reason", "in the list"))
    in_list = set(listed)
    rows.writerows((found.path, found.reason, "yes" if found in in_list else "no") for found in absolute)
    write_text(reasons, table.getvalue())
    if not listed:
        return f"{reasons} lists all with the reasons, which lie outside of the files"
    which = "all" if len(listed) == len(absolute) else f"{len(listed)} that are damaged or no pictures"
    text = f"{names} lists {which}, {reasons} the reasons; repair these files"
    if len(listed) < count:
        text += f", or delete them: xargs -d '\\n' rm < {shlex.quote(str(names))}"
    return text
