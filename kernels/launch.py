"""Functions that all kernel files share: registering ops, launching kernels, recording launches without making them.

A recorded launch holds everything that determines the compiled code, so kernels can be compiled without the GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel."""

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""Name of each op in the `fastdiff` namespace → the Python function that launches its kernels."""


def kernel_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the torch op fastdiff::name, opaque to torch.compile; its fake and backward come later."""

    def register(fn: Callable[..., Any]) -> Any:
        IMPLEMENTATIONS[name] = fn
        return torch.library.custom_op(f"fastdiff::{name}", fn, mutates_args=mutates_args)

    return register


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: positional arguments, then constexprs by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the kernel's call."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS, **self.constexprs}


_recorded: list[Launch] | None = None
listener: Callable[[Launch], None] | None = None
"""A function that is called with every launch before it is made."""


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any
) -> None:
    """kernel[grid](*args, **constexprs); inside `record` the launch is recorded and nothing runs."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    if listener is not None:
        listener(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
    options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS, **constexprs}
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:  # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them; with tensors on the meta device nothing is allocated either."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 132 (H100, H200) for any other device."""
    return _processors(device) if device.type == "cuda" else 132


# --- layouts ---


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def channels_last(x: Tensor, op: str, name: str) -> Tensor:
    """A map [B, C, H, W] in channels-last memory; any other layout is converted, with one warning per op."""
    if x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return x
    if not torch.compiler.is_compiling():
        _warn_once(
            f"{op}: {name} came in another layout than channels-last and is copied at every call; "
            "use .to(memory_format=torch.channels_last) once"
        )
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(B: int, C: int, H: int, W: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels-last map, also where C, H or W is 1 and PyTorch could call it either layout."""
    return torch.empty(B, H, W, C, dtype=dtype or like.dtype, device=like.device).permute(0, 3, 1, 2)
