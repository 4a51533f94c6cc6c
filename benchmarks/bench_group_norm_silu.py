"""Times group_norm_silu and add_group_norm_silu at the shapes of the shipped configurations.

Rows of group_norm_silu are ours, PyTorch eager, torch.compile and Liger-Kernel. The bytes counted are one read and one
write of the map forward, and reads of x and dy and a write of dx backward.

Rows of add_group_norm_silu are ours, the sum in eager PyTorch before our norm, and torch.compile of the definition. The
bytes counted are forward reads of a, b and skip and writes of the sum and y, and backward reads of the sum and skip, dy
and the sum's own gradient and writes of the gradients of the sum and skip.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastdiff.kernels import reference
from gpu_timing import rotated
from torch import Tensor

# Batch, channels of x and of the skip, side, whether there are scale and shift.
SHAPES = {
    "im64 64x64 C128": (128, 128, 0, 64, True),
    "im64 64x64 C128+128": (128, 128, 128, 64, False),
    "im64 32x32 C256": (128, 256, 0, 32, True),
    "im64 16x16 C384": (128, 384, 0, 16, True),
    "im64 8x8 C512": (128, 512, 0, 8, True),
    "270M 64x64 C192": (64, 192, 0, 64, True),
    "270M 16x16 C576+384": (64, 576, 384, 16, False),
    "cifar 32x32 C128": (256, 128, 0, 32, True),
    "upsample 256x256 C192": (4, 192, 0, 256, True),
    "lsun 256x256 C128": (8, 128, 0, 256, True),
    "sampling 64x64 C192": (2, 192, 0, 64, True),
}
IMPLEMENTATIONS = ["ours", "eager", "compile", "liger"]


def implementation(name: str) -> Callable[..., Tensor]:
    if name == "ours":
        if not torch.cuda.is_available():
            pytest.skip("Triton kernels need a GPU")
        from fastdiff.kernels.group_norm_silu import group_norm_silu

        return group_norm_silu
    if name == "eager":
        return reference.group_norm_silu
    if name == "compile":
        return torch.compile(reference.group_norm_silu, dynamic=False)
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("Liger-Kernel needs a GPU and to be installed")
    from liger_kernel.transformers.group_norm import LigerGroupNormFunction

    def liger(x: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
        """Liger's norm is channels-first, without SiLU and scale: eager PyTorch adds these."""
        skip, scale, shift = (settings.get(name) for name in ("skip", "scale", "shift"))
        x = x if skip is None else torch.cat([x, skip], dim=1)
        B, C, H, W = x.shape
        y = LigerGroupNormFunction.apply(x.flatten(2).contiguous(), weight, bias, C, 32, 1e-5).view(B, C, H, W)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return torch.nn.functional.silu(y).to(x.dtype)

    return liger


def make_inputs(shape: str, device: torch.device, small: bool) -> Callable[[int], tuple[Any, ...]]:
    B, C1, C2, side, affine = SHAPES[shape]
    if small:
        B, side = 2, min(side, 32)
    C = C1 + C2

    def make(i: int) -> tuple[Any, ...]:
        torch.manual_seed(i)
        maps = [
            torch.randn(B, side, side, c, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2).requires_grad_()
            for c in (C1, C2)
            if c
        ]
        settings = {"skip": maps[1] if C2 else None}
        if affine:
            settings |= {n: torch.randn(B, C, device=device, requires_grad=True) for n in ("scale", "shift")}
        weight, bias = torch.randn(C, device=device, requires_grad=True), torch.randn(C, device=device)
        return maps[0], weight, bias.requires_grad_(), settings

    return make


def _ids(params: list[str]) -> list[str]:
    return [name.replace(" ", "_") for name in params]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=_ids(list(SHAPES)))
def bench_forward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"group_norm_silu forward {shape}"
    function, make = implementation(name), make_inputs(shape, device, small)
    inputs = rotated(make)
    x, weight, _, settings = inputs[0]
    elements = x.numel() // x.shape[1] * weight.shape[0]

    def call(x: Tensor, weight: Tensor, bias: Tensor, settings: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return function(x, weight, bias, **settings)

    gpu_time(call, inputs, bytes_moved=2 * elements * x.itemsize)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=_ids(list(SHAPES)))
def bench_backward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"group_norm_silu backward {shape}"
    function, make = implementation(name), make_inputs(shape, device, small)

    def with_graph(i: int) -> tuple[Any, ...]:
        x, weight, bias, settings = make(i)
        y = function(x, weight, bias, **settings)
        leaves = [x, weight, bias, *(v for v in settings.values() if v is not None)]
        return y, leaves, torch.randn_like(y)

    inputs = rotated(with_graph)
    y = inputs[0][0]
    gpu_time(
        lambda y, leaves, upstream: torch.autograd.grad(y, leaves, upstream, retain_graph=True),
        inputs,
        bytes_moved=3 * y.numel() * y.itemsize,
    )


SUM_IMPLEMENTATIONS = ["ours", "separate", "compile"]


def sum_implementation(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "compile":
        return torch.compile(reference.add_group_norm_silu, dynamic=False)
    if not torch.cuda.is_available():
        pytest.skip("Triton kernels need a GPU")
    from fastdiff.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu

    if name == "ours":
        return add_group_norm_silu

    def separate(
        a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, b_bias: Tensor, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute it as a network does without the op: the convolution adds its bias, the block the residual."""
        total = a + (b + b_bias.to(b.dtype)[:, None, None])
        return total, group_norm_silu(total, weight, bias, **settings)

    return separate


def make_sums(shape: str, device: torch.device, small: bool) -> Callable[[int], tuple[Any, ...]]:
    make = make_inputs(shape, device, small)

    def make_sum(i: int) -> tuple[Any, ...]:
        a, weight, bias, settings = make(i)
        b_bias = torch.randn(a.shape[1], device=device, requires_grad=True)
        return a, torch.randn_like(a).requires_grad_(), weight, bias, {**settings, "b_bias": b_bias}

    return make_sum


@pytest.mark.parametrize("name", SUM_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=_ids(list(SHAPES)))
def bench_sum_forward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"add_group_norm_silu forward {shape}"
    function = sum_implementation(name)
    inputs = rotated(make_sums(shape, device, small))
    a, _, weight, *_ = inputs[0]
    elements = a.numel() // a.shape[1] * weight.shape[0]

    def call(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, settings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return function(a, b, weight, bias, **settings)

    gpu_time(call, inputs, bytes_moved=(2 * elements + 2 * a.numel()) * a.itemsize)


@pytest.mark.parametrize("name", SUM_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=_ids(list(SHAPES)))
def bench_sum_backward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"add_group_norm_silu backward {shape}"
    function, make = sum_implementation(name), make_sums(shape, device, small)

    def with_graph(i: int) -> tuple[Any, ...]:
        a, b, weight, bias, settings = make(i)
        total, y = function(a, b, weight, bias, **settings)
        leaves = [a, b, weight, bias, *(v for v in settings.values() if v is not None)]
        return total, y, leaves, torch.randn_like(total), torch.randn_like(y)

    inputs = rotated(with_graph)
    total, y = inputs[0][:2]
    gpu_time(
        lambda total, y, leaves, *upstream: torch.autograd.grad([total, y], leaves, upstream, retain_graph=True),
        inputs,
        bytes_moved=(3 * y.numel() + total.numel()) * y.itemsize,
    )
