"""Image sets that are picture files, in a folder or in a zip.

The pixels are those of `images.pixels.load_image`, and no unreadable picture is replaced. The images of rank r of W are
every W-th, starting with the r-th.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError, one_line
from fastdiff.evaluation.image_set import ImageSet
from fastdiff.images.image_files import check_length, open_file, read_file
from fastdiff.images.listing import EXTENSIONS, Listing, is_data, is_image, list_images, same_to_readers
from fastdiff.images.loader import Loader, PillowLoader, to_device
from fastdiff.images.open import loader_class
from fastdiff.images.order import Order
from fastdiff.images.pixels import Header, read_header
from fastdiff.images.reader import Reader
from fastdiff.images.unreadable import what_is_wrong
from fastdiff.runtime.files import files_in

_THREADS = 16
"""Threads that read headers. They mostly wait for the storage."""
_CHUNK = 64
"""Headers per task of a thread."""


class Pictures:
    """Picture files and their order."""

    def __init__(self, root: Path, names: Sequence[str], limit: int | None) -> None:
        """names are the paths below root."""
        kept = list(names)[:limit]
        self.listing = Listing(root, kept, np.zeros(len(kept), dtype=np.int64), [])

    def open(self, index: int) -> BinaryIO:
        """Open a picture. OSError, ValueError and others where that can't be done."""
        return open_file(self.listing.path(index))

    def read(self, index: int) -> bytes:
        """The bytes of a picture's file, with the errors of `open`."""
        return read_file(self.listing.path(index))

    def refuse(self, index: int, reason: str) -> UserError:
        """The error for a picture that can't be read."""
        path = one_line(str(self.listing.path(index)))
        return UserError(f"{path} can't be read ({reason}); repair it or remove it from {self.listing.root}")

    def headers(self) -> list[Header]:
        """The headers of all pictures. UserError for the first that can't be read."""

        def read(indices: range) -> list[Header]:
            return [self._header(index) for index in indices]

        count = len(self.listing.names)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as threads:
            chunks = (range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK))
            try:
                return [header for chunk in threads.map(read, chunks) for header in chunk]
            finally:
                threads.shutdown(cancel_futures=True)

    def _header(self, index: int) -> Header:
        try:
            with self.open(index) as file:
                return read_header(file)
        except Exception as error:  # Pillow raises many types, all about this one file
            raise self.refuse(index, what_is_wrong(error)) from error


class ZippedPictures(Pictures):
    """Picture files in a zip."""

    def __init__(self, path: Path, limit: int | None) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
            entries = {entry.filename: entry for entry in self._archive.infolist() if _is_picture(entry)}
        except Exception as error:  # zipfile raises many types
            raise UserError(f"{path} is no zip archive, or is damaged ({one_line(str(error))[:200]})") from error
        if not entries:
            raise UserError(
                f"the zip {path} holds no pictures; give one of files that end in {', '.join(EXTENSIONS)}, or an .npz "
                "of images as sample.py writes it"
            )
        super().__init__(path, sorted(entries, key=_in_order), limit)
        self._entries = entries

    def open(self, index: int) -> BinaryIO:
        entry = self._entries[self.listing.names[index]]
        check_length(entry.file_size)
        return self._archive.open(entry)  # type: ignore[return-value]

    def read(self, index: int) -> bytes:
        with self.open(index) as file:
            return file.read()


def pictures_in(folder: Path, limit: int | None) -> Pictures:
    """The pictures below a folder, in the order of `list_images`, with its errors."""
    try:
        files = list_images(folder)
    except UserError:
        arrays = sorted(name for name in files_in(folder) if name.endswith((".npz", ".zip")))
        if arrays:
            raise UserError(f"{folder} holds no pictures but {arrays[0]}; give {folder / arrays[0]}") from None
        raise
    return Pictures(folder, [file.relative_to(folder).as_posix() for file in files[:limit]], limit)


def _is_picture(entry: zipfile.ZipInfo) -> bool:
    *folders, name = entry.filename.split("/")
    return is_image(name) and all(map(is_data, folders))


def _in_order(name: str) -> tuple[list[str], str]:
    """The key that sorts the names in a zip as `list_images` sorts those of the unpacked folder."""
    return same_to_readers(name).split("/"), name


class PictureSet(ImageSet):
    """Pictures of one size, or resized to one."""

    def __init__(
        self,
        path: Path,
        pictures: Pictures,
        device: torch.device,
        resize: tuple[int, int] | None,
        limit: int | None,
        loader: str,
        num_workers: int,
    ) -> None:
        headers = pictures.headers()
        first = headers[0].size_hw
        channels = 1 if all(header.is_gray for header in headers) else 3
        super().__init__(path, len(headers), first, channels, device, limit)
        other = next((index for index, header in enumerate(headers) if header.size_hw != first), 0)
        if other and resize is None:
            names = pictures.listing.names
            sizes = [f"{names[i]} has {'x'.join(map(str, headers[i].size_hw))} pixels" for i in (0, other)]
            raise UserError(
                f"the pictures of {path} have several sizes (height x width): {' and '.join(sizes)}; --resize 64 "
                "resizes all to 64x64, by the recipe of training"
            )
        self.lossy = ", ".join(sorted({header.lossy for header in headers} - {""}))
        if resize is not None and (other or resize != first):
            self._resize_to(resize)
        self._pictures, self._num_workers = pictures, num_workers
        self._loader_class = PillowLoader if self.resized and loader == "auto" else loader_class(loader)
        # nvJPEG rounds otherwise than Pillow's decoder. On the CPU, DALI's pixels are Pillow's unless it resizes.
        self._decodes_on = device if loader == "dali" or self._loader_class is PillowLoader else torch.device("cpu")
        if self.resized and self._loader_class is not PillowLoader:
            self.resized += ", by DALI, which differs from Pillow by up to 25 of 255 levels"

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, np.ndarray]]:
        make: Callable[..., Loader] = self._loader_class
        with make(
            _StrictReader(self._pictures, self.shape[:2], self.shape[2]),
            Order(self.count, batch_size * world_size, shuffle=False),
            random_flip=False,
            num_workers=self._num_workers,
            rank=rank,
            world_size=world_size,
            device=self._decodes_on,
        ) as loader:
            for batch in loader.once():
                yield to_device(batch.images, self.device), batch.positions.numpy()


class _StrictReader(Reader):
    """Reads pictures without replacing any: the first that can't be read raises UserError."""

    def __init__(self, pictures: Pictures, size_hw: tuple[int, int], channels: int) -> None:
        super().__init__(pictures.listing, size_hw, channels)
        self._pictures = pictures

    def _data(self, index: int) -> bytes:
        return self._pictures.read(index)

    def reject(self, index: int, reason: str) -> None:
        raise self._pictures.refuse(index, reason)
