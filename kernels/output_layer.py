"""The network's last norm, SiLU and 3x3 convolution to at most 7 channels: one op on 16-bit maps with float32 result.

Shapes   x, second [B, C, H, W] bf16 or fp16, channels-last, of which x + second + second_bias is the input, rounded to
         that dtype; C a multiple of 32, for 32 groups. Convolution's weight [O, C, 3, 3]. Result [B, O, H, W] float32,
         channels-last. The normalised map exists in registers only.
Traffic  forward: the input twice, for statistics and products, and the products of the 9 taps, 9 * O floats per pixel,
         written and read. backward: the input twice, dx once, and dy's patches, 256 bytes per pixel, written once and
         read twice. With a sum: x and second read, the sum written.
Numbers  Normalised map, weights and dy enter tensor cores as sums of two bf16 numbers, hi + lo, whose products
         hi hi + hi lo + lo hi are added in float32: factors err by 2^-16, where TF32 has 2^-11 and bf16 2^-8. bf16
         serves fp16 maps, too, because it has the range of float32. No atomics.
Source   The products come before the sum over taps, as in the general matrix products by which Anderson et al. 2017
         (https://arxiv.org/abs/1709.03395) compute convolutions without patches. The norm is `group_norm_silu`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from fastdiff.kernels import output_layer_kernels as device
from fastdiff.kernels.launch import (
    channels_last,
    empty_map,
    kernel_op,
    launcher,
    no_derivative,
    once_per_layout,
    processors,
)
from torch import Tensor

GROUPS = 32
MAX_OUT = 7
COLUMNS = 64
"""Columns of the product for all taps, [tap][output channel], padded."""
BLOCK_L = 64
"""Pixels of a product."""
PARTS_PER_PROCESSOR = 8
"""Programs per multiprocessor among which an image's sums are divided."""


def unsupported(x: Tensor, out_channels: int) -> str:
    """Why the op can't take maps like x; empty if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "not a 16-bit map"
    if not x.numel():
        return "no elements"
    if x.shape[1] % GROUPS:
        return "channels not in multiples of 32"
    return f"more than {MAX_OUT} output channels" if out_channels > MAX_OUT else ""


@once_per_layout
def _launches(units: int, x: Tensor, conv_weight: Tensor, eps: float) -> dict[str, Any]:
    """The launchers of both passes on a GPU with `units` multiprocessors, and how many parts an image's sums have."""
    (B, C, H, W), out = x.shape, len(conv_weight)
    L, group = H * W, C // GROUPS
    parts = triton.cdiv(PARTS_PER_PROCESSOR * units, B * triton.cdiv(C, 64))
    rows = BLOCK_L * triton.cdiv(triton.cdiv(L, parts), BLOCK_L)
    splits, tiles, low = triton.cdiv(L, rows), triton.cdiv(L, BLOCK_L), B * L * COLUMNS
    groups = {"CG": group, "CG_PAD": triton.next_power_of_2(group), "GROUPS": GROUPS}
    backward = (triton.cdiv(C, 32), B * splits), splits, rows, L, C, low
    block = {"COLUMNS": COLUMNS, "BLOCK_L": BLOCK_L, "BLOCK_C": 32}
    pixels = triton.cdiv(L, 256)
    return {
        "splits": splits,
        "weights": launcher(
            device._output_weights,
            (triton.cdiv(C, 64),),
            *conv_weight.stride(),
            C,
            OUT=out,
            COLUMNS=COLUMNS,
            BLOCK_C=64,
        ),
        "moments": launcher(
            device._output_moments, (B * splits, triton.cdiv(C, 64)), splits, rows, L, C, BLOCK_L=32, BLOCK_C=64
        ),
        "statistics": launcher(device._output_statistics, (B,), splits, rows, L, C, eps, **groups),
        "products": launcher(
            device._output_products, (B * tiles,), tiles, L, C, OUT=out, COLUMNS=COLUMNS, BLOCK_L=BLOCK_L, BLOCK_C=32
        ),
        "sum": launcher(device._output_sum, (B * pixels,), pixels, H, W, OUT=out, BLOCK_L=256),
        "sums": launcher(device._output_backward_sums, *backward, **block, num_stages=2),
        "finish": launcher(device._output_finish, (B,), splits, L, C, **groups),
        "gradient": launcher(device._output_gradient, *backward, **block),
    }


@once_per_layout
def _patches_launch(dy: Tensor) -> Any:
    B, out, H, W = dy.shape
    tiles = triton.cdiv(H * W, BLOCK_L)
    numbers = (*dy.stride(), tiles, H, W, B * H * W * COLUMNS)
    return launcher(device._output_patches, (B * tiles,), *numbers, OUT=out, COLUMNS=COLUMNS, BLOCK_L=BLOCK_L)


