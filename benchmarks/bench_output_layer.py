"""Times the network's last layer: ours, the norm's kernel and cuDNN on float32 maps, torch.compile of the definition.

The bytes counted are one read of the 16-bit map and the result's write forward, and two reads and a write of the map
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels import reference
from gpu_timing import rotated
from torch import Tensor

# Batch, channels of the map and of the result, side.
SHAPES = {
    "270M 64x64 C192": (128, 192, 6, 64),
    "cifar 32x32 C128": (256, 128, 6, 32),
    "upsample 256x256 C192": (4, 192, 6, 256),
    "sampling 64x64 C192": (16, 192, 6, 64),
}
IMPLEMENTATIONS = ["ours", "two ops", "compile"]


def implementation(name: str) -> Callable[..., Tensor]:
    if name == "compile":
        return torch.compile(reference.output_layer, dynamic=False)
    if not torch.cuda.is_available():
        pytest.skip("Triton kernels need a GPU")
    from fastdiff.kernels.group_norm_silu import group_norm_silu
    from fastdiff.kernels.output_layer import output_layer

    if name == "ours":
        return output_layer
    return lambda x, weight, bias, conv_weight, conv_bias: F.conv2d(
        group_norm_silu(x.float(), weight, bias), conv_weight, conv_bias, padding=1
    )


def make_inputs(shape: str, device: torch.device, small: bool) -> Callable[[int], tuple[Tensor, ...]]:
    B, C, out, side = SHAPES[shape]
    if small:
        B, side = 2, min(side, 32)

    def make(i: int) -> tuple[Tensor, ...]:
        torch.manual_seed(i)
        x = torch.randn(B, side, side, C, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        shapes = ((C,), (C,), (out, C, 3, 3), (out,))
        return x.requires_grad_(), *(torch.randn(each, device=device, requires_grad=True) for each in shapes)

    return make


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda name: name.replace(" ", "_"))
def bench_forward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"output_layer forward {shape}"
    function, inputs = implementation(name), rotated(make_inputs(shape, device, small))
    x, *_, bias = inputs[0]

    def call(*given: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*given)

    gpu_time(call, inputs, bytes_moved=x.numel() * x.itemsize + 4 * len(bias) * x.numel() // x.shape[1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda name: name.replace(" ", "_"))
def bench_backward(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"output_layer backward {shape}"
    function, make = implementation(name), make_inputs(shape, device, small)

    def with_graph(i: int) -> tuple[Any, ...]:
        leaves = make(i)
        y = function(*leaves)
        return y, leaves, torch.randn_like(y)

    inputs = rotated(with_graph)
    x = inputs[0][1][0]
    gpu_time(
        lambda y, leaves, upstream: torch.autograd.grad(y, leaves, upstream, retain_graph=True),
        inputs,
        bytes_moved=3 * x.numel() * x.itemsize,
    )
