"""The Triton kernels that a training step launches, found on tensors without memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.diffusion.noise_keys import NOISE, TIMESTEPS
from fastdiff.models import BackboneSettings, SuperResSettings, build_model
from fastdiff.ops import CounterNoise, grad_scale_and_overflow
from fastdiff.precompile import META, Launch, launches_of


def training_launches(
    settings: BackboneSettings,
    diffusion: DiffusionSettings,
    micro: int,
    precision: torch.dtype,
    *,
    more: bool = False,
    rates: Sequence[float] = (0.9999,),
    scaled: bool = False,
    through_engine: bool = False,
) -> list[Launch]:
    """Launches of an optimiser step on micro-batches of `micro` images, with a body in `precision`.

    more            Whether a step has more than one micro-batch.
    rates           The decay rates of the averages of the weights.
    scaled          Whether gradients are clipped or carry a loss scale.
    through_engine  Whether DeepSpeed takes the step instead of `DeviceStep`; then weights are in `precision`, too.
    """

    def work() -> None:
        parameters = forward_and_backward(settings, diffusion, micro, precision, more, through_engine)
        _update(parameters, rates, scaled, through_engine)

    return launches_of(work)


def forward_and_backward(
    settings: BackboneSettings,
    diffusion: DiffusionSettings,
    micro: int,
    precision: torch.dtype,
    more: bool = False,
    through_engine: bool = False,
) -> list[Tensor]:
    """A training step up to its gradients, on the meta device; the parameters. See `training_launches`."""
    with META:
        model = build_model(settings).train().set_precision(precision)
    if through_engine:
        model.to(precision)
    process = create_diffusion(diffusion, settings.learn_sigma)
    C, (H, W) = settings.in_channels, settings.size_hw
    # A second micro-batch lies behind the first one, perhaps not at a multiple of 16 bytes.
    images = torch.empty(2 * micro, H, W, C, dtype=torch.uint8, device=META)
    positions = torch.empty(2 * micro, dtype=torch.int64, device=META)
    for cut in (slice(micro), slice(micro, 2 * micro))[: 1 + more]:
        t = torch.empty(micro, dtype=torch.int64, device=META)
        kwargs: dict[str, Tensor] = {"y": t} if settings.class_cond else {}
        if isinstance(settings, SuperResSettings):
            kwargs["low_res"] = torch.empty(micro, C, *settings.small_size, device=META)
        ops.image_uniform(TIMESTEPS, positions[cut], 0)
        noise = CounterNoise(NOISE, positions[cut], (C, H, W))
        process.training_losses(model, images[cut], t, kwargs, noise)["loss"].mean().backward()
    return list(model.parameters())


def _update(parameters: list[Tensor], rates: Sequence[float], scaled: bool, through_engine: bool) -> None:
    """Make the launches of the optimiser's update."""
    like = lambda count=1: [torch.empty_like(p, dtype=torch.float32) for p in parameters for _ in range(count)]
    gradients, lists, averages = like(), [like() for _ in range(3)], like(len(rates))
    squared = ops.squared_norm(gradients)
    given: dict[str, Any] = {"lr": 1e-4}
    if not through_engine:
        grad_scale, found_inf = grad_scale_and_overflow(squared)
        given = {"lr": squared, "grad_scale": grad_scale if scaled else None, "found_inf": found_inf}
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    steps = [squared] * len(parameters)
    update = ops.AdamWLists(*lists, steps=steps, averages=averages, rates=list(rates), halves=[])
    update.step(gradients, **numbers, **given)
