"""Decides which process of a run builds the packed folder that all of them read.

At that time the processes share only the file system. The process that holds a lock file beside the folder builds it,
and the others wait for the finished folder. Rank 0 builds as soon as it has the lock; another rank only if the lock
stays free, as on a node whose disk rank 0 does not see. The system releases the lock of a process that dies, so another
process continues its build. If locks don't work across nodes, a build of another host is left alone as long as its
state.json changes.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fastdiff import errors
from fastdiff.errors import StopWith, UserError
from fastdiff.images.cache.build import pack, partial_of, read_state
from fastdiff.images.cache.format import RECORD, Packed, is_packed, open_packed
from fastdiff.images.listing import Listing
from fastdiff.runtime.files import FileLock
from fastdiff.runtime.processes import make_writable

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""Time for which the lock must be free before a rank other than 0 builds."""
FOREIGN_SECONDS = 30.0
"""Time without progress after which the build of another host counts as abandoned."""
STALLED_SECONDS = 900.0
"""Time without progress after which the waiting processes give up."""


def default_place(data_dir: str | Path, size_hw: tuple[int, int], channels: int, cache_dir: str = "") -> Path:
    """The packed folder of a folder of images: beside it, or in cache_dir."""
    folder = Path(os.path.abspath(data_dir))
    name = f"{folder.name or 'images'}.packed_{size_hw[0]}x{size_hw[1]}x{channels}"
    return (Path(cache_dir) if cache_dir else folder.parent) / name


def open_or_pack(
    listing: Listing, size_hw: tuple[int, int], channels: int, place: Path, *, workers: int, rank: int = 0
) -> Packed:
    """Open the packed folder `place` of the listing's images; one of the run's processes builds it if it is missing.

    Every process of the run calls this. Raises UserError if the folder can't be built or holds other images, StopWith
    after Ctrl-C.
    """
    if not is_packed(place):
        make_writable(place.parent)
        try:
            together(place, lambda: pack(listing, size_hw, channels, place, workers=workers), rank=rank)
        except KeyboardInterrupt:
            rows = (read_state(partial_of(place)) or {}).get("rows", 0)
            then = f"{rows} of {len(listing.names)} images are packed, and the same command goes on from there"
            reason = f"stopped by Ctrl-C; {then if rows else 'the same command starts again'}"
            raise StopWith(errors.INTERRUPTED, reason) from None
    packed = open_packed(place, size_hw, channels)
    packed.check_same(listing)
    return packed


def together(target: Path, build: Callable[[], None], *, rank: int) -> None:
    """Wait until `target` is a packed folder, built by build() in this process or by another process."""
    lock = FileLock(target.with_name(f".{target.name}.lock"), remove=True)
    partial = partial_of(target)
    state, changed = read_state(partial), time.monotonic()
    free_since: float | None = None
    while not is_packed(target):
        now, found = time.monotonic(), read_state(partial)
        if found != state:
            state, changed = found, now
        if now - changed > STALLED_SECONDS:
            raise UserError(
                f"{target / RECORD} is missing, and the process that makes it has got no further for "
                f"{STALLED_SECONDS / 60:.0f} minutes; stop that one and start again, or use --cache none"
            )
        if _acquire(lock):
            try:
                free_since = free_since or now
                patient = rank == 0 or now - free_since >= GRACE_SECONDS
                if patient and _claim(partial, now - changed):
                    _build(target, build, rank)
            finally:
                lock.release()
        else:
            free_since = None
        if not is_packed(target):
            time.sleep(POLL_SECONDS)


def _acquire(lock: FileLock) -> bool:
    try:
        return lock.acquire(timeout=0)
    except OSError as error:
        raise UserError(
            f"files in {lock.path.parent} can't be locked ({error.strerror}); name a folder on a local disk, or "
            "make the packed folder with datasets/pack.py and give that as --data_dir"
        ) from error


def _claim(partial: Path, unchanged: float) -> bool:
    """Create the folder `partial`. Returns whether this process may build in it: no other host did so recently.

    The caller holds the lock, so an earlier builder on this host has ended. unchanged is the number of seconds for
    which state.json has not changed.
    """
    try:
        partial.mkdir()
    except FileExistsError:
        return (read_state(partial) or {}).get("host") == platform.node() or unchanged > FOREIGN_SECONDS
    return True


def _build(target: Path, build: Callable[[], None], rank: int) -> None:
    """Call build(), and remove its folder if it wrote no rows."""
    try:
        if not is_packed(target):  # another process may have finished it just before
            build()
    except UserError as error:
        if rank:  # scripts report the errors of rank 0 only
            logger.error("rank %d: %s", rank, error)
        raise
    finally:
        partial = partial_of(target)
        if not (read_state(partial) or {}).get("rows"):
            shutil.rmtree(partial, ignore_errors=True)
