"""The default loader: NVIDIA DALI decodes and resizes the images, on the GPU if the loader's device is one.

Files that DALI decodes as Pillow does (`image_files.plain_size`) go through its pipeline, which follows the reference
recipe step by step; all others are decoded by Pillow. Order, labels and replacements are those of the Pillow loader.

Differences from the reference pixels, in levels of 0 to 255, with DALI's CPU backend (DALI 2.4, Pillow 13):

    images                              target      mean   rms    99.9%  largest
    PNG, or JPEG already at the target  any size    0      0      0      0
    250 photos, about 500x375, JPEG     64x64       0.33   0.61   3      24
    the same                            256x256     0.18   0.43   1      25

The largest differences lie on the middle line of odd sides, which Pillow's box filter blends and this pipeline omits.
With a single cubic resize the mean at 64x64 would be 2.6, with a chain of linear halvings 2.1. On a GPU, nvJPEG's
rounding adds to the differences.
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
from fastdiff.images.pixels import Recipe, recipe_for

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """An image file that DALI is to decode."""

    data: np.ndarray
    """[bytes] uint8."""
    size: tuple[int, int]
    """Height and width of the image in the file."""
    recipe: Recipe


Source = tuple[int, Encoded | np.ndarray]
"""The index of an image, and either its encoded file for DALI or its reference pixels."""


class DaliLoader(Loader):
    """Batches decoded by DALI. Threads read the files, and the driver runs DALI's pipeline."""

    loader_name = "dali"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pipeline: Pipeline | None = None
        self._failed: deque[Pipeline | None] = deque(maxlen=2)
        self._halvings = 1
        self._undecodable: set[int] = set()  # files that Pillow can decode and DALI can't

    def close(self) -> None:
        super().close()
        self._pipeline = None

    def _start(self, request: Request) -> Finish:
        def fetch(rows: range) -> list[Source]:
            return [self._fetch(int(request.indices[row])) for row in rows]

        parts = [self._threads.submit(fetch, rows) for rows in self._chunks(len(request.indices))]
        return lambda: self._assemble(parts, request.flips)

    def _fetch(self, index: int) -> Source:
        """Read one image, and decode it unless DALI will do that. Runs in the reading threads."""

        def prepare(candidate: int, data: bytes) -> Encoded | np.ndarray:
            size = plain_size(data) if self._reader.channels != 4 and candidate not in self._undecodable else None
            if size is None:
                return self._reader.reference(candidate, data)
            return Encoded(np.frombuffer(data, dtype=np.uint8), size, recipe_for(*size, self._reader.size_hw))

        return self._reader.read(index, prepare)

    def _assemble(self, parts: list[Future[list[Source]]], flips: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Wait for the files, decode those for DALI, and write all images to their rows. Runs in the driver."""
        sources = [source for part in parts for source in part.result()]
        sources, decoded = self._decode(sources)
        images = self._empty(len(sources), self._reader.channels)
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

    def _empty(self, count: int, channels: int) -> Tensor:
        return torch.empty((count, *self._reader.size_hw, channels), dtype=torch.uint8, device=self.device)

    def _rows(self, rows: list[int]) -> Tensor:
        return to_device(torch.tensor(rows), self.device)

    def _decode(self, sources: list[Source]) -> tuple[list[Source], Tensor]:
        """Decode the files among the sources. Returns the sources after replacements, and uint8 [n, H, W, 3] of their
        n files.

        A file that DALI can't decode makes its whole batch fail. It is found by bisection and decoded with Pillow, or
        replaced if that fails too.
        """
        encoded = [source for _, source in sources if isinstance(source, Encoded)]
        if not encoded:
            return sources, self._empty(0, 3)
        try:
            return sources, self._run(encoded)
        except (RuntimeError, ValueError, IndexError) as error:  # DALI keeps the type that its operator raised
            # A pipeline can't be used after an error. Its threads may still be decoding other files, and freeing it
            # immediately has crashed the process, so it is freed at the second failure after this one.
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
            reason = " ".join(str(error).split())[:300]  # it has many lines
            logger.warning("DALI can't decode %s, Pillow does: %s", self._reader.listing.path(index), reason)
        return self._fetch(index)

    def _run(self, encoded: list[Encoded]) -> Tensor:
        """Decode files to uint8 [n, H, W, 3] on the device."""
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
        images = self._empty(len(encoded), 3)
        feed_ndarray(pixels.as_tensor(), images, cuda_stream=self._side)
        self._wait()  # the pipeline's next run overwrites its output
        return images

    def _build(self) -> Pipeline:
        """The reference recipe as a DALI pipeline, for images that are halved at most self._halvings times."""
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"
        height, width = self._reader.size_hw
        stages = self._halvings

        @pipeline_def(enable_conditionals=True)
        def recipe():  # not annotated, because type checkers misinterpret DALI's operators
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
                    # Pillow's box filter almost ignores the middle line of an odd side; this drops it
                    images = fn.resize(images, size=sizes[stage, 0], interp_type=types.INTERP_NN, subpixel_scale=False)
                    means = fn.resize(
                        images,
                        size=sizes[stage, 1],
                        interp_type=types.INTERP_LINEAR,
                        antialias=False,
                        subpixel_scale=False,
                        dtype=types.FLOAT,
                    )
                    # Pillow rounds .5 up after rows and again after columns, which adds half a level on average
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
    """float32 [stages, 2, 2]: (height, width) of each stage, first made even, then halved; 0 after the last stage."""
    sizes = np.zeros((stages, 2, 2), dtype=np.float32)
    before = item.size
    for stage, after in enumerate(item.recipe.halvings):
        sizes[stage] = (before[0] // 2 * 2, before[1] // 2 * 2), after
        before = after
    return sizes


def _to_gray(images: Tensor) -> Tensor:
    """Convert uint8 [n, H, W, 3] to [n, H, W, 1] as Pillow does: ITU-R 601 in 16-bit fixed point."""
    red, green, blue = images.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(-1)
