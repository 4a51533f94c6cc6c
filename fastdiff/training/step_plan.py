"""How this run takes an optimiser step: derived once from the settings and handed to everything that depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff.errors import UserError
from fastdiff.models.unet import body_dtype
from fastdiff.runtime.processes import Processes
from fastdiff.settings import merge
from fastdiff.training.settings import TrainSettings

BUCKET = 50_000_000
"""Elements that ZeRO reduces at once. DeepSpeed's default of 500 million would take 1 GB in 16 bits."""
# Sections of DeepSpeed's JSON that hold nothing beyond our own settings.
_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "zero_allow_untested_optimizer",
}


@dataclass(frozen=True)
class StepPlan:
    """The settings that an optimiser step depends on, and what follows from them on these processes.

    train          the training settings; `resolved` replaces an auto in them
    deepspeed      the user's section of DeepSpeed's JSON
    world_size     number of processes
    dtype          dtype of the network's body
    engine_reason  why a step goes through DeepSpeed's engine; empty: one process takes it alone (`DeviceStep`)
    micro          images that a process computes at once
    """

    train: TrainSettings
    deepspeed: dict[str, Any]
    world_size: int
    dtype: torch.dtype
    engine_reason: str
    micro: int

    def __post_init__(self) -> None:
        given = self.deepspeed.get("gradient_accumulation_steps", "auto")
        if given not in ("auto", self.accumulation):
            raise UserError(
                f"deepspeed.gradient_accumulation_steps {given} contradicts batch_size {self.train.batch_size}, "
                f"microbatch {self.train.microbatch} and {self.world_size} processes, which make {self.accumulation}"
            )

    @property
    def share(self) -> int:
        """Images per process and optimiser step."""
        return self.train.batch_size // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.share // self.micro

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are multiplied by a number before the update, to clip them or to undo a loss scale."""
        return self.train.precision == "fp16" or self.train.grad_clip > 0

    def resolved(self, micro: int, compiles: bool) -> StepPlan:
        """The plan with the micro-batch and the switch `compile` that an auto came to."""
        train = self.train.model_copy(update={"microbatch": micro, "compile": compiles})
        return replace(self, train=train, micro=micro)

    def deepspeed_json(self) -> dict[str, Any]:
        """DeepSpeed's JSON: what follows from the settings, with the user's section laid over it."""
        train = self.train
        derived: dict[str, Any] = {
            "train_batch_size": train.batch_size,
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": train.grad_clip,
            "zero_optimization": {
                "stage": train.zero_stage,
                **({"reduce_bucket_size": BUCKET} if train.zero_stage else {}),
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if not self.engine_reason:  # DeviceStep takes the step; DeepSpeed only holds float32 weights
            return {**derived, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
        if train.precision == "bf16":
            derived["bf16"] = {"enabled": True}
        if train.precision == "fp16":
            # improved-diffusion's scaler: 2^20 at first, log2 grows steadily, halves at once when a gradient overflows.
            window = max(1, round(1 / train.fp16_scale_growth))
            derived["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": window, "hysteresis": 1}
        result = merge(derived, {key: value for key, value in self.deepspeed.items() if value != "auto"})
        result["train_micro_batch_size_per_gpu"] = self.micro  # the user's is a limit, as microbatch is
        return result


def plan_step(train: TrainSettings, deepspeed: dict[str, Any], processes: Processes) -> StepPlan:
    """The plan of a step. Until `resolved`, an auto micro-batch is the whole share of a process.

    Raises UserError for a batch that can't be shared out evenly and for settings that contradict each other.
    """
    micro, _ = split_batch(train, processes.world_size)
    reason = needs_engine(train, deepspeed, processes.world_size)
    plan = StepPlan(
        train, deepspeed, processes.world_size, body_dtype(train.precision, processes.device), reason, micro
    )
    if train.cuda_graph and reason:
        raise UserError(f"--cuda_graph True can't be had with {reason}; leave one of them out")
    return plan


def split_batch(train: TrainSettings, world_size: int) -> tuple[int, int]:
    """(micro-batch of one process, micro-batches per optimiser step) for the global batch.

    The micro-batches are equal, so that the mean over them is the mean over images. Raises UserError for a batch that
    can't be shared out evenly.
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
    """Why a step must go through DeepSpeed; empty where one process can take it alone (`DeviceStep`).

    A lone process has nothing to shard, and DeepSpeed's 16-bit optimisers would wait for the GPU in every step.
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
