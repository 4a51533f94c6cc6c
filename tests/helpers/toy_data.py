"""Data with a known optimal predictor and flow: a mixture of N(-mode, spread²) and N(mode, spread²) in equal parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.schedules import Schedule

STARTS = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).reshape(1, 1, 1, -1)
"""41 values of x_T, evenly spaced from -2.5 to 2.5."""


@dataclass(frozen=True)
class Modes:
    mode: float
    spread: float

    def predictor(self, diffusion: GaussianDiffusion) -> Callable[[Tensor, int], Tensor]:
        """Return the function x, step → E[noise | x_t] for `solve`, in x's dtype."""
        alphas_cumprod = diffusion.schedule.alphas_cumprod.tolist()

        def predict(x: Tensor, step: int) -> Tensor:
            a = alphas_cumprod[step]
            return (x - math.sqrt(a) * self.denoised(x, a)) / math.sqrt(1 - a)

        return predict

    def denoised(self, x: Tensor, a: float) -> Tensor:
        """Return E[x_0 | x_t] at the cumulative alpha a."""
        variance = a * self.spread**2 + 1 - a
        side = torch.tanh(math.sqrt(a) * self.mode * x / variance)  # expected sign of x_0's mode
        return (self.spread**2 * math.sqrt(a) * x + (1 - a) * self.mode * side) / variance

    def quantile(self, x: Tensor, a: float) -> Tensor:
        """Return the fraction of all x_t below x, which is constant along the flow."""
        deviation, mean = math.sqrt(a * self.spread**2 + 1 - a), math.sqrt(a) * self.mode
        return (torch.special.ndtr((x - mean) / deviation) + torch.special.ndtr((x + mean) / deviation)) / 2


ONE_MODE, TWO_MODES = Modes(0.0, 0.5), Modes(0.6, 0.3)


def log_chain(steps: int, least: float, most: float) -> GaussianDiffusion:
    """Make a process with steps + 1 levels whose noise sigma / alpha grows by a nearly constant factor."""
    u = np.linspace(0, 1, steps + 1)
    u += 0.3 * np.sin(2 * np.pi * u) / (2 * np.pi)
    a = 1 / (1 + (least * (most / least) ** u) ** 2)
    return GaussianDiffusion(Schedule(1 - a / np.append(1.0, a[:-1]), np.arange(steps + 1), steps + 1))
