"""The order of the samples: an endless sequence that all ranks of a run share.

The seed and a position k (0, 1, 2, …) in the sequence determine an image, whether it is mirrored and how it is cropped.
Global batch s consists of positions [s·B, (s+1)·B), of which rank r of W takes every W-th, starting with the r-th. So a
run can continue from a stored position with any number of ranks. Batches may extend from one epoch into the next, so no
data set is too small and all ranks have the same number of samples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The sequence of samples of a data set with num_images images, in global batches of batch_size."""

    num_images: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    """Leave out the last images of an epoch that don't fill a batch, unless there is no full batch at all."""

    @property
    def epoch_length(self) -> int:
        if self.drop_last and self.num_images >= self.batch_size:
            return self.num_images // self.batch_size * self.batch_size
        return self.num_images

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The index in the listing of the image at each position; both are int64 [n]."""
        epochs, offsets = np.divmod(positions, self.epoch_length)
        if not self.shuffle:
            return offsets
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.num_images, self.seed, int(epoch))[offsets[here]]
        return indices

    def flips(self, positions: np.ndarray) -> np.ndarray:
        """Whether the sample at each position is mirrored, bool [n], with probability 1/2."""
        return self._hashes(positions) >= np.uint64(2**63)

    def crops(self, positions: np.ndarray) -> np.ndarray:
        """Uniform numbers in [0, 1), float64 [n, 3], that place the random crop of the sample at each position."""
        hashes = self._hashes(positions)
        return np.stack([_mix(hashes + np.uint64(i)) >> np.uint64(11) for i in (1, 2, 3)], axis=1) / 2.0**53

    def _hashes(self, positions: np.ndarray) -> np.ndarray:
        seed = _mix(np.array([self.seed % 2**64], np.uint64))
        return _mix(positions.astype(np.uint64) + seed)


def share(start: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The positions, int64 [n], of a rank's share of the global batch that starts at position `start`."""
    return np.arange(start + rank, start + batch_size, world_size, dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])))
    permutation = generator.permutation(num_images)
    permutation.setflags(write=False)  # because the cache returns it to several callers
    return permutation


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers one-to-one, element by element (SplitMix64, https://doi.org/10.1145/2660193.2660195)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around; numpy scalars would warn
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
