"""The reference loader: Pillow decodes in threads (it lets go of Python's lock while it does)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.images.loader import Finish, Loader, Request


class PillowLoader(Loader):
    """Batches of reference pixels."""

    loader_name = "pillow"

    def _start(self, request: Request) -> Finish:
        count = len(request.indices)
        channels = self._reader.channels
        pinned = self.device.type == "cuda"
        images = torch.empty((count, *self._reader.size_hw, channels), dtype=torch.uint8, pin_memory=pinned)
        pixels, shown = images.numpy(), np.empty(count, dtype=np.int64)

        def decode(rows: range) -> None:
            for row in rows:
                shown[row], image = self._reader.read(int(request.indices[row]), self._reader.reference)
                pixels[row] = image[:, ::-1] if request.flips[row] else image

        parts = [self._threads.submit(decode, rows) for rows in self._chunks(count)]

        def finish() -> tuple[Tensor, np.ndarray]:
            for part in parts:
                part.result()
            return images, shown

        return finish
