"""The loss-aware sampler of timesteps equals a plain re-statement, and its weights are unbiased."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastdiff.diffusion.timesteps import LossSecondMomentSampler


class PlainLossAware:
    """improved-diffusion's sampler as a loop over single losses."""

    def __init__(self, steps: int, depth: int = 10, uniform: float = 0.001) -> None:
        self.steps, self.depth, self.uniform = steps, depth, uniform
        self.losses: list[list[float]] = [[] for _ in range(steps)]

    def update(self, t: list[int], losses: list[float]) -> None:
        for step, loss in zip(t, losses, strict=True):
            self.losses[step] = [*self.losses[step], loss][-self.depth :]

    def weights(self) -> np.ndarray:
        if any(len(history) < self.depth for history in self.losses):
            return np.ones(self.steps)
        weights = np.sqrt(np.mean(np.square(self.losses), axis=1))
        return weights / weights.sum() * (1 - self.uniform) + self.uniform / self.steps


@pytest.mark.parametrize(
    "batch", [lambda rng: rng.integers(1, 4), lambda rng: rng.integers(20, 60)], ids=["few", "many of the same"]
)
def test_loss_aware_sampler(batch: Callable[[np.random.Generator], int]) -> None:
    """Both agree also when a batch contains one timestep more often than the history is deep."""
    rng = np.random.default_rng(0)
    ours, plain = LossSecondMomentSampler(4), PlainLossAware(4)
    longest = 0
    for _ in range(60):
        count = int(batch(rng))
        t = rng.choice(4, size=count, p=[0.7, 0.1, 0.1, 0.1])
        losses = rng.exponential(size=count).astype(np.float32)
        longest = max(longest, int(np.bincount(t).max()))
        ours.update(torch.from_numpy(t), torch.from_numpy(losses))
        plain.update(t.tolist(), losses.tolist())
        for step, history in enumerate(plain.losses):
            assert int(ours.counts[step]) == len(history)
            np.testing.assert_array_equal(ours.history[step, : len(history)].numpy(), history)
        np.testing.assert_allclose(ours.weights().numpy(), plain.weights(), rtol=1e-12)
    assert bool(ours.warmed_up())
    assert longest > 10 or count < 4


def test_loss_aware_sampler_all_at_once() -> None:
    """Both agree for a batch of one timestep only, with an empty and with a full history."""
    ours, plain = LossSecondMomentSampler(2), PlainLossAware(2)
    for first in (0, 100, 200):
        losses = [float(first + i) for i in range(25)]
        ours.update(torch.zeros(25, dtype=torch.int64), torch.tensor(losses))
        plain.update([0] * 25, losses)
        assert ours.history[0].tolist() == plain.losses[0] == losses[-10:]
    assert int(ours.counts[1]) == 0


def test_importance_weights_are_unbiased() -> None:
    """E[weight · f(t)] over the sampler's own draws is the mean of f."""
    sampler = LossSecondMomentSampler(5)
    t = torch.arange(5).repeat(10)
    sampler.update(t, (t + 1).float())
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn, weights = sampler.sample(uniform)
    share = torch.bincount(drawn, minlength=5).double() / n
    p = sampler.weights() / sampler.weights().sum()
    assert (share - p).abs().max() <= 1.01 / n
    f = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    assert (weights * f[drawn]).mean().item() == pytest.approx(f.mean().item(), rel=1e-4)
