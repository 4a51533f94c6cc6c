"""Drawing one batch from any network, without an engine: previews during training, experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.samplers import Step, ddim_sample_loop, p_sample_loop


def draw(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    index: Tensor,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    clip_denoised: bool = True,
    use_ddim: bool = False,
    eta: float = 0.0,
    model_kwargs: dict[str, Any] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Images number `index` [B] of a job, [B, C, H, W] float32 in about [-1, 1].

    All noise of an image comes from (seed, its number), so it doesn't matter which others are drawn beside it.
    """

    def noise(t: int) -> ops.CounterNoise:
        return ops.CounterNoise(seed | SAMPLES, index, shape, torch.full_like(index, t + 1))

    x = ops.image_noise(seed | SAMPLES, index, 0, shape)
    if use_ddim:
        steps = ddim_sample_loop(diffusion, model, x, noise, clip_denoised, model_kwargs, eta)
    else:
        steps = p_sample_loop(diffusion, model, x, noise, clip_denoised, model_kwargs)
    for step in steps:
        x = step.sample
        if on_step is not None:
            on_step(step)
    return x
