"""From noise to images: generators over the steps of a process. Each yields after every step.

They know no progress bar, seed or file: `noise(t)` gives the standard normal noise [B, C, H, W] of step t, as a tensor
or as counters, so a job can give every image its own seed and a test can feed recorded noise.

From the network's output to the next x is one op whose coefficients, a table over t, tell the samplers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.process import GaussianDiffusion, Model, ModelMeanType

Noise = Callable[[int], ops.Noise]


@dataclass(frozen=True)
class Step:
    """The state after step t: the sample x_{t-1} (x_{t+1} in reverse) and the x_0 predicted from what it came from."""

    t: int
    sample: Tensor
    pred_xstart: Tensor


def _timesteps(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


def _table(diffusion: GaussianDiffusion, device: torch.device, **columns: np.ndarray) -> Tensor:
    """Coefficients of ops.sampler_step at every t, [S, 10] float32; columns that aren't given are 0."""
    s = diffusion.schedule
    known = {"recip": s.sqrt_recip_alphas_cumprod, "recipm1": s.sqrt_recipm1_alphas_cumprod, **columns}
    zeros = np.zeros(s.num_timesteps)
    table = np.stack([known.get(name, zeros) for name in ops.STEP_COLUMNS], axis=1)
    return torch.from_numpy(table.astype(np.float32)).to(device)


def _loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise | None,
    table: Tensor,
    variance: str,
    clip_denoised: bool,
    model_kwargs: dict[str, Any] | None,
) -> Iterator[Step]:
    """Every step from the last to the first, by a table of coefficients."""
    dtype, _ = getattr(model, "input_format", None) or (None, None)
    network_input = x
    for step in reversed(range(diffusion.num_timesteps)):
        output = model(network_input, diffusion.model_timesteps(_timesteps(x, step)), **(model_kwargs or {}))
        x, pred_xstart, network_input = ops.sampler_step(
            output,
            x,
            table[step].expand(len(x), -1),
            noise(step) if noise and step > 0 else None,
            epsilon=diffusion.mean_type is ModelMeanType.EPSILON,
            clip=clip_denoised,
            variance=variance,
            input_dtype=dtype,
        )
        yield Step(step, x, pred_xstart)


@torch.no_grad()
def p_sample_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) from x = x_T [B, C, H, W] float32."""
    s = diffusion.schedule
    log_variance = getattr(s, diffusion.log_variance_table)
    table = _table(
        diffusion,
        x.device,
        x=s.posterior_mean_coef2,
        x_start=s.posterior_mean_coef1,
        sigma=np.ones_like(log_variance) if diffusion.learns_variance else np.exp(0.5 * log_variance),
        low=s.posterior_log_variance_clipped,
        high=log_variance,
    )
    yield from _loop(diffusion, model, x, noise, table, diffusion.variance, clip_denoised, model_kwargs)


@torch.no_grad()
def ddim_sample_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): eta 0 is deterministic, 1 is as noisy as DDPM."""
    s = diffusion.schedule
    a_t, a_prev = s.alphas_cumprod, s.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a_t)) * np.sqrt(1 - a_t / a_prev)  # eq. 16
    direction = np.sqrt(1 - a_prev - sigma**2)  # of the noise in eq. 12, here written out in x and x_0
    table = _table(
        diffusion,
        x.device,
        x=direction * s.sqrt_recip_alphas_cumprod / s.sqrt_recipm1_alphas_cumprod,
        x_start=np.sqrt(a_prev) - direction / s.sqrt_recipm1_alphas_cumprod,
        sigma=sigma,
    )
    yield from _loop(diffusion, model, x, noise if eta > 0 else None, table, "fixed", clip_denoised, model_kwargs)


@torch.no_grad()
def ddim_reverse_step(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    step: int,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Step:
    """One step of the deterministic flow towards noise: x_t → x_{t+1} (DDIM, section 4.3, backwards)."""
    t = _timesteps(x, step)
    pred_xstart = diffusion.p_mean_variance(model, x, t, clip_denoised, model_kwargs).pred_xstart
    eps = diffusion.predict_eps_from_xstart(x, t, pred_xstart)
    a_next = diffusion.at("alphas_cumprod_next", t)
    coefficients = torch.stack([a_next.sqrt(), (1 - a_next).sqrt()], dim=1)
    return Step(step, ops.q_sample(pred_xstart, coefficients, eps), pred_xstart)


def ddim_reverse_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Encode images x_0 [B, C, H, W] into noise, deterministically."""
    for step in range(diffusion.num_timesteps):
        state = ddim_reverse_step(diffusion, model, x, step, clip_denoised, model_kwargs)
        x = state.sample
        yield state
