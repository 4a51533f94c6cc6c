"""How a network is compiled, and where what was compiled is kept for the next run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """Where fastdiff keeps what it needn't find out twice: ~/.cache/fastdiff, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


def keep_compiled_code() -> Path:
    """Let Inductor keep its code in the cache folder, not in /tmp, unless TORCHINDUCTOR_CACHE_DIR says where.

    Triton's own cache is beside it. To be called before anything is compiled.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor")))


def missing_compiler(device: torch.device) -> str:
    """What stands in the way of compiling for a device; empty where nothing does."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "on a CPU it needs a C++ compiler (g++, or CXX), and there is none"
    return ""


def compile_kwargs(device: torch.device, fullgraph: bool = True, frozen: bool = False) -> dict[str, Any]:
    """Of torch.compile: one graph with fixed shapes, and on a GPU channels-last throughout.

    Inductor's own heuristic would leave channels-last off for this network: it has convolutions with half as many
    output channels as input channels, or fewer (`GraphLowering.decide_layout_opt`). On a CPU weights that no longer
    change (frozen) are kept as oneDNN reads them.
    """
    options: dict[str, Any] = {"force_layout_optimization": True} if device.type == "cuda" else {}
    if frozen and device.type == "cpu":
        options["freezing"] = True
    return {"fullgraph": fullgraph, "dynamic": False, **({"options": options} if options else {})}


def prepare_cudnn(deterministic: bool = False) -> None:
    """Let cuDNN time all its plans for every shape that comes; by default it looks at ten.

    deterministic: no choice by time, and only algorithms that give the same bits every time. To be called before cuBLAS
    is first used.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = 0
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is filled
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
