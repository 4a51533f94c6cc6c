"""Triton kernels of a run, compiled before the run needs them.

What a training or sampling step would launch is found on tensors without memory, and compiled for a GPU that need not
be here. Triton's cache keys are those of the run (see `kernels/aot.py`).
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.diffusion.plans import Plan
from fastdiff.diffusion.streams import NOISE, SAMPLES, TIMESTEPS
from fastdiff.kernels import launch
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.reference import CounterNoise, grad_scale_and_overflow
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, build_model
from fastdiff.models.inference import freeze
from fastdiff.processes import current
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.evaluation import Evaluation, Guidance
from fastdiff.threads import free_cores

META = torch.device("meta")
MOST = 8
"""Processes at most: a published network has 60 to 120 kernels, of half a second to a few seconds each."""
LEAST_EACH = 4
"""Kernels for which a process is worth its start."""


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
    with warnings.catch_warnings(), ops.using("triton", anywhere=True):
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        with launch.record() as direct, _Calls() as seen:  # the optimiser launches without an op, after all others
            work()
        with launch.record() as recorded:
            for name, args in seen.calls.values():
                launch.IMPLEMENTATIONS[name](*args)
    return recorded + direct


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

    more            Other micro-batches follow the first.
    rates           Of the averages of the weights.
    scaled          The gradients are clipped, or carry a loss scale.
    through_engine  DeepSpeed takes the step instead of `DeviceStep`; then the weights are in `precision` as well.
    """

    def work() -> None:
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
        _update(list(model.parameters()), rates, scaled, through_engine)

    return launches_of(work)


def _update(parameters: list[Tensor], rates: Sequence[float], scaled: bool, through_engine: bool) -> None:
    """The update by kernels."""
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


def sampling_launches(
    settings: BackboneSettings,
    diffusion: GaussianDiffusion,
    plan: Plan,
    batch: int,
    precision: torch.dtype,
    *,
    guidance: Guidance | None = None,
    clip: bool = True,
) -> list[Launch]:
    """Launches of drawing `batch` images at once by `Engine`, with a body in `precision`."""

    def network(settings: BackboneSettings) -> UNet:
        with META:
            return freeze(build_model(settings).set_precision(precision))

    def work() -> None:
        chosen = guidance or Guidance()
        guide = None if chosen.guide is None else network(chosen.guide.settings)
        evaluation = Evaluation(network(settings), plan, diffusion, replace(chosen, guide=guide), META)
        engine = Engine(evaluation, plan, diffusion, META, batch_size=batch, seed_stream=SAMPLES, clip=clip)
        index = torch.empty(batch, dtype=torch.int64, device=META)
        small = None
        if isinstance(settings, SuperResSettings):
            small = torch.empty(batch, settings.in_channels, *settings.small_size, device=META)
        state = engine._begin(index, index if settings.class_cond else None, small)
        kinds = zip(evaluation.guided, engine._noisy, strict=True)
        for row in {kind: row for row, kind in enumerate(kinds)}.values():
            engine._advance(state, row)

    return launches_of(work)


# --- processes that compile ---


def start(launches: Callable[[], list[Launch]], device: torch.device) -> list[str]:
    """Compile launches in a few processes of their own, which nothing waits for; returns lines that say so.

    Nothing happens, and nothing is said, where there is no GPU, no kernel is used, or another rank of this machine does
    it. Whatever goes wrong is left to the run, which compiles what it doesn't find in Triton's cache. The processes end
    with this one.
    """
    if device.type != "cuda" or not ops.uses_kernels(torch.empty(0, device=device)) or current().local_rank:
        return []
    try:
        from fastdiff.kernels import aot

        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
        lines = list(dict.fromkeys(map(aot.to_json, launches())))
        left = aot.missing(lines, arch)[::-1]  # the run itself begins at the front
        count = min(MOST, free_cores(), -(-len(left) // LEAST_EACH))
        for i in range(count):
            _spawn(arch, left[i::count])
    except Exception as error:  # of any kind: the run goes on without
        return [f"Triton kernels: not compiled beforehand ({type(error).__name__}: {error})"]
    if not left:
        return [f"Triton kernels: all {len(lines)} in the cache"]
    return [f"Triton kernels: compiling {len(left)} of {len(lines)} beforehand, processes: {count}"]


def _spawn(arch: int, lines: list[str]) -> subprocess.Popen[bytes]:
    """A process that compiles launches, each a line of `kernels.aot.to_json`."""
    root = str(Path(fastdiff.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as given:  # a pipe would make this process wait until the other one reads
        given.write("\n".join(lines).encode())
        given.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.kernels.aot", str(arch), str(os.getpid())],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a signal to the run's group is not for it
        )
    atexit.register(worker.kill)
    return worker
