"""Which steps of a chain a solver with few steps visits."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from fastdiff.diffusion.schedules import Schedule
from fastdiff.diffusion.settings import DiffusionSettings

Spacing = Literal["uniform", "quadratic", "logsnr", "karras"]
"""uniform: evenly in t. quadratic: evenly in its square root, denser near the image (Song et al. 2020, DDIM).
logsnr: evenly in log(alpha / sigma) (Lu et al. 2022). karras: evenly in (sigma / alpha)^(1/7) (Karras et al. 2022,
eq. 5)."""
RHO = 7.0  # Karras et al. 2022, table 1


def spaced_steps(alphas_cumprod: np.ndarray, steps: int, spacing: str, sigma_max: float) -> list[int]:
    """`steps` distinct places in the chain alphas_cumprod [T], ascending: 0, ..., the last below sigma_max.

    sigma_max bounds the noise sigma / alpha in units of the image: a cosine chain reaches 80,000, where float32 can't
    tell x_0 from x_t. One step is the last alone. Each place is the nearest to where the spacing wants it (as Karras
    et al. 2022, appendix C.3.4, do with chains of steps), moved on where another step has it already.
    Raises ValueError where the chain has too few steps, or none, up to that noise, and for an unknown spacing.
    """
    log_noise = 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))
    available = int(np.searchsorted(log_noise, np.log(sigma_max) + 1e-9, side="right")) if sigma_max > 0 else 0
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing {spacing!r} is not known; use one of {', '.join(get_args(Spacing))}")
    if not available:
        raise ValueError(f"sigma_max {sigma_max:g} is below the chain's least noise, {np.exp(log_noise[0]):.2g}")
    if not 1 <= steps <= available:
        raise ValueError(f"steps {steps} is not possible: the chain has 1 to {available} up to noise {sigma_max:g}")
    last = available - 1
    if steps == 1:
        return [last]
    return _distinct(_wanted(log_noise[:available], steps, spacing))


def _wanted(log_noise: np.ndarray, steps: int, spacing: str) -> np.ndarray:
    """The places nearest to the spacing's, ascending from 0 to the last, perhaps several times the same."""
    last = len(log_noise) - 1
    if spacing == "uniform":
        return np.rint(np.linspace(0, last, steps)).astype(np.int64)
    if spacing == "quadratic":
        return np.rint(np.linspace(0, last**0.5, steps) ** 2).astype(np.int64)
    least, most = float(log_noise[0]), float(log_noise[-1])
    if spacing == "logsnr":
        targets = np.linspace(least, most, steps)
    else:
        targets = RHO * np.log(np.linspace(math.exp(least / RHO), math.exp(most / RHO), steps))
    above = np.searchsorted(log_noise, targets).clip(1, last)
    nearer_below = targets - log_noise[above - 1] < log_noise[above] - targets
    places = above - nearer_below
    places[0], places[-1] = 0, last
    return places


def _distinct(places: np.ndarray) -> list[int]:
    """Ascending places moved as little up, and where that ends, down, as makes them distinct; the ends stay."""
    distinct = places.tolist()
    for i in range(1, len(distinct)):
        distinct[i] = max(distinct[i], distinct[i - 1] + 1)
    distinct[-1] = int(places[-1])
    for i in reversed(range(len(distinct) - 1)):
        distinct[i] = min(distinct[i], distinct[i + 1] - 1)
    return distinct


def keep_steps(settings: DiffusionSettings, steps: int, spacing: str, sigma_max: float) -> list[int]:
    """`spaced_steps` of the settings' whole chain; ValueError if they say by timestep_respacing what to keep."""
    if settings.timestep_respacing:
        raise ValueError(f"steps {steps} and timestep_respacing {settings.timestep_respacing}: give one of them")
    whole = Schedule.create(settings.noise_schedule, settings.diffusion_steps)
    return spaced_steps(whole.alphas_cumprod, steps, spacing, sigma_max)
