"""The base class of the image sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.images.cache.format import RECIPE

CHANNELS = (1, 3)
"""Numbers of channels that a set may have: gray and RGB."""


class ImageSet(ABC):
    """Images of one size, uint8, in a fixed order. They are read anew by each call of `batches`."""

    def __init__(
        self, path: Path, count: int, size_hw: tuple[int, int], channels: int, device: torch.device, limit: int | None
    ) -> None:
        """size_hw is the size of the images in the set's files."""
        self.path = path
        """The set as the user named it, for messages."""
        self.count = count if limit is None else min(limit, count)
        self.shape = (*size_hw, channels)
        """Height, width and channels of the images that `batches` returns."""
        self.device = device
        self.lossy = ""
        """The lossy formats of the set's files, such as "JPEG"; empty for others and for arrays."""
        self.resized = ""
        """How the images were resized; empty where none was."""

    @abstractmethod
    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Iterate over a rank's share, in order, in batches of batch_size; the last may be smaller.

        Returns images [b, H, W, C] uint8 on the device and their positions [b] int64 in the set. The shares of all
        ranks together hold each image once. Raises UserError for images that can't be read.
        """

    def _resize_to(self, size_hw: tuple[int, int]) -> None:
        self.shape = (*size_hw, self.shape[2])
        self.resized = f"resized to {size_hw[0]}x{size_hw[1]} pixels: {RECIPE}"
