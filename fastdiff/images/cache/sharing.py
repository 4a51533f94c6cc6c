"""Where the cache of a folder's decoded images lies, and which of a run's processes makes it.

Processes agree by the file system alone, for nothing else connects them yet: whoever holds the lock beside the cache
builds it, and the others look for the finished folder. Rank 0 takes the lock at once, other ranks only if it stays
free, as it does on nodes whose disks rank 0 doesn't see. The system frees a dead process's lock, so that another one
goes on with its work. Where locks don't reach from node to node, the builder's notes of its progress keep others off.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.errors import UserError, blaming
from fastdiff.images.cache.build import pack, partial_of, read_state, usable_cores
from fastdiff.images.cache.format import RECORD, Packed, describe, is_packed, open_packed
from fastdiff.images.listing import Listing
from fastdiff.runtime.processes import make_writable

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""For how long the lock must be free before a rank other than 0 builds."""
FOREIGN_SECONDS = 30.0
"""For how long a build that another host began must stand still before it counts as abandoned."""
STALLED_SECONDS = 900.0
"""For how long the builder may make no progress before those who wait give up."""


def default_place(data_dir: str | Path, size_hw: tuple[int, int], channels: int, cache_dir: str = "") -> Path:
    """The packed folder of a folder of images: beside it, or in cache_dir."""
    folder = Path(os.path.abspath(data_dir))
    name = f"{folder.name or 'images'}.packed_{size_hw[0]}x{size_hw[1]}x{channels}"
    return (Path(cache_dir) if cache_dir else folder.parent) / name


def cached(
    listing: Listing, size_hw: tuple[int, int], channels: int, cache_dir: str = "", *, rank: int = 0, build: bool = True
) -> Packed | None:
    """The listing's images, decoded. Where they aren't yet, they are packed first; or with build=False it is None.

    Every process of a run calls it. UserError where the cache holds other images or can't be made.
    """
    if cache_dir and is_packed(cache_dir):
        raise UserError(
            f"--cache_dir: {cache_dir} is a packed folder itself; give it as --data_dir, without --cache_dir"
        )
    place = default_place(listing.root, size_hw, channels, cache_dir)
    if not is_packed(place):
        if not build:
            return None
        with blaming("--cache_dir"):
            make_writable(place.parent)
        together(
            place,
            lambda: pack(listing, size_hw, channels, place, workers=usable_cores(), flag="--cache_dir"),
            rank=rank,
            flag="--cache_dir",
        )
    packed = open_packed(place, size_hw, channels, "--cache_dir")
    check_same(packed, listing, "or name another --cache_dir")
    return packed


def check_same(packed: Packed, listing: Listing, otherwise: str) -> None:
    """UserError, which ends with what else could be done, unless the folder was packed from these very images."""
    now = describe(listing, (packed.pixels.shape[1], packed.pixels.shape[2]), packed.pixels.shape[3])
    for key, what in (("num_images", "number"), ("listing", "names"), ("file_lengths", "contents")):
        if packed.record.get(key) != now[key]:
            raise UserError(
                f"{packed.folder} was packed when {listing.root} held other images (their {what} differed); delete "
                f"that folder to have it made anew, {otherwise}"
            )


def together(target: Path, build: Callable[[], None], *, rank: int, flag: str) -> None:
    """Return once `target` is a packed folder: made by build() in this process, or by another that came first."""
    watch = _Watch(partial_of(target))
    free_since: float | None = None
    while not is_packed(target):
        with _lock(target.with_name(f".{target.name}.lock"), flag) as mine:
            now = time.monotonic()
            free_since = (free_since or now) if mine else None
            patient = rank == 0 or (free_since is not None and now - free_since >= GRACE_SECONDS)
            if mine and patient and not is_packed(target) and _claim(partial_of(target)):
                try:
                    build()
                except UserError as error:
                    if rank:  # scripts report only what happens to rank 0
                        logger.error("rank %d: %s", rank, error)
                    raise
                finally:
                    _clear_if_nothing_done(partial_of(target))
        if not is_packed(target):
            watch.check(target, flag)
            time.sleep(POLL_SECONDS)


@contextmanager
def _lock(path: Path, flag: str) -> Iterator[bool]:
    """Whether this process got the lock, for as long as the context lasts."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{flag}: files in {path.parent} can't be locked ({error.strerror}); name a folder on a local disk, or "
                "make the packed folder with datasets/pack.py and give that as --data_dir"
            ) from error
        if not _same(file.fileno(), path):  # its last holder removed it, and another may have made it anew
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _clear_if_nothing_done(partial: Path) -> None:
    """Leave no empty build behind when it was refused."""
    if not (read_state(partial) or {}).get("rows") and partial.is_dir():
        shutil.rmtree(partial)


def _claim(partial: Path) -> bool:
    """Make the folder of a build ours, unless another host is at work in it (or was just before)."""
    try:
        partial.mkdir()
        return True
    except FileExistsError:
        state = read_state(partial)
    if state is not None and state.get("host") == platform.node():
        return True  # we hold the lock, so its builder is gone
    until = time.monotonic() + FOREIGN_SECONDS
    while time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, FOREIGN_SECONDS))
        if read_state(partial) != state or not partial.exists():
            return False
    return True


class _Watch:
    """Sees to it that a build gets on."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._state = read_state(partial)
        self._since = time.monotonic()

    def check(self, target: Path, flag: str) -> None:
        state = read_state(self._partial)
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since > STALLED_SECONDS:
            raise UserError(
                f"{flag}: {target / RECORD} is missing, and the process that makes it has got no further for "
                f"{STALLED_SECONDS / 60:.0f} minutes; stop that one and start again, or use --cache none"
            )
