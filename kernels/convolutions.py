"""Convolutions by torch with less work for cuDNN and cuBLAS: no enlarged map, no concatenated input.

upsample_conv  nearest x2, then 3x3: each output pixel sees only 2x2 inputs, so the pair is one transposed convolution
               with 4x4 taps, stride 2, at 4/9 of the operations and without the enlarged map. Along one axis, taps
               (w0, w1, w2) become (w2, w1 + w2, w0 + w1, w0): the 3x3 weight correlated with a 2x2 box.
skip_conv1x1   a 1x1 convolution of two maps side by side is two matrix products that accumulate.
conv_weight    the weight in the layout that cuDNN needs for channels-last maps. It would convert a contiguous one by
               itself, in the forward and again in the backward pass, after the cast to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ConvWeight(torch.autograd.Function):
    """Cast and change the layout in one pass, forward and backward, so that the gradient has the weight's layout."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype, memory_format=torch.channels_last, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype, memory_format=torch.contiguous_format), None


def conv_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[C_out, C_in, kh, kw] → the same values in `dtype`, channels-last; if converted, its gradient is contiguous."""
    if is_arranged(weight, dtype):
        return weight
    if torch.compiler.is_compiling():  # which fuses these; flattening makes the gradient contiguous
        return weight.flatten().to(dtype).view(weight.shape).contiguous(memory_format=torch.channels_last)
    return _ConvWeight.apply(weight, dtype)


def is_arranged(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `conv_weight` has nothing to convert."""
    return weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last)


def box_weight(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] → [C_in, C_out, 4, 4], summed in float32, in the weight's dtype."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    padded = F.pad(wide.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # [C_in, C_out, 5, 5]
    rows = padded[:, :, :-1] + padded[:, :, 1:]
    return (rows[..., :-1] + rows[..., 1:]).to(weight.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, channels_last: bool = True) -> Tensor:
    """As `reference.upsample_conv`; a float32 weight is rounded to x's dtype only after the sums of `box_weight`.

    A weight of 4x4 taps, as `box_weight` gives them, is taken as it is.
    channels_last: the layout of x and of the result, which is contiguous otherwise.
    """
    taps = weight if weight.shape[-1] == 4 else box_weight(weight)
    taps = conv_weight(taps, x.dtype) if channels_last else taps.to(x.dtype).contiguous()
    return F.conv_transpose2d(x, taps, None if bias is None else bias.to(x.dtype), stride=2, padding=1)


def skip_conv1x1(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """As `reference.skip_conv1x1`, on channels-last maps."""
    maps = [x] if skip is None else [x, skip]
    parts = weight.flatten(1).to(x.dtype).split([each.shape[1] for each in maps], dim=1)  # joined once in backward
    B, _, H, W = x.shape
    y = bias.to(x.dtype)
    for each, part in zip(maps, parts, strict=True):
        y = torch.addmm(y, each.permute(0, 2, 3, 1).flatten(0, 2), part.t())
    return y.view(B, H, W, -1).permute(0, 3, 1, 2)
