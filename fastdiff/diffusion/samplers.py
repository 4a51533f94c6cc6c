"""From noise to images: generators over the steps of a process. Each yields after every step.

They know no progress bar, seed or file: `noise(t)` gives the standard normal noise [B, C, H, W] of step t, so a job
can give every image its own seed and a test can feed recorded noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.process import GaussianDiffusion, Model

Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Step:
    """The state after step t: the sample x_{t-1} (x_{t+1} in reverse) and the x_0 predicted from what it came from."""

    t: int
    sample: Tensor
    pred_xstart: Tensor


def _timesteps(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


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
    for step in reversed(range(diffusion.num_timesteps)):
        t = _timesteps(x, step)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        x = ops.ddpm_step(p.mean, p.log_variance, noise(step), (t != 0).float())
        yield Step(step, x, p.pred_xstart)


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
    for step in reversed(range(diffusion.num_timesteps)):
        t = _timesteps(x, step)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        x = ops.ddim_step(
            x,
            p.pred_xstart,
            noise(step) if eta > 0 else torch.zeros_like(x),
            diffusion.at("alphas_cumprod", t),
            diffusion.at("alphas_cumprod_prev", t),
            diffusion.at("sqrt_recip_alphas_cumprod", t),
            diffusion.at("sqrt_recipm1_alphas_cumprod", t),
            (t != 0).float(),
            eta,
        )
        yield Step(step, x, p.pred_xstart)


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
    return Step(step, ops.q_sample(pred_xstart, eps, a_next.sqrt(), (1 - a_next).sqrt()), pred_xstart)


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
