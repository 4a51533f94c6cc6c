"""Which image comes when: an endless stream of samples that all ranks of a run share.

Stream position k (0, 1, 2, …) stands for one image and whether it is mirrored; both follow from the seed and k alone.
Global batch s is positions [s·B, (s+1)·B), and rank r of W takes every W-th of them from the r-th on. So a run that
knows how many positions it has consumed can go on anywhere, with any number of ranks. Batches run over the border of
two epochs, hence no folder is too small and no rank runs short.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The stream over a data set of num_images, for global batches of batch_size."""

    num_images: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    """An epoch leaves out the images that don't fill a batch (unless it has no whole batch at all)."""

    @property
    def epoch_length(self) -> int:
        if self.drop_last and self.num_images >= self.batch_size:
            return self.num_images // self.batch_size * self.batch_size
        return self.num_images

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Index in the listing of the image at each stream position; both int64 [n]."""
        epochs, offsets = np.divmod(positions, self.epoch_length)
        if not self.shuffle:
            return offsets
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.num_images, self.seed, int(epoch))[offsets[here]]
        return indices

    def flips(self, positions: np.ndarray) -> np.ndarray:
        """Whether the sample at each stream position is to be mirrored; bool [n], half of them true."""
        return (
            _mix(positions.astype(np.uint64) + _mix(np.array([self.seed % 2**64], np.uint64))) >> np.uint64(63)
        ) == 1


def share(start: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The stream positions (int64) that a rank takes of the global batch that begins at position `start`."""
    return np.arange(start + rank, start + batch_size, world_size, dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])))
    permutation = generator.permutation(num_images)
    permutation.setflags(write=False)  # callers share it
    return permutation


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters neighbouring numbers (SplitMix64, https://doi.org/10.1145/2660193.2660195)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around; numpy scalars would warn
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
