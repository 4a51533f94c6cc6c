"""The images of a job on disk: in chunks as they are drawn, and in npz files with all images.

A chunk is a range of images in the file parts/START-STOP.npz (images, labels, job). Files are written atomically, so
their names alone show which images are on disk.
"""

from __future__ import annotations

import errno
import math
import os
import re
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.errors import UserError
from fastdiff.runtime.files import atomic_write, files_in, remove_partial_files
from fastdiff.runtime.untrusted import npz_header, read_npz_array
from fastdiff.sampling.job.claims import Claim
from fastdiff.sampling.job.manifest import Manifest, digest
from fastdiff.sampling.pictures import Images

IMAGES, LABELS = ("arr_0", "images"), ("arr_1", "labels")
"""Names of the arrays in an npz of all images and in a chunk."""


class Range(NamedTuple):
    """Images start to stop - 1."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.start:09d}-{self.stop:09d}"

    def overlaps(self, others: list[Range]) -> bool:
        return any(other.start < self.stop and self.start < other.stop for other in others)


class Piece(NamedTuple):
    """A file that holds a range of images, of which the range `used` is read from it."""

    path: Path
    holds: Range
    used: Range


class DamagedFile(Exception):
    """A file of images that can't be used; it is removed, and its images are drawn again."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); its images are drawn again")
        self.path = path


def range_of(name: str) -> Range | None:
    """The range in a name such as 000000256-000000512, which may end in .npz."""
    found = re.fullmatch(r"(\d{9,})-(\d{9,})(?:\.npz)?", name)
    return Range(int(found[1]), int(found[2])) if found else None


def cover(pieces: Iterable[Piece], count: int) -> tuple[list[Piece], list[Range]]:
    """Choose files that hold images 0 to count - 1, each image from one of them. Also returns the missing ranges."""
    chosen: list[Piece] = []
    missing: list[Range] = []
    place = 0
    for piece in sorted(pieces, key=lambda piece: (piece.holds.start, -piece.holds.stop)):
        start, stop = (min(image, count) for image in piece.holds)
        if start > place:
            missing.append(Range(place, start))
            place = start
        if stop > place:
            chosen.append(piece._replace(used=Range(place, stop)))
            place = stop
    if place < count:
        missing.append(Range(place, count))
    return chosen, missing


