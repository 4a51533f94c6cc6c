"""The default loader: NVIDIA DALI decodes and resizes, on the GPU where the batches are wanted there.

Files that DALI decodes as Pillow does (see headers.py) go through its pipeline, which follows the reference recipe
stage by stage; the others come from the reference itself and are put between them. Order, labels and replacements are
the reference loader's, because both take them from loader.py and reader.py.

How far the pixels are from the reference's, in levels of 0 to 255, with DALI's CPU backend (DALI 2.4, Pillow 13):

    pictures                            target      mean   rms    99.9%  largest
    PNG, or JPEG already at the target  any size    0      0      0      0
    250 photos, about 500x375, JPEG     64x64       0.33   0.61   3      24
    the same                            256x256     0.18   0.43   1      25

The largest lie on the middle line of odd sides, which Pillow's box filter blends and this leaves out. One cubic resize
from the full size would be off by 2.6 on average at 64x64, a chain of plain linear halvings by 2.1. On a GPU, nvJPEG's
own rounding is added.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.images.image_files import plain_size
from fastdiff.images.loader import Finish, Loader, Request, to_device
from fastdiff.images.pixels import Recipe, plan

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A file for DALI."""

    data: np.ndarray
    """[bytes] uint8."""
    size: tuple[int, int]
    """Height and width in the file."""
    recipe: Recipe


Source = tuple[int, Encoded | np.ndarray]
"""Index of an image, and its file for DALI or its reference pixels."""


