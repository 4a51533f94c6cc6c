"""Images of a job that are drawn: in parts, or put together in one npz.

A part is a range of images in parts/START-STOP.npz (images, labels), which is there whole or not at all. What is there
can be read off the names.
"""

from __future__ import annotations

import errno
import re
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.errors import UserError
from fastdiff.runtime.files import atomic_write, files_in, remove_partial_files
from fastdiff.runtime.untrusted import read_npz_array
from fastdiff.sampling.job.claims import Claim
from fastdiff.sampling.pictures import Images


class Range(NamedTuple):
    """Images start to stop - 1."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.start:09d}-{self.stop:09d}"


class Piece(NamedTuple):
    """Images that a file holds, of which `used` are wanted of it."""

    path: Path
    holds: Range
    used: Range


class DamagedPart(Exception):
    """A file of images that can't be used; it is removed, and its images are drawn again."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); its images are drawn again")
        self.path = path


def range_of(name: str) -> Range | None:
    """The range in a name such as 000000256-000000512, perhaps with .npz."""
    found = re.fullmatch(r"(\d{9,})-(\d{9,})(?:\.npz)?", name)
    return Range(int(found[1]), int(found[2])) if found else None


def cover(pieces: list[Piece], count: int) -> tuple[list[Piece], list[Range]]:
    """The files to read for images 0 to count - 1, each image in one of them, and the ranges that are in none."""
    chosen: list[Piece] = []
    missing: list[Range] = []
    ordered = sorted(pieces, key=lambda piece: piece.holds)
    place, i, furthest = 0, 0, None
    while place < count:
        while i < len(ordered) and ordered[i].holds.start <= place:
            if furthest is None or ordered[i].holds.stop > furthest.holds.stop:
                furthest = ordered[i]
            i += 1
        if furthest is not None and furthest.holds.stop > place:
            stop = min(furthest.holds.stop, count)
            chosen.append(furthest._replace(used=Range(place, stop)))
        else:
            stop = min(ordered[i].holds.start, count) if i < len(ordered) else count
            missing.append(Range(place, stop))
        place = stop
    return chosen, missing


