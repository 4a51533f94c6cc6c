"""Whether and how the network is compiled, and where what was compiled is kept for the next run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastdiff.models import UNet
from fastdiff.training.settings import TrainSettings

WORTHWHILE_STEPS = 20_000
"""On a CPU the compiled step saves 5 to 10%, and compiling takes two minutes."""


def keep_compiled_code() -> Path:
    """Let Inductor keep its code in the user's cache folder, not in /tmp, unless TORCHINDUCTOR_CACHE_DIR says where.

    Triton's own cache is beside it. To be called before anything is compiled.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "fastdiff" / "inductor"))
    return Path(folder)


def decide(train: TrainSettings, device: torch.device, steps_left: int) -> tuple[bool, str]:
    """Whether to compile, and why, for the settings' `compile`."""
    if train.compile != "auto":
        return bool(train.compile), f"compile {train.compile}"
    if train.zero_stage == 3:
        return False, "zero_stage 3 gathers weights block by block, which a compiled network can't"
    if device.type == "cuda":
        return True, "a GPU"
    if steps_left < WORTHWHILE_STEPS:
        return False, f"on a CPU not worth it for fewer than {WORTHWHILE_STEPS} steps"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False, "on a CPU it needs a C++ compiler (g++, or CXX), and there is none"
    return True, f"{steps_left} steps to go"


def compile_kwargs(device: torch.device, zero_stage: int) -> dict[str, Any]:
    """Of torch.compile: one graph with fixed shapes, and on a GPU channels-last throughout.

    Inductor's own heuristic would leave channels-last off for this network: it has convolutions with half as many
    output channels as input channels, or fewer (`GraphLowering.decide_layout_opt`).
    """
    options: dict[str, Any] = {"force_layout_optimization": True} if device.type == "cuda" else {}
    return {"fullgraph": zero_stage < 3, "dynamic": False, **({"options": options} if options else {})}


def compile_network(model: UNet, zero_stage: int) -> None:
    """Compile what the network computes, and nothing around it.

    DeepSpeed's `engine.compile` would take in the hooks that it hangs on the module, which count micro-batches: Dynamo
    compiles them anew at every count.
    """
    kwargs = compile_kwargs(next(model.parameters()).device, zero_stage)
    model.forward = torch.compile(model.forward, **kwargs)  # type: ignore[method-assign]


def prepare_cudnn() -> None:
    """Let cuDNN time all its plans for every shape that comes; by default it looks at ten."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 0
