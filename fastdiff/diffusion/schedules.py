"""Noise schedules, timestep respacing and the coefficient tables of a process, all float64 on the CPU.

named_betas       The variances of a named schedule.
space_timesteps   The timesteps kept by improved-diffusion's `timestep_respacing`.
keep_steps        The timesteps kept for a number of solver steps and a spacing.
Schedule          The tables of a process on the kept timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from fastdiff.diffusion.settings import DiffusionSettings

Spacing = Literal["uniform", "quadratic", "logsnr", "karras"]
"""uniform: evenly in t. quadratic: evenly in its square root, denser near the image (Song et al. 2020, DDIM).
logsnr: evenly in log(alpha / sigma) (Lu et al. 2022). karras: evenly in (sigma / alpha)^(1/7) (Karras et al. 2022,
eq. 5)."""
RHO = 7.0  # Karras et al. 2022, table 1


def named_betas(noise_schedule: str, diffusion_steps: int) -> np.ndarray:
    """The variances beta_1..beta_T of a named schedule, [T] float64.

    linear  Ho et al. 2020, section 4, scaled by 1000 / T so that chains of all lengths end at the same noise level.
    cosine  Nichol & Dhariwal 2021, eq. 17, with betas clipped to 0.999.
    Raises ValueError for an unknown name and for a linear chain of 20 steps or fewer, whose betas would reach 1.
    """
    if noise_schedule == "linear":
        if diffusion_steps <= 20:
            raise ValueError(
                f"diffusion_steps {diffusion_steps} is too few for noise_schedule linear, which needs at least 21; "
                "cosine takes fewer"
            )
        scale = 1000 / diffusion_steps
        return np.linspace(scale * 0.0001, scale * 0.02, diffusion_steps, dtype=np.float64)
    if noise_schedule == "cosine":

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array(
            [
                min(1 - alpha_bar((i + 1) / diffusion_steps) / alpha_bar(i / diffusion_steps), 0.999)
                for i in range(diffusion_steps)
            ]
        )
    raise ValueError(f"noise_schedule {noise_schedule!r} is not known; use linear or cosine")


def space_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """The steps of a chain of `num_timesteps` that a respacing keeps, ascending.

    ""          All steps.
    "10,15,20"  10, 15 and 20 evenly spaced steps in three equal parts of the chain, including the ends of each part.
    "ddim50"    50 steps at a constant integer stride from 0 (DDIM, Song et al. 2020).
    Raises ValueError if the respacing is malformed or impossible.
    """
    if not respacing:
        return list(range(num_timesteps))
    if respacing.startswith("ddim"):
        count = _whole(respacing[len("ddim") :], respacing)
        for stride in range(1, num_timesteps):
            kept = range(0, num_timesteps, stride)
            if len(kept) == count:
                return list(kept)
        raise ValueError(
            f"timestep_respacing {respacing}: no whole stride takes {count} of {num_timesteps} steps; "
            f"{_nearest_ddim(num_timesteps, count)} would work"
        )
    counts = [_whole(part, respacing) for part in respacing.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    kept_steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (1 if i < extra else 0)
        if count > length:
            raise ValueError(
                f"timestep_respacing {respacing}: part {i + 1} of {len(counts)} has {length} steps, fewer than {count}"
            )
        spacing = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # the same sums and rounding as in improved-diffusion, to keep the same steps
            kept_steps.append(start + round(position))
            position += spacing
        start += length
    return sorted(set(kept_steps))


def _whole(text: str, respacing: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"timestep_respacing {respacing!r} is not understood; write 250, 10,15,20, ddim50 or nothing")
    return int(text)


def _nearest_ddim(num_timesteps: int, count: int) -> str:
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    return f"ddim{min(possible, key=lambda n: abs(n - count))}"


@dataclass(frozen=True)
class Schedule:
    """The tables of a diffusion process with S kept steps: arrays [S] float64, with the least noisy step at index 0.

    timestep_map [S] int64 holds each kept step's index in the chain of `original_steps` that trained the network.
    """

    betas: np.ndarray
    timestep_map: np.ndarray
    original_steps: int

    @staticmethod
    def create(
        noise_schedule: str, diffusion_steps: int, timestep_respacing: str = "", kept: Sequence[int] | None = None
    ) -> Schedule:
        """The named schedule on the kept steps alone, with betas that preserve alphas_cumprod at these steps.

        The steps to keep are given by a respacing or as an ascending list. Raises ValueError if both are given, or if
        they are not possible.
        """
        if kept is None:
            kept = space_timesteps(diffusion_steps, timestep_respacing)
        elif timestep_respacing:
            raise ValueError(f"timestep_respacing {timestep_respacing} and kept steps: give one of them")
        elif sorted({t for t in kept if 0 <= t < diffusion_steps}) != list(kept) or not kept:
            raise ValueError(f"kept steps must ascend within 0..{diffusion_steps - 1}, not {list(kept)}")
        full = np.cumprod(1.0 - named_betas(noise_schedule, diffusion_steps))
        alphas_cumprod = full[list(kept)]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return Schedule(betas, np.array(kept, dtype=np.int64), diffusion_steps)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> np.ndarray:
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def one_minus_alphas_cumprod(self) -> np.ndarray:
        return 1.0 - self.alphas_cumprod

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.log(1.0 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod - 1)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """The variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7); 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log(posterior_variance). The first step, where it is -inf, takes the second's value, or else log beta."""
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        return np.log(np.append(first, self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def log_betas(self) -> np.ndarray:
        return np.log(self.betas)

    @cached_property
    def fixed_large_variance(self) -> np.ndarray:
        """beta, but at the first step the posterior variance of the second, for a better likelihood at t = 0."""
        return np.exp(self.fixed_large_log_variance)

    @cached_property
    def fixed_large_log_variance(self) -> np.ndarray:
        return np.append(self.posterior_log_variance_clipped[0], self.log_betas[1:])


def spaced_steps(alphas_cumprod: np.ndarray, steps: int, spacing: str, sigma_max: float) -> list[int]:
    """`steps` distinct indices into the chain alphas_cumprod [T], ascending from 0 to the last one below sigma_max.

    sigma_max bounds the noise sigma / alpha in units of the image: a cosine chain reaches 80,000, where float32 can't
    resolve x_0 in x_t. A single step is the last one. Each index is the nearest to the spacing's target (as in Karras
    et al. 2022, appendix C.3.4), or a neighbour if another step takes that index.
    Raises ValueError if the chain has fewer steps up to that noise, and for an unknown spacing.
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
    """The indices nearest to the spacing's targets, ascending from 0 to the last, possibly repeated."""
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
    """Make ascending indices distinct by moving them up, or down at the upper end, as little as possible."""
    distinct = places.tolist()
    for i in range(1, len(distinct)):
        distinct[i] = max(distinct[i], distinct[i - 1] + 1)
    distinct[-1] = int(places[-1])
    for i in reversed(range(len(distinct) - 1)):
        distinct[i] = min(distinct[i], distinct[i + 1] - 1)
    return distinct


def keep_steps(settings: DiffusionSettings, steps: int, spacing: str, sigma_max: float) -> list[int]:
    """`spaced_steps` of the settings' full chain. Raises ValueError if the settings have a timestep_respacing."""
    if settings.timestep_respacing:
        raise ValueError(f"steps {steps} and timestep_respacing {settings.timestep_respacing}: give one of them")
    whole = Schedule.create(settings.noise_schedule, settings.diffusion_steps)
    return spaced_steps(whole.alphas_cumprod, steps, spacing, sigma_max)
