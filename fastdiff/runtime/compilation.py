"""Options of torch.compile, the folder of compiled code, and PyTorch's switches for cuDNN and TF32."""

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
    """The folder for results that later runs use again: ~/.cache/fastdiff, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


def keep_compiled_code() -> Path:
    """Store Inductor's code in `cache_folder` instead of /tmp, unless TORCHINDUCTOR_CACHE_DIR is set.

    Triton's cache is put inside it, unless TRITON_CACHE_DIR is set. Inductor would do that too, but only at its first
    compilation, after kernels were launched. Must be called before anything is compiled. Returns Inductor's folder.
    """
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor")))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


def missing_compiler(device: torch.device) -> str:
    """The reason why nothing can be compiled for a device; empty if it can."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "on a CPU it needs a C++ compiler (g++, or CXX), and there is none"
    return ""


def compile_kwargs(device: torch.device, fullgraph: bool = True, frozen: bool = False) -> dict[str, Any]:
    """Arguments of torch.compile: one graph with fixed shapes, and on a GPU channels-last throughout.

    Inductor's own heuristic (`GraphLowering.decide_layout_opt`) would not use channels-last for this network, because
    some convolutions have at most half as many output channels as input channels. On a CPU weights that no longer
    change (frozen) are stored in oneDNN's layout.
    """
    options: dict[str, Any] = {"force_layout_optimization": True} if device.type == "cuda" else {}
    if frozen and device.type == "cpu":
        options["freezing"] = True
    return {"fullgraph": fullgraph, "dynamic": False, **({"options": options} if options else {})}


def prepare_cudnn(deterministic: bool = False, benchmark_limit: int = 10) -> str:
    """Let cuDNN time up to `benchmark_limit` plans (0: all) at the first use of every shape of a convolution.

    PyTorch keeps the choice as long as the process runs, and can't store it. deterministic: no choice by time, and only
    algorithms that give the same bits every time. Must be called before cuBLAS is first used. Returns a line for the
    log.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = benchmark_limit
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no code reads it before writing
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return "cuDNN: its deterministic algorithms, by its own choice"
    plans = f"up to {benchmark_limit}" if benchmark_limit else "all"
    return f"cuDNN: the fastest of {plans} plans for each convolution, timed when that first comes"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 within the block, for float32 matrix products and convolutions on a GPU.

    TF32 rounds the factors to 10 bits of mantissa, so that tensor cores can multiply them. By default PyTorch allows it
    to cuDNN and not to cuBLAS. The state belongs to the process, not to the thread; it is restored afterwards. The
    Triton kernels of `kernels/` multiply float32 numbers exactly in either case.

    PyTorch's older switches (`allow_tf32`) also set its newer ones (`fp32_precision`), but not the other way round. If
    the two disagree, reading an older one raises an error, and parts of Inductor read it. So every switch is set, also
    oneDNN's, which `torch.set_float32_matmul_precision` sets together with cuBLAS's.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    general = torch.backends.fp32_precision  # type: ignore[attr-defined]
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer switches disagree already, so there is nothing to restore
        products = ""
    if not allowed:  # Inductor recommends TF32 whenever it compiles a float32 product for a GPU
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    try:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # convolutions would inherit it
        torch.set_float32_matmul_precision("highest")
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.backends.fp32_precision = general  # type: ignore[attr-defined]
        if products:
            torch.set_float32_matmul_precision(products)
        matmul.allow_tf32, cudnn.allow_tf32 = before
        if products == "medium":  # allow_tf32 has changed it to "high"
            torch.set_float32_matmul_precision(products)
