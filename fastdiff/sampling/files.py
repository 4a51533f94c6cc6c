"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastdiff.sampling.claims import files_in, me, parse

PARTIAL = ".partial"


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


def sweep(folder: Path, finished: str | None = None) -> None:
    """Remove unfinished files of processes that have ended, and all of those whose name begins with `finished`."""
    for name in files_in(folder):
        if not name.startswith(".") or not name.endswith(PARTIAL):
            continue
        words = name[1 : -len(PARTIAL)].rsplit(".", 3)
        owner = parse(".".join(words[1:]))
        if owner is None:
            continue  # not of this kind
        if owner == me() or owner.is_gone() or (finished is not None and words[0].startswith(finished)):
            (folder / name).unlink(missing_ok=True)
