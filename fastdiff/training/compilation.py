"""What a training run compiles: its network by torch.compile, and the Triton kernels that it launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.diffusion.noise_keys import NOISE, TIMESTEPS
from fastdiff.models import BackboneSettings, UNet, build_model
from fastdiff.models.dummy_batch import dummy_batch
from fastdiff.precompile import META, Launch, launches_of
from fastdiff.runtime.compilation import compile_kwargs, missing_compiler
from fastdiff.training.settings import TrainSettings

WORTHWHILE_STEPS = 20_000
"""Steps from which compiling pays on a CPU: it takes two minutes and makes a step 5 to 10% faster."""


def decide(train: TrainSettings, device: torch.device, steps_left: int, before: bool | None = None) -> tuple[bool, str]:
    """Whether to compile the network, and why; `before` is what the run did that this one resumes."""
    if train.compile != "auto":
        return bool(train.compile), f"compile {train.compile}"
    if train.zero_stage == 3:
        return False, "zero_stage 3 gathers weights block by block, which a compiled network can't"
    if device.type == "cuda":
        return True, "a GPU"
    if before is False:
        return False, "as the run began"
    if steps_left < WORTHWHILE_STEPS and not before:
        return False, f"on a CPU not worth it for fewer than {WORTHWHILE_STEPS} steps"
    if missing := missing_compiler(device):
        return False, missing
    return True, "as the run began" if before else f"{steps_left} steps to go"


def compile_network(model: UNet, zero_stage: int) -> None:
    """Compile the network's forward pass, and nothing around it.

    DeepSpeed's `engine.compile` would include the hooks that it adds to the module, which count micro-batches: Dynamo
    would recompile them at every count.
    """
    kwargs = compile_kwargs(next(model.parameters()).device, fullgraph=zero_stage < 3)
    model.forward = torch.compile(model.forward, **kwargs)  # type: ignore[method-assign]


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
    """The kernel launches of an optimiser step on micro-batches of `micro` images, with a body in `precision`.

    more            Whether a step has more than one micro-batch.
    rates           Decay rates of the averages of the weights.
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
    """Run a training step up to its gradients on the meta device; returns the parameters. See `training_launches`."""
    with META:
        model = build_model(settings).train().set_precision(precision)
    if through_engine:
        model.to(precision)
    process = create_diffusion(diffusion, settings.learn_sigma)
    step, batch = dummy_batch(settings, 2 * micro, META), dummy_batch(settings, micro, META)
    # A second micro-batch lies behind the first one, perhaps not at a multiple of 16 bytes.
    for cut in (slice(micro), slice(micro, 2 * micro))[: 1 + more]:
        positions = step.noise.index[cut]
        ops.image_uniform(TIMESTEPS, positions, 0)
        noise = replace(batch.noise, seed=NOISE, index=positions)
        given = batch._replace(images=step.images[cut], noise=noise)
        process.training_losses(model, *given)["loss"].mean().backward()
    return list(model.parameters())


def _update(parameters: list[Tensor], rates: Sequence[float], scaled: bool, through_engine: bool) -> None:
    """Launch the kernels of the optimiser's update."""
    like = lambda count=1: [torch.empty_like(p, dtype=torch.float32) for p in parameters for _ in range(count)]
    gradients, lists, averages = like(), [like() for _ in range(3)], like(len(rates))
    squared = ops.squared_norm(gradients)
    given: dict[str, Any] = {"lr": 1e-4}
    if not through_engine:
        grad_scale, found_inf = ops.grad_scale_and_overflow(squared)
        given = {"lr": squared, "grad_scale": grad_scale if scaled else None, "found_inf": found_inf}
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    steps = [squared] * len(parameters)
    update = ops.AdamWLists(*lists, steps=steps, averages=averages, rates=list(rates), halves=[])
    update.step(gradients, **numbers, **given)