def split(ranges: list[Range], chunk_size: int) -> list[Range]:
    """Cut ranges at the multiples of chunk_size."""
    chunks = []
    for start, stop in ranges:
        while start < stop:
            end = min((start // chunk_size + 1) * chunk_size, stop)
            chunks.append(Range(start, end))
            start = end
    return chunks


class Store:
    """Images 0 to count - 1 of the job that a manifest describes, in its folder."""

    def __init__(self, folder: Path, manifest: Manifest, count: int) -> None:
        self.folder, self.chunks, self.count = folder, folder / "parts", count
        self.shape, self.labelled = tuple(manifest["shape"]), manifest["labelled"]
        self.seed, self.chunk_size = manifest["seed"], manifest["part_size"]
        self.digest = digest(manifest["identity"])  # chunks with another one belong to another job
        self._tested: set[tuple[Path, int, int]] = set()  # (path, size, mtime) of files with valid checksums

    # --- which images exist, by file name ---

    def path(self, chunk: Range) -> Path:
        return self.chunks / f"{chunk.name}.npz"

    def cover(self) -> tuple[list[Piece], list[Range]]:
        """The files to read for the images, and the ranges of images that are still to be drawn."""
        pieces = self.merged()
        for name in files_in(self.chunks):
            if (held := range_of(name)) and name.endswith(".npz") and held.start < held.stop:
                pieces.append(Piece(self.chunks / name, held, held))
        return cover(pieces, self.count)

    def missing(self) -> list[Range]:
        """The ranges of images that are still to be drawn."""
        return self.cover()[1]

    def merged(self) -> list[Piece]:
        """The npz files with images 0 to N - 1, for the current count or an earlier one."""
        pieces = []
        pattern = re.compile("samples_([1-9][0-9]*)" + "".join(f"x{n}" for n in self.shape) + r"\.npz")
        for name in files_in(self.folder):
            if found := pattern.fullmatch(name):
                held = Range(0, int(found[1]))
                pieces.append(Piece(self.folder / name, held, held))
        return [piece for piece in pieces if self._is_merged(piece)]

    # --- reading, which raises DamagedFile if a file can't be used or is missing ---

    def images(self, first: int = 0) -> Iterator[tuple[int, Images]]:
        """Yield (number of the first image, images) from image `first` on, at most a chunk's size at a time."""
        for piece in self._pieces():
            start = max(piece.used.start, first)
            labels = self._rows(piece, LABELS, start) if self.labelled else repeat(None)
            for images, their_labels in zip(self._rows(piece, IMAGES, start), labels, strict=False):
                yield start, Images(images, their_labels)
                start += len(images)

    def labels(self) -> Iterator[np.ndarray]:
        """Yield all labels in order, at most a chunk's size at a time."""
        for piece in self._pieces():
            yield from self._rows(piece, LABELS, piece.used.start)

    def _pieces(self) -> list[Piece]:
        chosen, missing = self.cover()
        if missing:
            raise DamagedFile(self.path(missing[0]), "it is missing")
        return chosen

    def _rows(self, piece: Piece, names: tuple[str, str], start: int) -> Iterator[np.ndarray]:
        """Yield a file's images or labels from image `start` to the last used, at most a chunk's size at a time."""
        if start >= piece.used.stop:
            return
        is_chunk = piece.path.parent == self.chunks
        with _damage(piece.path), zipfile.ZipFile(piece.path) as archive:
            self._verify(archive, piece, is_chunk)
            shape, dtype = npz_header(archive, names[is_chunk], _most(piece.path))
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            entry = archive.getinfo(f"{names[is_chunk]}.npy")
            with archive.open(entry) as file:
                if b"'fortran_order': False" not in file.read(entry.file_size - shape[0] * row_bytes):
                    raise ValueError("its arrays are not in C order")
                file.seek((start - piece.holds.start) * row_bytes, os.SEEK_CUR)
                for place in range(start, piece.used.stop, self.chunk_size):
                    rows = min(self.chunk_size, piece.used.stop - place)
                    yield np.frombuffer(file.read(rows * row_bytes), dtype).reshape(rows, *shape[1:])

    def _verify(self, archive: zipfile.ZipFile, piece: Piece, is_chunk: bool) -> None:
        """Check a file's shapes and, once, its checksums; raises ValueError if they are wrong."""
        if not self._fits(archive, piece, is_chunk):
            raise ValueError("its images or labels are of another shape or type")
        stat = piece.path.stat()
        key = piece.path, stat.st_size, stat.st_mtime_ns
        if key not in self._tested:
            if is_chunk and str(read_npz_array(archive, "job", _most(piece.path))) != self.digest:
                raise ValueError("it is of another job")
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad} is wrong")
            self._tested.add(key)

    def _is_merged(self, piece: Piece) -> bool:
        """Whether a file is an npz with images 0 to N - 1 of a job with this seed."""
        with suppress(DamagedFile), _damage(piece.path), zipfile.ZipFile(piece.path) as archive:
            index, seed = (read_npz_array(archive, name, _most(piece.path)) for name in ("index", "seed"))
            numbered = len(index) == piece.holds.stop and np.array_equal(index, np.arange(len(index)))
            return numbered and int(seed) == self.seed and self._fits(archive, piece, False)
        return False

    def _fits(self, archive: zipfile.ZipFile, piece: Piece, is_chunk: bool) -> bool:
        """Whether a file's images and labels have the shapes and types that its name and the job require."""
        count, most = piece.holds.stop - piece.holds.start, _most(piece.path)
        fit = npz_header(archive, IMAGES[is_chunk], most) == ((count, *self.shape), np.uint8)
        return fit and (not self.labelled or npz_header(archive, LABELS[is_chunk], most) == ((count,), np.int64))

    # --- writing ---

    def write(self, chunk: Range, drawn: Images) -> None:
        """Write a chunk, unless its images were merged into an npz in the meantime."""
        arrays = {"images": drawn.images, "job": np.array(self.digest)}
        if self.labelled:
            assert drawn.labels is not None
            arrays["labels"] = drawn.labels
        for _ in range(10):
            try:
                with atomic_write(self.path(chunk)) as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                return
            except FileNotFoundError:  # a process that merged the chunks has removed their folder
                if not chunk.overlaps(self.missing()):
                    return
                self.chunks.mkdir(parents=True, exist_ok=True)
        raise FileNotFoundError(f"{self.chunks} is removed again and again")

    def discard(self, damaged: DamagedFile) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            damaged.path.unlink()

    def tidy(self) -> None:
        """Remove chunks whose images are in an npz, and partial files of processes that have ended."""
        within = max((piece.holds.stop for piece in self.merged()), default=0)
        for name in files_in(self.chunks):
            if (held := range_of(name)) and held.stop <= within:
                (self.chunks / name).unlink(missing_ok=True)
        remove_partial_files(self.chunks)
        with suppress(OSError):  # it contains chunks that are still needed
            self.chunks.rmdir()


def _most(path: Path) -> int:
    """The most bytes that an array of a file may have: our arrays are not compressed."""
    return path.stat().st_size + (1 << 20)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn any error in reading a file into DamagedFile, except I/O errors and lack of memory."""
    try:
        yield
    except (FileNotFoundError, zipfile.BadZipFile) as error:
        raise DamagedFile(path, str(error)) from error
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # the zip's directory has a negative offset
            raise DamagedFile(path, "its list of arrays is wrong") from error
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many types
        raise DamagedFile(path, str(error).strip() or type(error).__name__) from error


class Writer:
    """Writes chunks in a thread while the next ones are drawn, and then releases their claims."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(1)
        self._unwritten: deque[tuple[Range, Future[None]]] = deque()

    def put(self, chunk: Range, drawn: Images, claim: Claim) -> None:
        self._unwritten.append((chunk, self._pool.submit(self._write, chunk, drawn, claim)))
        self.wait(most=2)

    def wait(self, most: int) -> list[Range]:
        """Wait until at most `most` chunks are unwritten, and return those. Raises errors from writing the others."""
        while self._unwritten and (len(self._unwritten) > most or self._unwritten[0][1].done()):
            with disk(self.store.folder):
                self._unwritten.popleft()[1].result()
        return [chunk for chunk, _ in self._unwritten]

    def _write(self, chunk: Range, drawn: Images, claim: Claim) -> None:
        with claim:
            self.store.write(chunk, drawn)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._pool.shutdown(wait=True)  # drawn images are written even after an error
        if error is None:
            self.wait(most=0)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--out_dir: {folder} can't be written to or read ({reason}); the images that are in it are kept, and the "
            "same command continues with them"
        ) from error