def split(ranges: list[Range], part_size: int) -> list[Range]:
    """Ranges cut where parts begin."""
    pieces = []
    for start, stop in ranges:
        while start < stop:
            end = min((start // part_size + 1) * part_size, stop)
            pieces.append(Range(start, end))
            start = end
    return pieces


class Store:
    """The images of a job in its folder.

    digest  stands for everything that makes the images what they are; a part with another one is not of this job.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], labelled: bool, seed: int, digest: str) -> None:
        self.folder, self.parts = folder, folder / "parts"
        self.shape, self.labelled, self.seed, self.digest = shape, labelled, seed, digest
        self._merged: dict[tuple[str, int, int], int] = {}  # (name, size, time of change) → images; 0: not usable
        self._tested: set[tuple[str, int, int]] = set()

    def path(self, part: Range) -> Path:
        return self.parts / f"{part.name}.npz"

    def cover(self, count: int) -> tuple[list[Piece], list[Range]]:
        """The files to read for images 0 to count - 1, and the ranges that are missing, by the files' names."""
        pieces = [*self.merged()]
        for name in files_in(self.parts):
            if (held := range_of(name)) and name.endswith(".npz") and held.start < held.stop:
                pieces.append(Piece(self.parts / name, held, held))
        return cover(pieces, count)

    def missing(self, count: int) -> list[Range]:
        """Ranges of images that are still to be drawn."""
        return self.cover(count)[1]

    def merged(self) -> list[Piece]:
        """The npz files of an earlier or present count, each with images 0 to N - 1."""
        pieces = []
        pattern = re.compile("samples_([0-9]+)" + "".join(f"x{n}" for n in self.shape) + r"\.npz")
        for name in files_in(self.folder):
            found = pattern.fullmatch(name)
            if found and self._usable(self.folder / name) == int(found[1]) > 0:
                held = Range(0, int(found[1]))
                pieces.append(Piece(self.folder / name, held, held))
        return pieces

    def write(self, part: Range, drawn: Images) -> None:
        """Write a part, unless its images have come into an npz meanwhile."""
        arrays = {"images": drawn.images, "job": np.array(self.digest)}
        if self.labelled:
            assert drawn.labels is not None
            arrays["labels"] = drawn.labels
        for _ in range(10):
            try:
                with atomic_write(self.path(part)) as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                return
            except FileNotFoundError:  # whoever puts the images together has tidied up
                if all(hole.start >= part.stop or hole.stop <= part.start for hole in self.missing(part.stop)):
                    return
                self.parts.mkdir(parents=True, exist_ok=True)
        raise FileNotFoundError(f"{self.parts} vanishes")

    def read(self, pieces: list[Piece], rows: int) -> Iterator[tuple[int, Images]]:
        """(number of the first, images) in order, at most a part at a time, or `rows` of an npz.

        Raises DamagedPart.
        """
        for piece in pieces:
            if piece.path.parent == self.parts:
                drawn = self._read_part(piece)
                used = slice(piece.used.start - piece.holds.start, piece.used.stop - piece.holds.start)
                labels = None if drawn.labels is None else drawn.labels[used]
                yield piece.used.start, Images(drawn.images[used], labels)
                continue
            images, all_labels = self._map(piece.path)
            for start in range(piece.used.start, piece.used.stop, rows):
                stop = min(start + rows, piece.used.stop)
                labels = None if all_labels is None else np.array(all_labels[start:stop])
                yield start, Images(np.array(images[start:stop]), labels)

    def read_labels(self, pieces: list[Piece]) -> Iterator[np.ndarray]:
        """Labels in order, a file's at a time."""
        for piece in pieces:
            if piece.path.parent == self.parts:
                with _damage(piece.path), zipfile.ZipFile(piece.path) as archive:
                    labels: np.ndarray | None = read_npz_array(archive, "labels", piece.path.stat().st_size + (1 << 20))
            else:
                labels = self._map(piece.path)[1]
            assert labels is not None
            yield np.array(labels[piece.used.start - piece.holds.start : piece.used.stop - piece.holds.start])

    def discard(self, damaged: DamagedPart) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            damaged.path.unlink()

    def tidy(self) -> None:
        """Remove the parts whose images are in an npz, and what processes that ended have left unfinished."""
        within = max((piece.holds.stop for piece in self.merged()), default=0)
        for name in files_in(self.parts):
            held = range_of(name)
            if held and held.stop <= within:
                (self.parts / name).unlink(missing_ok=True)
        remove_partial_files(self.parts)
        with suppress(OSError):  # others may still need it
            self.parts.rmdir()

    def _read_part(self, piece: Piece) -> Images:
        count = piece.holds.stop - piece.holds.start
        with _damage(piece.path):
            most = piece.path.stat().st_size + (1 << 20)  # parts are not compressed
            with zipfile.ZipFile(piece.path) as archive:
                images = read_npz_array(archive, "images", most)
                labels = read_npz_array(archive, "labels", most) if self.labelled else None
                digest = str(read_npz_array(archive, "job", most))
            if digest != self.digest:
                raise ValueError("it is of another job")
            if images.shape != (count, *self.shape) or images.dtype != np.uint8:
                raise ValueError(f"its images are {images.dtype} {list(images.shape)}")
            if labels is not None and (labels.shape != (count,) or labels.dtype != np.int64):
                raise ValueError(f"its labels are {labels.dtype} {list(labels.shape)}")
        return Images(images, labels)

    def _usable(self, path: Path) -> int:
        """Images in an npz that a job of this seed put together; 0 when it is something else."""
        try:
            with _damage(path):
                key = _key(path)
                if key not in self._merged:
                    self._merged[key] = self._count(path)
                return self._merged[key]
        except DamagedPart:
            return 0

    def _count(self, path: Path) -> int:
        images = member(path, "arr_0")
        index, seed = member(path, "index"), member(path, "seed")
        count = len(images)
        fits = images.dtype == np.uint8 and images.shape == (count, *self.shape) and index.shape == (count,)
        if self.labelled:
            labels = member(path, "arr_1")
            fits = fits and labels.shape == (count,) and labels.dtype == np.int64
        return count if count and fits and int(seed) == self.seed and index[0] == 0 and index[-1] == count - 1 else 0

    def _map(self, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
        """Images and labels of an npz as they lie on disk, once it is known to be sound."""
        with _damage(path):
            key = _key(path)
            if key not in self._tested:
                with zipfile.ZipFile(path) as archive:
                    if (bad := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {bad} is wrong")
                self._tested.add(key)
            return member(path, "arr_0"), member(path, "arr_1") if self.labelled else None


def member(path: Path, name: str) -> np.ndarray:
    """An array of an npz that isn't compressed, mapped read-only; a copy when it has no dimension."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)  # type: ignore[arg-type]
            header = file.tell()
            if not shape:
                return np.frombuffer(file.read(dtype.itemsize), dtype)[0]
    if fortran or dtype.hasobject:
        raise ValueError("its arrays lie in another order")
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)  # the lengths of the name and of the extra field end the local header
        lengths = raw.read(4)
    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(path, dtype, "r", begin + header, shape)


def _key(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file that is read becomes DamagedPart, but for errors of the machine."""
    try:
        yield
    except (FileNotFoundError, zipfile.BadZipFile) as error:
        raise DamagedPart(path, str(error)) from error
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # a place before the file's start, by its list of arrays
            raise DamagedPart(path, "its list of arrays is wrong") from error
        raise
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise DamagedPart(path, str(error).strip() or type(error).__name__) from error


class Writer:
    """Writes parts while the next are drawn, and ends their claims; at most two wait."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[tuple[Range, Claim, Future[None]]] = deque()

    def put(self, part: Range, drawn: Images, claim: Claim) -> None:
        self.waiting.append((part, claim, self.pool.submit(self._write, part, drawn, claim)))
        while len(self.waiting) > 2:
            self._first()
        self.check()

    def pending(self) -> set[Range]:
        """Parts that are not known to be written."""
        return {part for part, _, future in self.waiting if not future.done()}

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        while self.waiting and self.waiting[0][2].done():
            self._first()

    def wait(self) -> None:
        while self.waiting:
            self._first()

    def _first(self) -> None:
        with disk(self.folder):
            self.waiting.popleft()[2].result()

    def _write(self, part: Range, drawn: Images, claim: Claim) -> None:
        try:
            self.store.write(part, drawn)
        finally:
            claim.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.pool.shutdown(wait=True)  # what is drawn is worth its file, whatever has happened
        if error is None:
            self.wait()


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """An error of the file system becomes one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--out_dir: {folder} can't be written to or read ({reason}); the images that are in it are kept, and the "
            "same command goes on with them"
        ) from error
