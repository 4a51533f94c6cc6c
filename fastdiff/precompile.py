"""Triton kernels of a run, compiled before the run needs them.

What a training or sampling step would launch is found on tensors without memory, and compiled for a GPU that need not
be here. Triton's cache keys are those of the run (see `kernels/aot.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.config import Config
from fastdiff.diffusion import create_diffusion
from fastdiff.diffusion.plans import make_plan
from fastdiff.diffusion.streams import NOISE, SAMPLES
from fastdiff.kernels import launch
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.reference import CounterNoise, grad_scale_and_overflow
from fastdiff.models import SuperResSettings, build_model
from fastdiff.models.inference import freeze
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.evaluation import Evaluation, Guidance

META = torch.device("meta")


class _Calls(TorchDispatchMode):
    """Collects calls of fastdiff's ops, one of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[str, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdiff":
            name = func.name().split("::")[1].split(".")[0]
            self.calls.setdefault(f"{name} {_signature(args)}", (name, args))
        return func(*args, **(kwargs or {}))


def _signature(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.storage_offset()}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_signature, value)) + ")"
    return repr(value)


def launches_of(work: Callable[[], Any]) -> list[Launch]:
    """What fastdiff's ops would launch for `work`, a function of tensors on the meta device."""
    with warnings.catch_warnings(), ops.using("triton", anywhere=True), launch.record() as recorded:
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        with _Calls() as seen:
            work()
        for name, args in seen.calls.values():
            launch.IMPLEMENTATIONS[name](*args)
    return recorded


def training_launches(config: Config, micro: int, precision: torch.dtype, more: bool = False) -> list[Launch]:
    """Launches of an optimiser step on `micro` images at once, as `DeviceStep` takes it, with a body in `precision`.

    more: other micro-batches follow the first one; they lie behind it in one batch.
    """

    def work() -> None:
        with META:
            model = build_model(config.model).train().set_precision(precision)
        diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
        C, (H, W) = config.model.in_channels, config.model.size_hw
        images = torch.empty(2 * micro, H, W, C, dtype=torch.uint8, device=META)
        positions = torch.empty(2 * micro, dtype=torch.int64, device=META)
        for cut in (slice(micro), slice(micro, 2 * micro))[: 1 + more]:
            t = torch.empty(micro, dtype=torch.int64, device=META)
            kwargs: dict[str, Tensor] = {"y": t} if config.model.class_cond else {}
            if isinstance(config.model, SuperResSettings):
                kwargs["low_res"] = torch.empty(micro, C, *config.model.small_size, device=META)
            noise = CounterNoise(NOISE, positions[cut], (C, H, W))
            diffusion.training_losses(model, images[cut], t, kwargs, noise)["loss"].mean().backward()
        scaled = config.train.precision == "fp16" or config.train.grad_clip > 0
        _update([p for p in model.parameters() if p.grad is not None], list(config.train.ema_rate), scaled)

    return launches_of(work)


def _update(parameters: list[Tensor], rates: list[float], scaled: bool) -> None:
    """What `DeviceStep` does after the backward pass, by kernels."""
    gradients = [torch.empty_like(p) for p in parameters]
    squared = ops.squared_norm(gradients)
    grad_scale, found_inf = grad_scale_and_overflow(squared, 1.0, 1.0)
    lists = [[torch.empty_like(p) for p in parameters] for _ in range(3)]
    averages = [torch.empty_like(p) for p in parameters for _ in rates]
    steps = [torch.empty((), device=META) for _ in parameters]
    numbers = {"lr": squared, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    update = ops.AdamWLists(*lists, steps=steps, averages=averages, rates=rates, halves=[])
    update.step(gradients, **numbers, grad_scale=grad_scale if scaled else None, found_inf=found_inf)


def sampling_launches(
    config: Config, batch: int, precision: torch.dtype, solver: str = "ddpm", eta: float = 0.0, clip: bool = True
) -> list[Launch]:
    """Launches of drawing `batch` images at once by `Engine`, with a body in `precision`."""

    def work() -> None:
        with META:
            model = freeze(build_model(config.model).set_precision(precision))
        diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
        plan = make_plan(diffusion, solver, eta)
        evaluation = Evaluation(model, plan, diffusion, Guidance(), META)
        engine = Engine(evaluation, plan, diffusion, META, batch_size=batch, seed_stream=SAMPLES, clip=clip)
        index = torch.empty(batch, dtype=torch.int64, device=META)
        given: dict[str, Tensor] = {"y": index} if config.model.class_cond else {}
        if isinstance(config.model, SuperResSettings):
            given["low_res"] = torch.empty(batch, config.model.in_channels, *config.model.small_size, device=META)
        state = engine._begin(index, given.get("y"), given.get("low_res"))
        rows = {bool(noisy): e for e, noisy in enumerate(engine._noisy)}  # one with noise, one without
        for e in rows.values():
            engine._advance(state, e)

    return launches_of(work)
