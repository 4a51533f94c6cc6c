"""The fused 3x3 convolution against cuDNN: alone, and with the norm, SiLU and residual addition that surround it.

    pytest benchmarks/bench_conv3x3.py --benchmark-json out.json

TFLOP/s count the convolution only (18 * B * H * W * C_in * C_out), so that within a group they compare as times do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels.conv3x3 import conv3x3, pack_weight, plan
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a GPU")

L2 = 60 << 20  # bytes


class Shape(NamedTuple):
    B: int
    C1: int
    C2: int  # of the skip
    C_out: int
    size: int

    def __str__(self) -> str:
        skip = f"+{self.C2}" if self.C2 else ""
        return f"{self.B}x{self.C1}{skip}->{self.C_out} {self.size}x{self.size}"

    def smaller(self) -> Shape:
        return Shape(2, 16, 16 if self.C2 else 0, 16, 8)


# Of the shipped configurations, at batches that sampling uses.
SHAPES = [
    Shape(64, 128, 0, 128, 64),
    Shape(64, 128, 128, 128, 64),
    Shape(64, 192, 0, 192, 64),
    Shape(256, 384, 0, 384, 16),
    Shape(256, 512, 0, 512, 8),
    Shape(256, 768, 0, 768, 8),
]


class Inputs(NamedTuple):
    x: Tensor
    skip: Tensor | None
    weight: Tensor
    packed: Tensor
    bias: Tensor
    mean: Tensor
    gain: Tensor
    offset: Tensor
    residual: Tensor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    B, C1, C2, C_out, size = shape
    dtype = torch.bfloat16

    def image(C: int) -> Tensor:
        return torch.randn(B, size, size, C, device=device, dtype=dtype).permute(0, 3, 1, 2)

    weight = torch.randn(C_out, C1 + C2, 3, 3, device=device, dtype=dtype) * (9 * (C1 + C2)) ** -0.5
    mean, gain, offset = torch.randn(3, B, C1 + C2, device=device).unbind()
    return Inputs(
        x=image(C1),
        skip=image(C2) if C2 else None,
        weight=weight.contiguous(memory_format=torch.channels_last),
        packed=pack_weight(weight),
        bias=torch.randn(C_out, device=device, dtype=dtype),
        mean=mean.contiguous(),
        gain=gain.contiguous(),
        offset=offset.contiguous(),
        residual=image(C_out),
    )


def cudnn(i: Inputs) -> Tensor:
    h = i.x if i.skip is None else torch.cat([i.x, i.skip], dim=1)
    return F.conv2d(h, i.weight, i.bias, padding=1)


def ours_fused(i: Inputs) -> Any:
    norm = {"mean": i.mean, "gain": i.gain, "offset": i.offset}
    return conv3x3(i.x, i.packed, i.bias, skip=i.skip, residual=i.residual, moments=True, **norm)


def apply_norm(i: Inputs) -> Tensor:
    h = i.x if i.skip is None else torch.cat([i.x, i.skip], dim=1)
    wide = (h.float() - i.mean[:, :, None, None]) * i.gain[:, :, None, None] + i.offset[:, :, None, None]
    return F.silu(wide).to(h.dtype)


def cudnn_unfused(i: Inputs) -> Tensor:
    return F.conv2d(apply_norm(i), i.weight, i.bias, padding=1) + i.residual


def ours_after_norm(i: Inputs) -> Any:
    """The norm in one pass of its own, which lets the convolution read through tensor maps."""
    return conv3x3(compiled(apply_norm)(i), i.packed, i.bias, residual=i.residual, moments=True)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    if fn not in _compiled:
        _compiled[fn] = torch.compile(fn, fullgraph=True, dynamic=False)
    return _compiled[fn]


ALONE: dict[str, Callable[..., Any]] = {
    "ours, pointers": lambda i: conv3x3(i.x, i.packed, i.bias, skip=i.skip, tma=False),
    "ours, tensor maps": lambda i: conv3x3(i.x, i.packed, i.bias, skip=i.skip, tma=True),
    "cudnn": cudnn,
    "compile": lambda i: compiled(cudnn)(i),
}
BLOCK: dict[str, Callable[..., Any]] = {
    "ours, fused": ours_fused,
    "ours, norm apart": ours_after_norm,
    "cudnn, unfused": cudnn_unfused,
    "compile": lambda i: compiled(cudnn_unfused)(i),
}


def rows(variants: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=needs_gpu if name.startswith("ours") else ()) for name in variants]


def run(what: str, shape: Shape, fn: Callable[..., Any], gpu_time: Any, benchmark: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # its best algorithm
    B, C1, C2, C_out, size = shape
    map_bytes = 2 * B * size**2 * (C1 + C2 + C_out)
    sets = max(2, math.ceil(2 * L2 / map_bytes)) if device.type == "cuda" else 1
    benchmark.group = f"{what} {shape}"
    inputs = [(make_inputs(shape, device),) for _ in range(sets)]
    with torch.no_grad():
        gpu_time(fn, inputs, flops=18 * B * size**2 * (C1 + C2) * C_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", rows(ALONE))
def bench_alone(row: str, shape: Shape, small: bool, gpu_time: Any, benchmark: Any, device: torch.device) -> None:
    """Convolution and bias."""
    if row == "ours, tensor maps":
        if torch.cuda.get_device_capability(device)[0] < 9:
            pytest.skip("tensor maps need compute capability 9.0")
        B, C1, C2, C_out, size = shape
        assert plan(B, size, size, C1, C2, C_out, torch.bfloat16, False, True).box is not None
    run("conv", shape.smaller() if small else shape, ALONE[row], gpu_time, benchmark, device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", rows(BLOCK))
def bench_block(row: str, shape: Shape, small: bool, gpu_time: Any, benchmark: Any, device: torch.device) -> None:
    """A norm's affine map, SiLU, convolution, bias and residual; ours also returns the moments for the next norm."""
    run("block", shape.smaller() if small else shape, BLOCK[row], gpu_time, benchmark, device)
