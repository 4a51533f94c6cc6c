"""The base class of the image loaders, and `PillowLoader`, which decodes the reference pixels.

The base class implements the order of the samples, the shares of the ranks, prefetching and resuming. Several threads
read and decode images. Another thread, the driver, assembles the batches in order and copies them to the GPU, if there
is one, on its own CUDA stream. A batch is returned once it is on the device, so neither the caller's thread nor its
stream waits for a copy.
"""

from __future__ import annotations

import functools
import itertools
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.images.listing import Listing
from fastdiff.images.order import Order, share
from fastdiff.images.reader import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: Tensor
    """[b, H, W, C] uint8 on the loader's device."""
    labels: Tensor
    """[b] int64 on the loader's device."""
    positions: Tensor
    """[b] int64 on the CPU: each sample's position in the endless sequence, or for `once()` in the listing."""


@dataclass(frozen=True)
class Request:
    """The samples of a batch to read: positions [b] int64, indices in the listing [b] int64, flips [b] bool, and the
    numbers of random crops [b, 3] float64 (see `Order.crops`), None without."""

    positions: np.ndarray
    indices: np.ndarray
    flips: np.ndarray
    crops: np.ndarray | None = None


Finish = Callable[[], tuple[Tensor, np.ndarray]]
"""Waits for requested samples. Returns the images, uint8 [b, H, W, C] on the CPU or the device, and their indices,
int64 [b], after replacements. The driver calls it on its CUDA stream."""


