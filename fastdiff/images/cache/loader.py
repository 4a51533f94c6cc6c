"""The loader of packed images: a batch is a gather of rows, from a mapped file, from memory or on the GPU.

Nothing is done image by image in Python, and the gather itself lets go of Python's lock. A file that fits into memory
is read from end to end at the start, in the background; of a larger one the rows of a batch are announced to the
system all at once, so that the disk has many requests to work on.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.images.cache.format import PIXELS, Packed, replacements
from fastdiff.images.loader import Finish, Loader, Request, to_device
from fastdiff.runtime.machine import free_memory

TASK_BYTES = 4 << 20
"""What a thread gathers at once. A hand-over takes as long as 100 to 200 kB."""
BUFFERS = 8
"""Batches whose memory is kept: those read ahead and a few that the caller holds."""
READ_BYTES = 8 << 20
"""What is read at once when the file is brought into memory."""
COPY_BYTES = 64 << 20
"""What goes to a GPU at once when all images do."""
SHARE_OF_MEMORY = 0.8
"""Of what is free; the rest is for the model and its work."""


class PackedLoader(Loader):
    """Batches of reference pixels from a packed folder; with `resident` all of it lies on the device."""

    loader_name = "packed"

    def __init__(self, *args: Any, packed: Packed, resident: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = self.num_images  # a limit may have left only the first ones
        for index, reason in packed.unreadable.items():
            if index < count:
                self._reader.reject(index, reason)
        self._reader.stop_if_too_many()
        bad = self._reader.reasons
        self._shown = replacements(count, bad) if bad else None
        self._shape = packed.pixels.shape[1:]
        self._rows = packed.pixels.reshape(len(packed.pixels), -1)[:count]
        self._row_bytes = self._rows.shape[1]
        self._in_memory = resident or self._rows.nbytes < 0.5 * free_memory(torch.device("cpu"))
        self._file: int | None = None  # of rows to announce
        self._reading: threading.Thread | None = None
        self._closed = False
        self._buffers = _Buffers()
        self._on_device: Tensor | None = None
        if resident:
            self._check_memory()
            self.loader_name = f"packed on {self.device}"
            if self.device.type == "cuda":
                self._on_device = self._copy_to_device()
            else:
                self._rows = np.array(self._rows)
        elif self._in_memory:
            self._reading = threading.Thread(target=self._read_all, args=(packed.folder / PIXELS,), daemon=True)
            self._reading.start()
        elif hasattr(os, "posix_fadvise"):  # Linux
            self._file = os.open(packed.folder / PIXELS, os.O_RDONLY)
            self._data_starts = os.fstat(self._file).st_size - packed.pixels.nbytes

    def close(self) -> None:
        super().close()
        self._closed = True
        if self._reading is not None:
            self._reading.join()
        self._on_device = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _start(self, request: Request) -> Finish:
        shown = request.indices if self._shown is None else self._shown[request.indices]
        if self._on_device is not None:
            return lambda: (self._gather_on_device(shown, request.flips), shown)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            images = torch.empty((len(shown), *self._shape), dtype=torch.uint8, pin_memory=True)
        else:
            images = torch.from_numpy(self._buffers.get((len(shown), *self._shape)))
        pixels = images.numpy()
        size = max(1, TASK_BYTES // self._row_bytes)

        def gather(start: int) -> None:
            part = slice(start, start + size)
            self._announce(shown[part])
            # clip: np.take would gather into a buffer first to be able to raise; these indices are in range
            np.take(self._rows, shown[part], axis=0, out=pixels[part].reshape(-1, self._row_bytes), mode="clip")
            if not on_gpu:
                mirror(pixels[part], request.flips[part])

        starts = range(0, len(shown), size)
        alone = len(starts) == 1 and self._in_memory  # no disk to wait for: quicker than a hand-over
        parts = [] if alone else [self._threads.submit(gather, start) for start in starts]

        def finish() -> tuple[Tensor, np.ndarray]:
            if alone:
                gather(0)
            for part in parts:
                part.result()
            if not on_gpu:
                return images, shown
            return self._mirror_on_device(to_device(images, self.device), request.flips), shown

        return finish

    def _gather_on_device(self, shown: np.ndarray, flips: np.ndarray) -> Tensor:
        assert self._on_device is not None
        images = self._on_device.index_select(0, to_device(torch.from_numpy(shown), self.device))
        return self._mirror_on_device(images.view(len(shown), *self._shape), flips)

    def _mirror_on_device(self, images: Tensor, flips: np.ndarray) -> Tensor:
        if not flips.any():
            return images
        mask = to_device(torch.from_numpy(flips), self.device).view(-1, 1, 1, 1)
        return torch.where(mask, images.flip(2), images)

    def _read_all(self, path: Path) -> None:
        """Bring the file into the system's cache. Where it lies there already, this takes little more than a copy."""
        buffer = bytearray(READ_BYTES)
        with open(path, "rb", buffering=0) as file:
            while not self._closed and file.readinto(buffer):
                pass

    def _announce(self, shown: np.ndarray) -> None:
        """Have the system fetch rows that may not be in memory."""
        if self._file is None:
            return
        for row in shown.tolist():
            offset = self._data_starts + row * self._row_bytes
            os.posix_fadvise(self._file, offset, self._row_bytes, os.POSIX_FADV_WILLNEED)

    def _check_memory(self) -> None:
        free = free_memory(self.device)
        if self._rows.nbytes > SHARE_OF_MEMORY * free:
            where = f"the GPU ({self.device})" if self.device.type == "cuda" else "memory"
            raise UserError(
                f"--cache gpu: the decoded images take {self._rows.nbytes / 1e9:.3g} GB, and {where} has "
                f"{free / 1e9:.3g} GB free, of which {SHARE_OF_MEMORY:.0%} may go to them; use --cache disk"
            )

    def _copy_to_device(self) -> Tensor:
        """All rows, [N, bytes] uint8, by way of two pinned buffers that take turns."""
        count = len(self._rows)
        size = max(1, min(count, COPY_BYTES // self._row_bytes))
        rows = torch.empty((count, self._row_bytes), dtype=torch.uint8, device=self.device)
        buffers = [torch.empty((size, self._row_bytes), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied: list[torch.cuda.Event | None] = [None, None]
        for turn, start in enumerate(range(0, count, size)):
            buffer, last = buffers[turn % 2], copied[turn % 2]
            if last is not None:
                last.synchronize()
            part = self._rows[start : start + size]
            np.copyto(buffer.numpy()[: len(part)], part)
            rows[start : start + size].copy_(buffer[: len(part)], non_blocking=True)
            copied[turn % 2] = event = torch.cuda.Event()
            event.record()
        torch.cuda.current_stream(self.device).synchronize()
        return rows


class _Buffers:
    """Arrays for batches, used again when nobody holds the batch (or a view of it) any more.

    Memory fresh from the system takes four times as long to fill, page by page. Pinned memory needs none of this, for
    PyTorch keeps it.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def get(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uint8 array of this shape with anything in it."""
        for i in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[i]) == 2 and self._arrays[i].shape == shape:  # the list's and the argument
                return self._arrays[i]
        fresh = np.empty(shape, dtype=np.uint8)
        if len(self._arrays) < BUFFERS:
            self._arrays.append(fresh)
        return fresh


def mirror(images: np.ndarray, flips: np.ndarray) -> None:
    """Mirror those of the images [n, H, W, C] left to right, in place, of which flips [n] is true."""
    which = flips.nonzero()[0]
    if not len(which):
        return
    before = images[which]
    if before.shape[-1] == 4:  # whole pixels at a time
        images[which] = np.ascontiguousarray(before.view(np.uint32)[:, :, ::-1]).view(np.uint8)
        return
    after = np.empty_like(before)
    for channel in range(before.shape[-1]):  # a copy per channel takes a quarter of one over tiny pixels
        after[..., channel] = before[:, :, ::-1, channel]
    images[which] = after
