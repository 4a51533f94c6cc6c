"""Chooses the micro-batch, and whether activations are recomputed, where these settings are "auto"."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, UNet, build_model
from fastdiff.models.unet import body_dtype, dummy_batch
from fastdiff.runtime.machine import free_memory
from fastdiff.runtime.processes import Processes
from fastdiff.training.diagnostics.memory import estimate
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import StepPlan

SPARE = 0.08
"""Share of the free memory left for what the estimate leaves out: cuDNN's workspaces, fragments, other programs."""
TRIED = 4
"""How many micro-batch sizes are timed, the largest that fit."""


@dataclass(frozen=True)
class Fit:
    """The values chosen, and lines for the log that explain them."""

    microbatch: int
    use_checkpoint: bool
    lines: list[str]


def fit(
    model: BackboneSettings,
    plan: StepPlan,
    diffusion: GaussianDiffusion,
    processes: Processes,
    before: int | None = None,
    always_estimate: bool = False,
) -> Fit:
    """Choose the micro-batch and use_checkpoint; collective if sizes have to be timed.

    before           Micro-batch of the run that this one resumes. It is kept if it fits, because dropout masks depend
                     on it.
    always_estimate  Estimate the memory on a CPU even if nothing is "auto", which takes seconds; on a GPU it is
                     always done.

    Raises UserError if not even one image fits.
    """
    train, share, micro = plan.train, plan.share, plan.micro
    fixed = train.microbatch != "auto" and model.use_checkpoint != "auto"
    if fixed and processes.device.type == "cpu" and not always_estimate:
        return Fit(micro, model.use_checkpoint is True, [])

    available = available_memory(processes)
    wanted = min(8, share) if train.microbatch == "auto" else micro
    for recompute in (False, True) if model.use_checkpoint == "auto" else (model.use_checkpoint is True,):
        settings = model.model_copy(update={"use_checkpoint": recompute})
        memory = estimate(
            settings, train, diffusion, plan.dtype, processes.device, plan.world_size, not plan.engine_reason
        )
        most = memory.most(int(available * (1 - SPARE)))
        if most >= wanted:
            break
    lines = [f"use_checkpoint auto: {recompute}"] if model.use_checkpoint == "auto" else []
    if train.microbatch == "auto":
        if not most:
            raise UserError(
                f"--microbatch auto: not even one image fits, {memory.describe(1, available)}; "
                + ("share the optimiser out over more processes" if recompute else "try --use_checkpoint True")
            )
        if before is not None and before <= most and share % before == 0:
            micro = before
            lines.append(f"microbatch auto: {micro}, as the run began")
        else:
            micro, rates = _fastest(settings, train, diffusion, processes, _parts(share, most)[:TRIED])
            tried = ", ".join(f"{size}: {rate:.4g} images/s" for size, rate in rates.items())
            lines.append(f"microbatch auto: {micro} ({tried})")
    elif micro > most:
        lines.append(f"this may not fit: try --microbatch auto{'' if recompute else ' or --use_checkpoint auto'}")
    return Fit(micro, recompute, [*lines, memory.describe(micro, available)])


def available_memory(processes: Processes) -> int:
    """Bytes that this process may use: the free memory of its GPU, or its share of the machine's free memory."""
    free = free_memory(processes.device)
    return free if processes.device.type == "cuda" else free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _parts(share: int, limit: int) -> list[int]:
    """Micro-batches of at most `limit` images that divide the share evenly, from large to small."""
    return [size for size in range(min(limit, share), 0, -1) if share % size == 0]


def _fastest(
    model: BackboneSettings,
    train: TrainSettings,
    diffusion: GaussianDiffusion,
    processes: Processes,
    sizes: Sequence[int],
) -> tuple[int, dict[int, float]]:
    """The size with the most images/s in forward and backward pass on the slowest process, and all sizes' rates."""
    seconds = torch.zeros(len(sizes), dtype=torch.float64)
    network = build_model(model).to(processes.device).train()
    network.set_precision(body_dtype(train.precision, processes.device))
    for i, size in enumerate(sizes):
        try:
            seconds[i] = _time(network, diffusion, processes.device, size) / size
        except torch.OutOfMemoryError:
            seconds[i] = float("inf")
        network.zero_grad(set_to_none=True)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    if processes.world_size > 1:
        slowest = seconds.to(processes.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = slowest.cpu()
    best = int(seconds.argmin())
    if not torch.isfinite(seconds[best]):
        raise UserError(f"--microbatch auto: not even {sizes[-1]} images fit at once; try --use_checkpoint True")
    return sizes[best], {size: 1 / each for size, each in zip(sizes, seconds.tolist(), strict=True)}


def _time(network: UNet, diffusion: GaussianDiffusion, device: torch.device, size: int) -> float:
    """Seconds of a forward and backward pass, the faster of two after one to warm up."""
    batch = dummy_batch(network.settings, size, device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        diffusion.training_losses(network, *batch)["loss"].mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