class Loader(ABC):
    """An endless iterator over batches; `once()` iterates over the images a single time.

    At least two batches are decoded ahead of the caller; `state_dict()` counts only those that were returned.
    """

    loader_name: str

    def __init__(
        self,
        reader: Reader,
        order: Order,
        *,
        random_flip: bool,
        random_crop: bool = False,
        num_workers: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._reader, self._order, self._random_flip, self._random_crop = reader, order, random_flip, random_crop
        self._rank, self._world_size = rank, world_size
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="images")
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="batches")
        # The high priority lets its small copies and kernels run between the caller's large ones.
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._num_workers = num_workers
        self._batches_ahead = max(2, -(-2 * num_workers // self.batch_size))
        self._position = 0
        self._stream: Iterator[Batch] | None = None

    @abstractmethod
    def _start(self, request: Request) -> Finish:
        """Begin to read and decode a batch in the background."""

    @property
    def batch_size(self) -> int:
        """Samples per batch on this rank."""
        return self._order.batch_size // self._world_size

    @property
    def num_images(self) -> int:
        return len(self._reader.listing.names)

    @property
    def class_names(self) -> list[str]:
        return self._reader.listing.class_names

    @property
    def listing(self) -> Listing:
        return self._reader.listing

    @property
    def labels(self) -> np.ndarray:
        """Class of each image in the listing's order, int64 [num_images]."""
        return self._reader.listing.labels

    @property
    def unreadable(self) -> list[Path]:
        """The images found unreadable so far, which are replaced."""
        return self._reader.unreadable

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._read_ahead(self._requests(self._position))
        try:
            batch = next(self._stream)
        except BaseException:
            self._stream = None  # the next call starts again at the same position
            raise
        self._position += self._order.batch_size
        return batch

    def once(self) -> Iterator[Batch]:
        """Iterate over this rank's share of the listing, [rank::world_size], in order, without flips and random crops.

        The last batch may be smaller. The position in the endless sequence does not change.
        """
        mine = np.arange(self._rank, self.num_images, self._world_size, dtype=np.int64)
        parts = (mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size))
        return self._read_ahead(Request(part, part, np.zeros(len(part), dtype=bool)) for part in parts)

    def state_dict(self) -> dict[str, Any]:
        """The state from which a run with any number of ranks continues at the next sample."""
        return {
            "position": self._position,
            "num_images": self.num_images,
            "fingerprint": self._reader.listing.fingerprint,
            "labels": self._reader.listing.hash_of_labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`. Logs a warning if the folder's images or their classes have changed."""
        if state["fingerprint"] != self._reader.listing.fingerprint:
            logger.warning(
                "the images below %s are not those that the run began with (%d then, %d now): "
                "the order of the samples changes from here on",
                self._reader.listing.root,
                state["num_images"],
                self.num_images,
            )
        elif state.get("labels") not in (None, self._reader.listing.hash_of_labels):  # version 0.1 has none
            logger.warning(
                "the images below %s have other classes than those that the run began with", self._reader.listing.root
            )
        self._position = int(state["position"])
        self._stream = None

    def reseed(self, seed: int) -> None:
        """Continue at the same position in the sequence of another seed."""
        self._order = replace(self._order, seed=seed)
        self._stream = None

    def close(self) -> None:
        """Stop the threads and discard prefetched batches."""
        self._stream = None
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._driver.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _requests(self, start: int) -> Iterator[Request]:
        for position in itertools.count(start, self._order.batch_size):
            positions = share(position, self._order.batch_size, self._rank, self._world_size)
            flips = self._order.flips(positions) if self._random_flip else np.zeros(len(positions), dtype=bool)
            crops = self._order.crops(positions) if self._random_crop else None
            yield Request(positions, self._order.indices(positions), flips, crops)

    def _read_ahead(self, requests: Iterator[Request]) -> Iterator[Batch]:
        waiting = deque(map(self._begin, itertools.islice(requests, self._batches_ahead)))
        while waiting:
            waiting.extend(map(self._begin, itertools.islice(requests, 1)))
            batch = waiting.popleft().result()
            if self._side is not None:  # the driver's stream allocated the memory, and the caller's stream uses it
                stream = torch.cuda.current_stream(self.device)
                batch.images.record_stream(stream)
                batch.labels.record_stream(stream)
            yield batch

    def _begin(self, request: Request) -> Future[Batch]:
        return self._driver.submit(self._deliver, request, self._start(request))

    def _deliver(self, request: Request, finish: Finish) -> Batch:
        """Wait until a batch is on the device. Runs in the driver."""
        with self._on_side():
            images, indices = finish()
            images = to_device(images, self.device)
            labels = to_device(torch.from_numpy(self.labels[indices]), self.device)
            self._wait()
        return Batch(images, labels, torch.from_numpy(request.positions))

    def _on_side(self) -> AbstractContextManager[object]:
        """A context in which the driver's CUDA stream is current; on a CPU it does nothing."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _wait(self) -> None:
        """Wait for the driver's CUDA stream without spinning, as `Stream.synchronize` would."""
        if self._side is not None:
            event = torch.cuda.Event(blocking=True)
            event.record(self._side)
            event.synchronize()

    def _chunks(self, count: int) -> list[range]:
        """Split range(count) into tasks: enough to balance the threads, few enough to keep the overhead small."""
        size = max(1, min(8, count // (2 * self._num_workers)))
        return [range(i, min(i + size, count)) for i in range(0, count, size)]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; copies to a GPU are asynchronous."""
    if device.type != "cuda" or values.is_cuda:  # only CPU memory can be pinned
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


class PillowLoader(Loader):
    """Batches of reference pixels, decoded with Pillow."""

    loader_name = "pillow"

    def _start(self, request: Request) -> Finish:
        count = len(request.indices)
        shape = (count, *self._reader.size_hw, self._reader.channels)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels, shown = images.numpy(), np.empty(count, dtype=np.int64)

        def decode(rows: range) -> None:
            for row in rows:
                decode_row = self._reader.reference
                if request.crops is not None:
                    decode_row = functools.partial(decode_row, crop=request.crops[row])
                shown[row], image = self._reader.read(int(request.indices[row]), decode_row)
                pixels[row] = image[:, ::-1] if request.flips[row] else image

        parts = [self._threads.submit(decode, rows) for rows in self._chunks(count)]

        def finish() -> tuple[Tensor, np.ndarray]:
            for part in parts:
                part.result()
            return images, shown

        return finish
