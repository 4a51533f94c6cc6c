"""Sums of losses on the device, read once per log interval."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_TERMS = ("loss", "mse", "vb")


class LossMeter:
    """Means of the loss terms since the last read, overall and by quartile of the timestep, over all ranks.

    As improved-diffusion logs them: values weighted by the importance weights; loss_q0 the least noisy quarter.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        self.sums = torch.zeros(
            len(_TERMS), 5, 2, dtype=torch.float64, device=device
        )  # [term, q0..q3 and all, sum/count]

    def add(self, t: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """The terms [B] of a micro-batch at timesteps t [B]."""
        quartile = 4 * t // self.num_timesteps
        for i, name in enumerate(_TERMS):
            if name in terms:
                value = (terms[name].detach() * weights).double()
                value = torch.stack([value, torch.ones_like(value)], dim=1)
                self.sums[i].index_add_(0, quartile, value)
                self.sums[i, 4] += value.sum(dim=0)

    def read(self) -> dict[str, float]:
        """{"loss": …, "loss_q0": …}; terms and quartiles without values are left out. Starts over. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.tolist()
        self.sums.zero_()
        metrics = {}
        for name, rows in zip(_TERMS, sums, strict=True):
            for suffix, (total, count) in zip(("_q0", "_q1", "_q2", "_q3", ""), rows, strict=True):
                if count:
                    metrics[name + suffix] = total / count
        return metrics