class DaliLoader(Loader):
    """Batches decoded by DALI: the driver runs its pipeline, fed by threads that read files."""

    loader_name = "dali"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pipeline: Pipeline | None = None
        self._failed: deque[Pipeline | None] = deque(maxlen=2)
        self._halvings = 1
        self._undecodable: set[int] = set()  # by DALI, though Pillow can

    def close(self) -> None:
        super().close()
        self._pipeline = None

    def _start(self, request: Request) -> Finish:
        def fetch(rows: range) -> list[Source]:
            return [self._fetch(int(request.indices[row])) for row in rows]

        parts = [self._threads.submit(fetch, rows) for rows in self._chunks(len(request.indices))]
        return lambda: self._assemble(parts, request.flips)

    def _fetch(self, index: int) -> Source:
        """Read one image, as what it has to be for DALI. Runs in the reading threads."""

        def prepare(candidate: int, data: bytes) -> Encoded | np.ndarray:
            size = plain_size(data) if self._reader.channels != 4 and candidate not in self._undecodable else None
            if size is None:
                return self._reader.reference(candidate, data)
            return Encoded(np.frombuffer(data, dtype=np.uint8), size, plan(*size, self._reader.size_hw))

        return self._reader.read(index, prepare)

    def _assemble(self, parts: list[Future[list[Source]]], flips: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Wait for the files, decode those for DALI, and lay all in their rows. Runs in the driver."""
        sources = [source for part in parts for source in part.result()]
        sources, decoded = self._decode(sources)
        images = torch.empty(
            (len(sources), *self._reader.size_hw, self._reader.channels), dtype=torch.uint8, device=self.device
        )
        plain = [row for row, (_, source) in enumerate(sources) if isinstance(source, Encoded)]
        other = {row: source for row, (_, source) in enumerate(sources) if isinstance(source, np.ndarray)}
        if plain:
            images[self._rows(plain)] = _to_gray(decoded) if self._reader.channels == 1 else decoded
        if other:
            pixels = torch.from_numpy(np.stack(list(other.values())))
            images[self._rows(list(other))] = to_device(pixels, self.device)
        if flips.any():
            mirrored = self._rows(flips.nonzero()[0].tolist())
            images[mirrored] = images[mirrored].flip(2)
        return images, np.array([index for index, _ in sources], dtype=np.int64)

    def _rows(self, rows: list[int]) -> Tensor:
        return to_device(torch.tensor(rows), self.device)

    def _decode(self, sources: list[Source]) -> tuple[list[Source], Tensor]:
        """Decode the files among the sources: uint8 [n, H, W, 3] of those that are files in the sources returned.

        One that DALI refuses fails its whole batch. Halving the batch finds it, and it is read anew: from the
        reference, or if that refuses it too, as its replacement.
        """
        encoded = [source for _, source in sources if isinstance(source, Encoded)]
        if not encoded:
            return sources, torch.empty((0, *self._reader.size_hw, 3), dtype=torch.uint8, device=self.device)
        try:
            return sources, self._run(encoded)
        except (RuntimeError, ValueError, IndexError) as error:  # DALI keeps the type its operator raised
            # DALI's pipelines don't survive an error. Threads of this one may still be at work on other files: when it
            # goes at once the process has been seen to crash, so it goes with the second next.
            self._failed.append(self._pipeline)
            self._pipeline = None
            if len(sources) == 1:
                return self._decode([self._refetch(sources[0][0], error)])
        middle = len(sources) // 2
        first, first_pixels = self._decode(sources[:middle])
        second, second_pixels = self._decode(sources[middle:])
        return first + second, torch.cat([first_pixels, second_pixels])

    def _refetch(self, index: int, error: Exception) -> Source:
        shown, _ = self._reader.read(index, self._reader.reference)
        if shown == index and index not in self._undecodable:
            self._undecodable.add(index)
            reason = " ".join(str(error).split())[:300]  # of many lines
            logger.warning("DALI can't decode %s, Pillow does: %s", self._reader.listing.path(index), reason)
        return self._fetch(index)

    def _run(self, encoded: list[Encoded]) -> Tensor:
        """Files → uint8 [n, H, W, 3] on the device, copied out of DALI's memory."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        halvings = max(len(item.recipe.halvings) for item in encoded)
        if self._pipeline is None or halvings > self._halvings:
            self._halvings = max(halvings, self._halvings)
            self._pipeline = self._build()
        (pixels,) = self._pipeline.run(
            encoded=[item.data for item in encoded],
            halvings=[np.int32(len(item.recipe.halvings)) for item in encoded],
            sizes=[_sizes(item, self._halvings) for item in encoded],
            cover=[np.array(item.recipe.cover, dtype=np.float32) for item in encoded],
            corner=[np.array(item.recipe.corner, dtype=np.int32) for item in encoded],
        )
        images = torch.empty((len(encoded), *self._reader.size_hw, 3), dtype=torch.uint8, device=self.device)
        feed_ndarray(pixels.as_tensor(), images, cuda_stream=self._side)
        self._wait()  # the pipeline's next run writes over its pixels
        return images

    def _build(self) -> Pipeline:
        """The reference recipe in DALI's operators, for pictures that are halved at most self._halvings times."""
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"
        height, width = self._reader.size_hw
        stages = self._halvings

        @pipeline_def(enable_conditionals=True)
        def recipe():  # unannotated, for type checkers misread DALI's operators
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            halvings = fn.external_source(name="halvings", dtype=types.INT32, ndim=0)
            sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=3)
            cover = fn.external_source(name="cover", dtype=types.FLOAT, ndim=1)
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            for stage in range(stages):
                if halvings > stage:
                    # Pillow's box filter drops (nearly) the middle line of an odd side, and so does this
                    images = fn.resize(images, size=sizes[stage, 0], interp_type=types.INTERP_NN, subpixel_scale=False)
                    means = fn.resize(
                        images,
                        size=sizes[stage, 1],
                        interp_type=types.INTERP_LINEAR,
                        antialias=False,
                        subpixel_scale=False,
                        dtype=types.FLOAT,
                    )
                    # Pillow rounds .5 up, after rows and again after columns: half a level more on average
                    images = fn.cast(means + np.float32(0.25), dtype=types.UINT8)
            images = fn.resize(images, size=cover, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False)
            return fn.slice(images, start=corner, shape=[height, width], axes=(0, 1))

        pipeline = recipe(
            batch_size=self.batch_size,
            num_threads=self._num_workers,
            device_id=self.device.index if on_gpu else None,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


def _sizes(item: Encoded, stages: int) -> np.ndarray:
    """[stages, 2, 2] float32: (height, width) made even and halved, of each stage; 0 past the file's last."""
    sizes = np.zeros((stages, 2, 2), dtype=np.float32)
    before = item.size
    for stage, after in enumerate(item.recipe.halvings):
        sizes[stage] = (before[0] // 2 * 2, before[1] // 2 * 2), after
        before = after
    return sizes


def _to_gray(images: Tensor) -> Tensor:
    """[n, H, W, 3] → [n, H, W, 1] uint8 as Pillow converts it: ITU-R 601 in 16-bit fixed point."""
    red, green, blue = images.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(-1)
