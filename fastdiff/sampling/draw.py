"""Drawing a batch of images from a network, each from its own stream of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.samplers import Step, ddim_sample_loop, p_sample_loop
from fastdiff.diffusion.streams import CLASSES, SAMPLES
from fastdiff.models import BackboneSettings, UNet, build_model, weights
from fastdiff.models.precision import body_dtype
from fastdiff.settings import UserError


def load_model(
    settings: BackboneSettings, model_path: str, precision: str, device: torch.device
) -> tuple[UNet, dict[str, Any]]:
    """The network with a checkpoint's weights, ready to draw, and what the checkpoint says about itself."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    file = weights.find(model_path, "--model_path")
    state = weights.read_state_dict(file, "--model_path")
    model = build_model(settings)
    weights.load_into(model, state, file, "--model_path")
    return model.to(device).eval().set_precision(body_dtype(precision, device)), weights.info_of(state)


def class_labels(classes: str, class_names: list[str], num_classes: int) -> list[int]:
    """Numbers for '0,5,cat': each a number or a name that the checkpoint knows. Empty for an empty string."""
    labels = []
    for word in (w.strip() for w in classes.split(",") if w.strip()):
        if word in class_names:
            labels.append(class_names.index(word))
        elif word.isdecimal() and int(word) < num_classes:
            labels.append(int(word))
        else:
            known = f" or one of {', '.join(class_names[:10])}" if class_names else ""
            raise UserError(f"--classes: {word} is not a class; give numbers from 0 to {num_classes - 1}{known}")
    return labels


def labels_for(index: Tensor, chosen: list[int], num_classes: int, seed: int) -> Tensor:
    """Labels [B] of images `index` [B]: the chosen classes in turn, or each image's at random."""
    if chosen:
        return torch.tensor(chosen, device=index.device)[index % len(chosen)]
    uniform = ops.image_uniform(seed | CLASSES, index, 0)
    return (uniform * num_classes).long().clamp(max=num_classes - 1)


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
