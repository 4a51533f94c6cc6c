"""The DeepSpeed engine: its configuration from ours, and the one place that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.models import UNet
from fastdiff.models.unet import body_dtype
from fastdiff.runtime.processes import Processes, join
from fastdiff.settings import merge
from fastdiff.training.optimizer import AdamWEMA
from fastdiff.training.settings import TrainSettings

BUCKET = 50_000_000
"""Elements that ZeRO reduces at once. DeepSpeed's own 500 million would take 1 GB in 16 bits."""
_TIMEOUT_MARGIN = 2.0  # minutes
_LONGEST = 60.0
"""Minutes in which one rank may write, compile or draw while others wait for it."""
# Those that say nothing which the settings don't.
_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "zero_allow_untested_optimizer",
}


def split_batch(train: TrainSettings, world_size: int) -> tuple[int, int]:
    """(images one process takes at once, how often per optimiser step), for the global batch.

    Equal parts, so that the mean over micro-batches is the mean over images. Raises UserError when the batch can't be
    shared out evenly.
    """
    if train.batch_size % world_size:
        near = max(1, round(train.batch_size / world_size)) * world_size
        raise UserError(
            f"batch_size {train.batch_size} is over all processes and can't be shared by {world_size}; {near} can"
        )
    share = train.batch_size // world_size
    limit = share if train.microbatch in (-1, "auto") else min(int(train.microbatch), share)
    micro = max(size for size in range(1, limit + 1) if share % size == 0)
    return micro, share // micro


def needs_engine(train: TrainSettings, deepspeed: dict[str, Any], world_size: int) -> str:
    """Why a step must go through DeepSpeed; empty where one process can take it alone (`steps.DeviceStep`).

    Alone there is nothing to share out, and DeepSpeed's 16-bit optimisers would wait for the GPU in every step.
    """
    if world_size > 1:
        return f"{world_size} processes"
    if train.zero_stage > 1:
        return f"zero_stage {train.zero_stage}"
    followed = {"zero_optimization": {"stage"}, "fp16": {"enabled"}, "bf16": {"enabled"}}
    for section, value in deepspeed.items():
        if section in followed:
            others = sorted(set(value) - followed[section])
            if others:
                return f"deepspeed.{section}.{others[0]}"
        elif section not in _KNOWN:
            return f"deepspeed.{section}"
    return ""


def _zero(stage: int, world_size: int) -> dict[str, Any]:
    if not stage:
        return {"stage": 0}
    overlap = {"overlap_comm": True} if world_size > 1 and torch.cuda.is_available() else {}
    return {"stage": stage, "reduce_bucket_size": BUCKET, **overlap}


def deepspeed_config(train: TrainSettings, deepspeed: dict[str, Any], world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for the settings, with the user's own laid over it."""
    micro, accumulation = split_batch(train, world_size)
    given = deepspeed.get("gradient_accumulation_steps", "auto")
    if given not in ("auto", accumulation):
        raise UserError(
            f"deepspeed.gradient_accumulation_steps {given} contradicts batch_size {train.batch_size}, microbatch "
            f"{train.microbatch} and {world_size} processes, which make {accumulation}"
        )
    derived: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": {
            "stage": train.zero_stage,
            **({"reduce_bucket_size": BUCKET} if train.zero_stage else {}),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine_only = needs_engine(train, deepspeed, world_size)
    if train.cuda_graph and engine_only:
        raise UserError(f"--cuda_graph True can't be had with {engine_only}; leave one of them out")
    if not engine_only:  # the step is ours, see steps.DeviceStep; DeepSpeed only holds float32 weights
        return {**derived, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
    if train.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if train.precision == "fp16":
        # improved-diffusion's scaler: 2^20 at first, log2 grows steadily, halves at once when a gradient overflows.
        window = max(1, round(1 / train.fp16_scale_growth))
        derived["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": window, "hysteresis": 1}
    without_auto = {key: value for key, value in deepspeed.items() if value != "auto"}
    result = merge(derived, without_auto)
    result["train_micro_batch_size_per_gpu"] = micro  # the user's is a limit, as microbatch is
    return result


def _import_deepspeed() -> Any:
    """deepspeed, quiet, on the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"training needs DeepSpeed, which can't be imported ({error}); pip install deepspeed"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory reduction for CPUs would be compiled at every first start: a minute, and a compiler needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def collective_timeout(stall_minutes: float) -> timedelta:
    """For collectives: longer than anything that is well takes, for it is the watchdog that ends what hangs."""
    return timedelta(minutes=max(stall_minutes, _LONGEST) + _TIMEOUT_MARGIN)


def start_processes(stall_minutes: float = 10.0, early: bool = False) -> Processes:
    """Join the other processes, with DeepSpeed's communication set up.

    The others must come within stall_minutes and a margin, or within `collective_timeout` where this process may be
    early. From then on that is the time-out of every collective.
    """
    timeout = collective_timeout(stall_minutes)
    # DeepSpeed makes its groups without naming a time-out: torch's default becomes ours.
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    processes = join(timeout=timeout if early else timedelta(minutes=stall_minutes + _TIMEOUT_MARGIN))
    if processes.world_size > 1:
        c10d._set_pg_timeout(timeout)
    deepspeed = _import_deepspeed()
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # alone, without a launcher: no port is needed
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return processes


@contextmanager
def _no_broadcasts(deepspeed: Any) -> Iterator[None]:
    """DeepSpeed broadcasts every weight, even where there is no other rank. On a GPU this first collective would start
    NCCL, which a lone process that steps on the device alone never needs.
    """
    broadcast = deepspeed.comm.broadcast
    deepspeed.comm.broadcast = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.broadcast = broadcast


def create_engine(
    model: UNet, train: TrainSettings, deepspeed_section: dict[str, Any], processes: Processes
) -> tuple[Any, AdamWEMA]:
    """The engine around the model, and the optimiser inside it. Weights of the model must be loaded before."""
    deepspeed = _import_deepspeed()
    config = deepspeed_config(train, deepspeed_section, processes.world_size)
    offloaded = "offload_optimizer" in config["zero_optimization"]  # then the masters lie on the CPU
    fused_kernel = ops.uses_kernels(next(model.parameters())) and not offloaded
    optimizer = AdamWEMA(model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused_kernel=fused_kernel)
    try:
        with _no_broadcasts(deepspeed) if processes.world_size == 1 else nullcontext():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    except Exception as error:  # DeepSpeed checks its JSON with many kinds of exception
        if not deepspeed_section:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"deepspeed: DeepSpeed refuses these settings: {reason}") from error
    model.set_precision(body_dtype(train.precision, processes.device))
    return engine, optimizer
