"""How a network is compiled, where what was compiled is kept for the next run, and PyTorch's switches for a GPU."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """Where fastdiff keeps what it needn't find out twice: ~/.cache/fastdiff, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


def keep_compiled_code() -> Path:
    """Let Inductor keep its code in the cache folder, not in /tmp, unless TORCHINDUCTOR_CACHE_DIR says where.

    Triton's own cache is in it, unless TRITON_CACHE_DIR says otherwise. Inductor would set that, too, but only when it
    first compiles, and kernels that were launched before would lie elsewhere. To be called before anything is compiled.
    """
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor")))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


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


def prepare_cudnn(deterministic: bool = False, benchmark_limit: int = 10) -> str:
    """Let cuDNN time its plans for every shape of a convolution that comes, up to `benchmark_limit` of them (0: all);
    returns a line that says so. PyTorch keeps the choice while the process runs, and has no way to store it.

    deterministic: no choice by time, and only algorithms that give the same bits every time. To be called before cuBLAS
    is first used.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = benchmark_limit
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is filled
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return "cuDNN: its deterministic algorithms, by its own choice"
    plans = f"up to {benchmark_limit}" if benchmark_limit else "all"
    return f"cuDNN: the fastest of {plans} plans for each convolution, timed when that first comes"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block, products of float32 matrices and float32 convolutions on a GPU may use TF32, or may not.

    TF32 rounds the factors to 10 bits of mantissa, so that tensor cores can multiply them. By default PyTorch allows it
    to cuDNN and not to cuBLAS. The state is the process's, not the thread's; the one from before comes back afterwards.
    The Triton kernels of `kernels/` multiply float32 numbers exactly in either case.

    PyTorch's older switches (`allow_tf32`) set its newer ones (`fp32_precision`) as well. The newer ones don't set the
    older, and where the two disagree PyTorch raises an error as soon as it reads an older one, as parts of Inductor do.
    So every switch is set, oneDNN's too, which `torch.set_float32_matmul_precision` holds together with cuBLAS's.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    general = torch.backends.fp32_precision  # type: ignore[attr-defined]
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer switches disagree already: there is nothing to bring back
        products = ""
    if not allowed:  # Inductor recommends TF32 wherever it compiles a float32 product for a GPU
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    try:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # which convolutions would follow
        torch.set_float32_matmul_precision("highest")
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.backends.fp32_precision = general  # type: ignore[attr-defined]
        if products:
            torch.set_float32_matmul_precision(products)
        matmul.allow_tf32, cudnn.allow_tf32 = before
        if products == "medium":  # allow_tf32 has made "high" of it
            torch.set_float32_matmul_precision(products)
