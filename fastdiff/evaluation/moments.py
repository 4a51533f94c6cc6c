"""Means and covariances of features, summed without rounding.

Neither the batches in which features arrive nor the processes that they are shared between change a bit of the result.
Features are rounded to multiples of `QUANTUM`, so that all sums are sums of whole numbers: those of a slab of rows are
computed in float64, which is exact below 2^53, and added in int64. The rounding adds a variance of QUANTUM^2 / 12 =
2e-11 to each feature; those of Inception have variances of about 0.05.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.errors import UserError

QUANTUM = 2.0**-16
SMALLEST = 2.0**-4
"""The largest feature of a set must reach this, so that rounding to multiples of QUANTUM doesn't matter."""
_EXACT = 2**53
"""Whole numbers below it are exact in float64."""
_FULL = 2**63
"""Whole numbers below it fit into int64."""


class Moments(NamedTuple):
    """Mean [D] and unbiased covariance [D, D] of features, float64 on the CPU, and the number of images."""

    mean: Tensor
    covariance: Tensor
    images: int
    """0 where a file doesn't say it."""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features [N, D] that are all in memory, N at least 2."""
        x = features.double()
        return cls(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), len(x))


class MomentSums:
    """Sums of features and of their products, from which `moments` computes mean and covariance."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.int64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.int64, device=device)
        self._largest = 0  # absolute value of a feature, in quanta
        self._bound = 0  # no sum of products is larger

    def add(self, features: Tensor) -> None:
        """Add the finite features [B, D] of B images. Raises UserError for features that are too large."""
        quanta = (features.double() / QUANTUM).round()
        largest = int(quanta.abs().max())
        self._largest = max(self._largest, largest)
        self.count += len(quanta)
        self._bound += len(quanta) * largest**2
        if self._bound >= _FULL or largest**2 >= _EXACT:
            raise UserError(
                f"the features reach {largest * QUANTUM:.3g}, which is too large for exact sums over {self.count} "
                "images; scale them to about 1"
            )
        self._sum += quanta.sum(dim=0).long()
        for slab in quanta.split(_EXACT // max(largest**2, 1)):
            self._products += (slab.T @ slab).long()

    def reduce(self, device: torch.device) -> None:
        """Add up the sums of all processes. Collective; `device` is where the process group's tensors are."""
        counted = torch.tensor([self.count], dtype=torch.int64, device=device)
        for tensor in (counted, sums := self._sum.to(device), products := self._products.to(device)):
            dist.all_reduce(tensor)
        bounds: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(bounds, (self._bound, self._largest))
        self._bound, self._largest = sum(bound for bound, _ in bounds), max(largest for _, largest in bounds)
        if self._bound >= _FULL:
            raise UserError("the features are too large for exact sums over all images; scale them to about 1")
        self.count, self._sum, self._products = int(counted), sums, products

    def moments(self) -> Moments:
        """The mean and covariance of what was added. UserError for fewer than 2 images, and for tiny features."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}")
        if self._largest * QUANTUM < SMALLEST:
            raise UserError(
                f"no feature exceeds {self._largest * QUANTUM:.3g}, and they are rounded to multiples of "
                f"{QUANTUM:.3g}; scale them to about 1"
            )
        total, products = self._sum.cpu(), self._products.cpu()
        centre = torch.div(total, self.count, rounding_mode="floor")
        # Products about `centre` are exact: int64 wraps around in between, and the result fits.
        products = products - centre.outer(total) - total.outer(centre) + self.count * centre.outer(centre)
        rest = (total - self.count * centre).double()
        covariance = (products.double() - rest.outer(rest) / self.count) / (self.count - 1) * QUANTUM**2
        return Moments((centre.double() + rest / self.count) * QUANTUM, covariance, self.count)
