"""Image sets that are arrays: an npz, whose rows are read as they are needed, and a packed folder, which is mapped.

A rank's share is a contiguous range of rows.
"""

from __future__ import annotations

import struct
import zipfile
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError, one_line, quoted, shortened
from fastdiff.evaluation.image_set import CHANNELS, ImageSet
from fastdiff.images.cache.format import Packed
from fastdiff.images.loader import to_device
from fastdiff.images.pixels import recipe_for, resize_image
from fastdiff.runtime.untrusted import ArrayHeader, npz_array_header

Rows = Generator[np.ndarray, None, None]
_AHEAD = 2
"""Batches that are read while the caller works."""
_PART = 1 << 20
"""Bytes that are read at a time to get past the rows before a share."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The local header of a zip's entry: signature, and lengths of the name and of the extra field that follow."""


class ArraySet(ImageSet):
    """Images that are the rows of an array [N, H, W, C] uint8."""

    def __init__(
        self,
        path: Path,
        array_shape: tuple[int, ...],
        device: torch.device,
        resize: tuple[int, int] | None,
        limit: int | None,
        num_workers: int,
    ) -> None:
        count, height, width, channels = array_shape
        if not count:
            raise UserError(f"{path} holds no images")
        if channels not in CHANNELS:
            if height in CHANNELS:
                raise UserError(
                    f"the images of {path} have their channels first, {quoted(list(array_shape))}; give them as "
                    "[N, H, W, C], which numpy's transpose(0, 2, 3, 1) makes of [N, C, H, W]"
                )
            raise UserError(f"the images of {path} have {channels} channels; give images with 1 (gray) or 3 (RGB)")
        super().__init__(path, count, (height, width), channels, device, limit)
        self._num_workers = num_workers
        if resize is not None and resize != (height, width):
            try:
                recipe_for(height, width, resize)
            except ValueError as error:
                raise UserError(f"the images of {path} can't be resized ({error})") from None
            self._resize_to(resize)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, np.ndarray]]:
        start, stop = (self.count * part // world_size for part in (rank, rank + 1))
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="images") as threads:
            resize: Callable[[np.ndarray], np.ndarray] = partial(resize_image, size_hw=self.shape[:2])
            for images in _read_ahead(self._rows(start, stop, batch_size)):
                if self.resized:
                    images = np.stack(list(threads.map(resize, images)))
                yield to_device(torch.from_numpy(images), self.device), np.arange(start, start + len(images))
                start += len(images)

    @abstractmethod
    def _rows(self, start: int, stop: int, batch_size: int) -> Rows:
        """Read rows start to stop - 1, batch_size at a time, into arrays of their own."""


class PackedSet(ArraySet):
    """The images of a packed folder, at the size at which they were packed."""

    def __init__(self, path: Path, packed: Packed, *how: Any) -> None:
        """how: the further arguments of `ArraySet`."""
        super().__init__(path, packed.pixels.shape, *how)
        self._pixels = packed.pixels
        if replaced := {index: why for index, why in packed.unreadable.items() if index < self.count}:
            index, reason = min(replaced.items())
            name = packed.listing("none").names[index]
            raise UserError(
                f"{path} was packed with {len(replaced)} unreadable image{'s' * (len(replaced) > 1)}, such as {name} "
                f"({reason}), which others replace; repair or remove the files and run datasets/pack.py again"
            )

    def _rows(self, start: int, stop: int, batch_size: int) -> Rows:
        for first in range(start, stop, batch_size):
            yield np.array(self._pixels[first : min(first + batch_size, stop)])


class NpzSet(ArraySet):
    """The images in arr_0 of an npz, as sample.py writes it, compressed or not.

    Rows of a compressed array can only be reached through all before them. The array's checksum is compared where a
    share is read from the first row to the last or through compressed ones.
    """

    def __init__(self, path: Path, file: Path, *how: Any) -> None:
        """file is the npz; how: the further arguments of `ArraySet`."""
        self._file = file
        with _naming_damage(file), zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise UserError(
                    f"{file} has no arr_0{f' but {shortened(names[0], 100)}' if names else ''}; give an .npz with "
                    "images uint8 [N, H, W, C] in arr_0, as sample.py writes it"
                )
            self._header = npz_array_header(archive, "arr_0")
        _check(file, self._header)
        super().__init__(path, self._header.shape, *how)

    def _rows(self, start: int, stop: int, batch_size: int) -> Rows:
        total, *shape = self._header.shape
        if start == stop:
            return
        with _naming_damage(self._file), self._open(start) as content:
            for first in range(start, stop, batch_size):
                images = np.empty((min(batch_size, stop - first), *shape), dtype=np.uint8)
                _fill(content, images)
                yield images
            if stop == total:
                content.read(1)  # at the end zipfile compares the checksum

    @contextmanager
    def _open(self, row: int) -> Iterator[BinaryIO]:
        """Open the array at a row."""
        before = self._header.length + row * int(np.prod(self._header.shape[1:]))
        with zipfile.ZipFile(self._file) as archive:
            entry = archive.getinfo("arr_0.npy")
            if row and entry.compress_type == zipfile.ZIP_STORED:
                with self._file.open("rb") as file:
                    file.seek(_start_of(file, entry) + before)
                    yield file
                return
            with archive.open(entry) as content:
                while before:
                    before -= len(_whole(content.read(min(before, _PART))))
                yield content  # type: ignore[misc]


def _check(file: Path, header: ArrayHeader) -> None:
    """Raise UserError for an array that holds no images row by row."""
    if header.dtype != np.uint8 or len(header.shape) != 4 or 0 in header.shape[1:]:
        found = f"{shortened(str(header.dtype))} {quoted(list(header.shape))}"
        scale = ", which (255 * x).round().astype(np.uint8) makes of x from 0 to 1" if header.dtype.kind == "f" else ""
        raise UserError(f"arr_0 of {file} is {found}; images are uint8 [N, H, W, C] with values from 0 to 255{scale}")
    if header.fortran_order:
        raise UserError(
            f"arr_0 of {file} is in Fortran's order, so its images can't be read one after another; save "
            "np.ascontiguousarray of it"
        )


def _start_of(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """The position in a zip file at which an entry's content begins."""
    file.seek(entry.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile(f"no entry begins at byte {entry.header_offset}")
    return entry.header_offset + _LOCAL_HEADER.size + name + extra


def _fill(file: BinaryIO, images: np.ndarray) -> None:
    """Read as many bytes as the array has."""
    left = images.data.cast("B")
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("arr_0 ends early")
        left = left[count:]


def _whole(data: bytes) -> bytes:
    if not data:
        raise EOFError("arr_0 ends early")
    return data


@contextmanager
def _naming_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and the operating system raise many types
        reason = one_line(str(error))[:200]
        raise UserError(f"{file} is not an .npz of arrays, or is damaged ({reason})") from error


def _read_ahead(rows: Rows) -> Iterator[np.ndarray]:
    """Iterate over arrays that a thread reads ahead."""
    with closing(rows), ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        waiting = deque(thread.submit(next, rows, None) for _ in range(_AHEAD))
        while (images := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, rows, None))
            yield images
