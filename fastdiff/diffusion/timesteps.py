"""Timestep samplers for training. Their state is on the device: sampling and updating don't copy to the host."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff import ops


class UniformSampler:
    """Draws every timestep with the same probability; every importance weight is 1."""

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.device = torch.device(device)
        self._table: tuple[Tensor, Tensor] | None = None

    def weights(self) -> Tensor:
        """Unnormalised probability of each timestep, [T] float64."""
        return torch.ones(self.num_timesteps, dtype=torch.float64, device=self.device)

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B] int64 and importance weights 1 / (T p_t) [B] float32, for uniform [B] float64 in (0, 1)."""
        return ops.timesteps_at(uniform, *self.table())

    def table(self) -> tuple[Tensor, Tensor]:
        """(cumulative probabilities scaled to 2^48, [T] int64; importance weights [T] float32)."""
        if self._table is None:
            self._table = self._make_table()
        return self._table

    def _make_table(self) -> tuple[Tensor, Tensor]:
        p = self.weights()
        p = p / p.sum()
        # Integers have the same cumulative sum on every device.
        return (p * 2.0**48).round().long().cumsum(0), (1 / (self.num_timesteps * p)).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record this rank's finite unweighted losses [B] at t [B]. This is a collective operation."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LossSecondMomentSampler(UniformSampler):
    """Draws timesteps in proportion to sqrt(E[loss²]) (Nichol & Dhariwal 2021, section 3.3), after a uniform warm-up.

    The last `history_per_term` losses of each timestep are kept, oldest first; the warm-up ends when all histories are
    full. `uniform_prob` is the weight of a uniform distribution in the mixture. All ranks record the losses of all
    ranks, in rank order, so their histories are equal.
    """

    def __init__(
        self,
        num_timesteps: int,
        device: torch.device | str = "cpu",
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
    ) -> None:
        super().__init__(num_timesteps, device)
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=self.device)

    def table(self) -> tuple[Tensor, Tensor]:
        return self._make_table()  # never cached: the history changes

    def warmed_up(self) -> Tensor:
        """Whether every timestep has a full history, [] bool."""
        return (self.counts == self.history.shape[1]).all()

    def weights(self) -> Tensor:
        weights = self.history.square().mean(dim=1).sqrt()
        weights = weights / weights.sum()
        weights = weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        return torch.where(self.warmed_up(), weights, torch.ones_like(weights))

    def update(self, t: Tensor, losses: Tensor) -> None:
        losses = losses.detach().double()
        if dist.is_initialized() and dist.get_world_size() > 1:
            t, losses = _gather(t), _gather(losses)
        depth = self.history.shape[1]
        # A batch may have several losses of one timestep: count those before and after each loss.
        finite = losses.isfinite()
        same = (t[:, None] == t[None, :]) & finite
        before = torch.tril(same, diagonal=-1).sum(dim=1)
        after = torch.triu(same, diagonal=1).sum(dim=1)
        new = torch.zeros_like(self.counts).index_add_(0, t, finite.long())
        overflow = (self.counts + new - depth).clamp(min=0)
        # Shift each history left by its overflow, then append the new losses.
        columns = torch.arange(depth, device=self.device)[None, :] + overflow[:, None]
        shifted = self.history.gather(1, columns.clamp(max=depth - 1)) * (columns < self.counts[:, None])
        column = self.counts[t] - overflow[t] + before
        keep = finite & (after < depth) & (column >= 0)
        flat = torch.cat([shifted.flatten(), shifted.new_zeros(1)])  # the last place takes losses that are dropped
        flat[torch.where(keep, t * depth + column, flat.numel() - 1)] = losses
        # In place: a CUDA graph reads and writes the same memory at every replay.
        self.history.copy_(flat[:-1].view_as(self.history))
        self.counts.copy_((self.counts + new).clamp(max=depth))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.to("cpu", copy=True), "counts": self.counts.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the timestep sampler's history is {tuple(state['history'].shape)}, "
                f"this process needs {tuple(self.history.shape)}"
            )
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])


def _gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def create_timestep_sampler(name: str, num_timesteps: int, device: torch.device | str = "cpu") -> UniformSampler:
    """Create the timestep sampler "uniform" or "loss-second-moment". Raises ValueError for another name."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
    if name not in samplers:
        raise ValueError(f"schedule_sampler {name!r} is not known; use uniform or loss-second-moment")
    return samplers[name](num_timesteps, device)
