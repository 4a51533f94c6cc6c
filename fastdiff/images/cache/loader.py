"""The loader of packed images, which gathers the rows of a batch from a mapped file, from memory or on the GPU.

No Python code runs per image, and the gather releases the GIL. A file that fits into memory is read once in the
background at the start. For a larger file, the loader announces all rows of a batch to the system at once, so that the
disk can serve many requests in parallel.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
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
"""Bytes per task of a thread. Submitting a task takes as long as gathering 100 to 200 kB."""
BUFFERS = 8
"""Largest number of unused buffers that are kept for later batches."""
READ_BYTES = 8 << 20
"""Bytes per read while the file is loaded into memory."""
COPY_BYTES = 64 << 20
"""Bytes per copy while all images are moved to a GPU."""
SHARE_OF_MEMORY = 0.8
"""Fraction of the free memory that the images may take; the rest is for the model and its activations."""


class PackedLoader(Loader):
    """Batches of reference pixels from a packed folder. If `resident`, all images are kept on the device."""

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
        self._file: int | None = None  # open if its rows are announced to the system
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
            images = torch.from_numpy(self._buffers.empty((len(shown), *self._shape)))
        pixels = images.numpy()
        size = max(1, TASK_BYTES // self._row_bytes)

        def gather(start: int) -> None:
            part = slice(start, start + size)
            self._announce(shown[part])
            # "clip", for indices that are in range: with "raise" np.take gathers into a buffer of its own first
            np.take(self._rows, shown[part], axis=0, out=pixels[part].reshape(-1, self._row_bytes), mode="clip")
            if not on_gpu:
                mirror(pixels[part], request.flips[part])

        starts = range(0, len(shown), size)
        alone = len(starts) == 1 and self._in_memory  # without disk reads this is faster than a thread
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
        """Read the file once, so that the system caches it; a cached file takes little longer than a copy."""
        buffer = bytearray(READ_BYTES)
        with open(path, "rb", buffering=0) as file:
            while not self._closed and file.readinto(buffer):
                pass

    def _announce(self, shown: np.ndarray) -> None:
        """Ask the system to read rows that may not be in memory."""
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
        """Copy all rows to the GPU, uint8 [N, bytes]."""
        rows = torch.empty(self._rows.shape, dtype=torch.uint8, device=self.device)
        size = max(1, COPY_BYTES // self._row_bytes)
        for start in range(0, len(rows), size):
            part = self._rows[start : start + size]
            pinned = torch.empty(part.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(pinned.numpy(), part)
            rows[start : start + size].copy_(pinned, non_blocking=True)  # PyTorch keeps `pinned` until that is done
        torch.cuda.current_stream(self.device).synchronize()
        return rows


class _Buffers:
    """A pool of memory for batches on a CPU, which is reused once a batch and all its views are freed.

    Without it the loader takes 1.2 to 1.7 times as long for batches above 32 MB, whose memory malloc returns to the
    system. PyTorch itself caches pinned memory.
    """

    def __init__(self) -> None:
        self._unused: deque[np.ndarray] = deque(maxlen=BUFFERS)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array of this shape."""
        size = math.prod(shape)
        memory = self._unused.pop() if self._unused else np.empty(0, dtype=np.uint8)
        if memory.size < size:
            memory = np.empty(size, dtype=np.uint8)
        array = np.frombuffer(memory, dtype=np.uint8, count=size).reshape(shape)
        weakref.finalize(array, self._unused.append, memory).atexit = False
        return array


def mirror(images: np.ndarray, flips: np.ndarray) -> None:
    """Mirror the images (uint8 [n, H, W, C]) left to right, in place, for which flips (bool [n]) is true."""
    which = flips.nonzero()[0]
    images[which] = torch.from_numpy(images[which]).flip(2).numpy()  # NumPy takes 5 to 20 times longer
