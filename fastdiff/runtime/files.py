"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastdiff.sampling.job.claims import SILENT, files_in, me, parse

PARTIAL = ".partial"
_FORGOTTEN = 10 * SILENT  # seconds that a process of another host writes nothing; clocks differ


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{me().tag}{PARTIAL}")


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends well and vanishes when it doesn't.

    sync makes sure that it is on disk before it has the name, so that not even a power cut leaves half of it.
    """
    partial = partial_of(path)
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe. Some file systems can't, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove unfinished files of processes that have ended, as far as can be told, and of this one."""
    for name in files_in(folder):
        if not name.startswith(".") or not name.endswith(PARTIAL):
            continue
        owner = parse(".".join(name[1 : -len(PARTIAL)].rsplit(".", 3)[1:]))
        if owner is None:
            continue  # not of this kind
        with suppress(FileNotFoundError):
            if owner == me() or owner.is_gone() or time.time() - (folder / name).stat().st_mtime > _FORGOTTEN:
                (folder / name).unlink()
