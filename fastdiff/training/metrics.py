"""The loss of a micro-batch, and means of losses that are summed on the device and read once per log interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion

_MOST_TERMS = 3
"""Largest number of terms that a loss has."""


class LossResult(NamedTuple):
    """The loss of a micro-batch, and the contribution of each image."""

    loss: Tensor
    """Scalar to be minimised: the weighted mean."""
    t: Tensor
    """Timesteps [B] int64."""
    weights: Tensor
    """Importance weights [B] float32 of the timesteps."""
    terms: dict[str, Tensor]
    """Unweighted terms [B] of each image: "loss", and others of the objective's `loss_terms`."""


class LossMeter:
    """Means of the loss terms since the last read, overall and by quartile of the timestep, over all ranks.

    They are what improved-diffusion logs: values times importance weights; loss_q0 is the least noisy quarter. Values
    that are not finite stay out of the means; non-finite losses are counted. names are those of the terms, "loss"
    first, of which a loss has the first one, two or all.
    """

    def __init__(
        self, num_timesteps: int, device: torch.device, names: Sequence[str] = GaussianDiffusion.loss_terms
    ) -> None:
        self.num_timesteps, self.names = num_timesteps, names
        # [term, q0..q3 and all, sum/count/number of non-finite values]
        self.sums = torch.zeros(_MOST_TERMS, 5, 3, dtype=torch.float64, device=device)

    @staticmethod
    def fits(sums: object) -> bool:
        """Whether `sums` has the shape that `state_dict` gives it, for any number of ranks."""
        return isinstance(sums, Tensor) and sums.ndim == 4 and sums.shape[1:] == (_MOST_TERMS, 5, 3)

    def add(self, t: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """Add the terms [B] of a micro-batch at timesteps t [B]."""
        ops.add_losses_(
            self.sums, [terms[name] for name in self.names if name in terms], t, weights, self.num_timesteps
        )

    def read(self) -> dict[str, float]:
        """{"loss": …, "loss_q0": …} without terms and quartiles that had no values; then start over. Collective.

        bad_losses, if there are any, is the number of images whose loss was not finite.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.tolist()
        self.sums.zero_()
        metrics = {}
        for name, rows in zip(self.names, sums, strict=True):
            for suffix, (total, count, _) in zip(("_q0", "_q1", "_q2", "_q3", ""), rows, strict=True):
                if count:
                    metrics[name + suffix] = total / count
        if bad := sums[0][4][2]:
            metrics["bad_losses"] = bad
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The sums since the last read, one row per rank. Collective."""
        rows = [self.sums]
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = [torch.empty_like(self.sums) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, self.sums)
        return {"sums": torch.stack(rows).cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from this rank's row; if the number of ranks has changed, rank 0 takes the sum of all rows."""
        rows = state["sums"]
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if len(rows) == world_size:
            self.sums.copy_(rows[rank])
        elif rank == 0:
            self.sums.copy_(rows.sum(dim=0))
        else:
            self.sums.zero_()
