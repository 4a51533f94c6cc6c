"""Whether a training run compiles its network, and how under DeepSpeed."""

from __future__ import annotations

import torch

from fastdiff.models import UNet
from fastdiff.runtime.compilation import compile_kwargs, missing_compiler
from fastdiff.training.settings import TrainSettings

WORTHWHILE_STEPS = 20_000
"""On a CPU the compiled step saves 5 to 10%, and compiling takes two minutes."""


def decide(train: TrainSettings, device: torch.device, steps_left: int, before: bool | None = None) -> tuple[bool, str]:
    """Whether to compile, and why, for the settings' `compile`; before is what a run did that goes on."""
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
    """Compile what the network computes, and nothing around it.

    DeepSpeed's `engine.compile` would take in the hooks that it hangs on the module, which count micro-batches: Dynamo
    compiles them anew at every count.
    """
    kwargs = compile_kwargs(next(model.parameters()).device, fullgraph=zero_stage < 3)
    model.forward = torch.compile(model.forward, **kwargs)  # type: ignore[method-assign]
