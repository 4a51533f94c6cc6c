"""Times attention over packed heads against torch's fused attention, eager PyTorch and torch.compile.

    pytest benchmarks/bench_attention.py --benchmark-json out.json

Every row takes qkv [B, L, 3C] and returns [B, L, C], and its backward pass returns one gradient of qkv's shape. So the
time of scaled-dot-product attention includes unpacking the heads and putting three gradients together. TFLOP/s count
4 * B * N * L^2 * D forward and 10 * B * N * L^2 * D backward, whatever a row recomputes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from fastdiff.kernels import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a GPU")

L2 = 60 << 20  # bytes
Attention = Callable[[Tensor, int], Tensor]


class Shape(NamedTuple):
    B: int
    L: int
    N: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} L{self.L} N{self.N} D{self.D}"

    def smaller(self) -> Shape:
        return Shape(2, min(self.L, 64), self.N, min(self.D, 32))


SHAPES = [
    Shape(128, 256, 4, 64),  # CIFAR-10, 16x16
    Shape(128, 64, 4, 64),  # CIFAR-10, 8x8
    Shape(64, 256, 4, 96),  # ImageNet-64
    Shape(64, 64, 4, 128),
    Shape(64, 256, 4, 144),  # ImageNet-64, 270M parameters
    Shape(64, 64, 4, 192),
    Shape(64, 16, 4, 144),
    Shape(16, 256, 1, 512),  # LSUN
    Shape(16, 64, 1, 512),
    Shape(4, 1024, 1, 512),
    Shape(4, 4096, 4, 64),
]


def triton_attention(qkv: Tensor, num_heads: int) -> Tensor:
    from fastdiff.kernels.attention import attention

    return attention(qkv, num_heads)


def compiled_reference() -> Attention:
    """Compile anew for every test, because torch.compile gives up after some shapes and runs eagerly."""
    torch.compiler.reset()
    function = torch.compile(reference.attention, fullgraph=True, dynamic=False)

    def attend(qkv: Tensor, num_heads: int) -> Tensor:
        with torch._functorch.config.patch(donated_buffer=False):  # a backward is timed again and again
            return function(qkv, num_heads)

    return attend


def sdpa(*backends: SDPBackend) -> Attention:
    """scaled_dot_product_attention by one of the backends; without any, by the one that PyTorch chooses."""

    def attend(qkv: Tensor, num_heads: int) -> Tensor:
        B, L, width = qkv.shape
        q, k, v = qkv.view(B, L, num_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, width // 3)

    return attend


ROWS: dict[str, Callable[[], Attention]] = {
    "ours": lambda: triton_attention,
    "eager": lambda: reference.attention,
    "compile": compiled_reference,
    "sdpa": sdpa,
    "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": lambda: sdpa(SDPBackend.MATH),
}


def backward(out: Tensor, qkv: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, qkv, upstream, retain_graph=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", [pytest.param(name, marks=needs_gpu if name == "ours" else ()) for name in ROWS])
def bench_attention(
    shape: Shape,
    row: str,
    direction: str,
    device: torch.device,
    small: bool,
    benchmark: Any,
    gpu_time: Callable[..., Any],
) -> None:
    shape = shape.smaller() if small else shape
    B, L, N, D = shape
    benchmark.group = f"attention {direction}, {shape}"
    attend = ROWS[row]()

    def inputs(i: int) -> tuple[Tensor, Tensor, Tensor]:
        """out, with the graph that leads to it, qkv and an upstream gradient; numbers as behind a group norm."""
        generator = torch.Generator(device).manual_seed(i)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        qkv = torch.randn(B, L, 3 * N * D, **options).requires_grad_()
        return attend(qkv, N), qkv, torch.randn(B, L, N * D, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at length why a backend refuses
        try:
            first = inputs(0)
            backward(*first)
        except RuntimeError as refusal:
            if row in ("ours", "eager", "compile"):
                raise
            pytest.skip(f"{row} does not take {shape}: {refusal}")
    count = 2 if small else 1 + L2 // (4 * B * L * N * D * 2)
    tuples = [first, *(inputs(i) for i in range(1, count))]
    elements = B * L * N * D
    if direction == "backward":
        gpu_time(backward, tuples, bytes_moved=7 * elements * 2, flops=10 * L * elements)
        return
    with torch.no_grad():
        gpu_time(lambda qkv: attend(qkv, N), [(qkv,) for _, qkv, _ in tuples], 4 * elements * 2, 4 * L * elements)