def _check(x: Tensor, second: Tensor | None, conv_weight: Tensor) -> None:
    if problem := unsupported(x, len(conv_weight)):
        raise ValueError(f"output_layer: {problem}; x is {x.dtype} {tuple(x.shape)}")
    if second is not None and (second.shape, second.dtype) != (x.shape, x.dtype):
        raise ValueError(f"output_layer: second is {second.dtype} {tuple(second.shape)}, x {x.dtype} {tuple(x.shape)}")
    if conv_weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"output_layer: {tuple(conv_weight.shape)} is no 3x3 convolution of {x.shape[1]} channels")


@kernel_op("output_layer")
def _forward(
    x: Tensor,
    second: Tensor | None,
    second_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the result, the sum of x and second (empty without second), stats, and the packed weights."""
    _check(x, second, conv_weight)
    x, second = channels_last(x, "output_layer", "x"), channels_last(second, "output_layer", "second")
    run = _launches(processors(x.device), x, conv_weight, eps)
    y, total, stats, packed = _empty_results(x, second, conv_weight)
    B, C, H, W = x.shape
    partial = torch.empty(B, run["splits"], 2, C, dtype=torch.float32, device=x.device)
    taps = torch.empty(B, 9 * len(conv_weight), H * W, dtype=torch.float32, device=x.device)
    run["weights"](conv_weight, packed)
    if second is None:
        run["moments"](x, None, None, None, partial)
    else:
        run["moments"](x, second, None if second_bias is None else second_bias.contiguous(), total, partial)
        x = total
    run["statistics"](partial, weight.contiguous(), bias.contiguous(), stats)
    run["products"](x, stats, packed, taps)
    run["sum"](taps, conv_bias.contiguous(), y)
    return y, total, stats, packed


def _empty_results(x: Tensor, second: Tensor | None, conv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    return (
        empty_map(B, len(conv_weight), H, W, x, torch.float32),
        x.new_empty(0) if second is None else empty_map(B, C, H, W, x),
        torch.empty(B, 5, C, dtype=torch.float32, device=x.device),
        torch.empty(2, COLUMNS, C, dtype=torch.bfloat16, device=x.device),
    )


@_forward.register_fake
def _(x: Tensor, second: Tensor | None, second_bias: Any, weight: Any, bias: Any, conv_weight: Tensor, *_: Any) -> Any:
    return _empty_results(x, second, conv_weight)


@kernel_op("output_layer_backward")
def _backward(
    dy: Tensor, x: Tensor, conv_weight: Tensor, stats: Tensor, packed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, sums [3, C] (gradients of the norm's bias and weight, sum of dx), and those of the convolution."""
    x = channels_last(x, "output_layer", "x")
    run = _launches(processors(x.device), x, conv_weight, eps)
    B, C, H, W = x.shape
    dx, patches = empty_map(B, C, H, W, x), torch.empty(2, B, H * W, COLUMNS, dtype=torch.bfloat16, device=x.device)
    partial, dpacked = (stats.new_empty(B * run["splits"], rows, C) for rows in (2, COLUMNS))
    sums, line = (stats.new_empty(B, rows, C) for rows in (3, 2))
    _patches_launch(dy)(dy, patches)
    run["sums"](x, stats, packed, patches, partial, dpacked)
    run["finish"](partial, stats, sums, line)
    run["gradient"](x, stats, packed, patches, line, dx)
    by_tap = dpacked.sum(0)[: 9 * len(conv_weight)].view(3, 3, -1, C)
    return dx, sums.sum(0), by_tap.permute(2, 3, 0, 1).contiguous(), dy.sum((0, 2, 3))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, conv_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    made = x.new_empty(3, x.shape[1], dtype=torch.float32), dy.new_empty(conv_weight.shape), dy.new_empty(dy.shape[1])
    return empty_map(*x.shape, like=x), *made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, second, second_bias, weight, bias, conv_weight, conv_bias, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # saves a map of zeros for the sum
    ctx.save_for_backward(x if second is None else output[1], conv_weight, *output[2:])
    ctx.dtypes = None if second_bias is None else second_bias.dtype, weight.dtype, bias.dtype
    ctx.conv_dtypes = conv_weight.dtype, conv_bias.dtype
    ctx.has_second, ctx.eps = second is not None, eps


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        no_derivative("the backward pass of output_layer")
    dx, sums, dconv_weight, dconv_bias = _backward(dy, *ctx.saved_tensors, ctx.eps)
    dbias, dweight, dsecond_bias = sums.unbind()
    of_bias, of_weight, of_norm_bias = ctx.dtypes
    return (
        dx,
        dx if ctx.has_second else None,
        None if of_bias is None else dsecond_bias.to(of_bias),
        dweight.to(of_weight),
        dbias.to(of_norm_bias),
        dconv_weight.to(ctx.conv_dtypes[0]),
        dconv_bias.to(ctx.conv_dtypes[1]),
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


def output_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    *,
    second: Tensor | None = None,
    second_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `reference.output_layer`, on channels-last maps. Raises ValueError for what `unsupported` names."""
    return _forward(x, second, second_bias, weight, bias, conv_weight, conv_bias, eps)[0]
