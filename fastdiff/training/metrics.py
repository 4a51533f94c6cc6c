"""Sums of losses on the device, read once per log interval."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_TERMS = ("loss", "mse", "vb")


class LossMeter:
    """Means of the loss terms since the last read, overall and by quartile of the timestep, over all ranks.

    As improved-diffusion logs them: values weighted by the importance weights; loss_q0 the least noisy quarter. Values
    that are not finite stay out of the means; of the losses they are counted.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        # [term, q0..q3 and all, sum/count/how many were not finite]
        self.sums = torch.zeros(len(_TERMS), 5, 3, dtype=torch.float64, device=device)
        self._columns = torch.arange(5, device=device)[:, None]

    @staticmethod
    def fits(sums: object) -> bool:
        """Whether it is what `state_dict` gives, of any number of ranks."""
        return isinstance(sums, Tensor) and sums.ndim == 4 and sums.shape[1:] == (len(_TERMS), 5, 3)

    def add(self, t: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """The terms [B] of a micro-batch at timesteps t [B]."""
        # All terms at once, and no more operations than needed: on a GPU each is a launch, in every micro-batch.
        rows = [i for i, name in enumerate(_TERMS) if name in terms]
        values = (torch.stack([terms[_TERMS[i]].detach() for i in rows]) * weights).double()
        finite = values.isfinite()
        counted = torch.stack([values.where(finite, 0.0), finite, ~finite], dim=2)  # [term, B, 3]
        quartile = 4 * t // self.num_timesteps
        member = (quartile == self._columns) | (self._columns == 4)  # [5, B]
        added = (counted[:, None] * member[:, :, None]).sum(dim=2)  # [term, 5, 3]
        for i, row in zip(rows, added, strict=True):
            self.sums[i] += row

    def read(self) -> dict[str, float]:
        """{"loss": …, "loss_q0": …}; terms and quartiles without values are left out. Starts over. Collective.

        bad_losses, where there are any, is the number of images whose loss was not finite.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
        sums = self.sums.tolist()
        self.sums.zero_()
        metrics = {}
        for name, rows in zip(_TERMS, sums, strict=True):
            for suffix, (total, count, _) in zip(("_q0", "_q1", "_q2", "_q3", ""), rows, strict=True):
                if count:
                    metrics[name + suffix] = total / count
        if bad := sums[_TERMS.index("loss")][4][2]:
            metrics["bad_losses"] = bad
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The sums since the last read, a row per rank. Collective."""
        rows = [self.sums]
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = [torch.empty_like(self.sums) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, self.sums)
        return {"sums": torch.stack(rows).cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up this rank's row; of another number of ranks, the first takes them all."""
        rows = state["sums"]
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(rows) == world_size:
            self.sums.copy_(rows[rank])
        elif rank == 0:
            self.sums.copy_(rows.sum(dim=0))
        else:
            self.sums.zero_()
