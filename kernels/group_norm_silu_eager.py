"""group_norm_silu for eager torch on a CPU and channels-last maps: few passes, and a backward pass written out.

Runs that version 0.1 began continue with it; `ops.map_layout` says why others have contiguous maps.

Shapes   x [B, C, H, W], read and written channels-last as [B, L, C]; weight, bias [C]; scale, shift [B, C] or None.
Passes   forward: sum, centre, sum of squares, scale-and-shift, SiLU. backward: SiLU, two sums, two multiply-adds.
         Without gradients everything is computed in one map.
         torch's own channels-last group norm reads each group with a stride and takes about twice as long.
Source   dx = P g + Q (x - mean) + D per image and channel, from the two sums that dweight and dbias need anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fastdiff.kernels.reference import residual_sum
from torch import Tensor


class _Normed:
    """The statistics of x [B, C, H, W] and h [B, L, C], the normalised map before SiLU."""

    def __init__(
        self,
        x: Tensor,
        in_place: bool,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        offset: Tensor | None,
        num_groups: int,
        eps: float,
    ) -> None:
        """in_place: h overwrites the centred map."""
        B, C, H, W = x.shape
        self.num_groups, self.size = num_groups, H * W * (C // num_groups)
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C).float()
        sums = x.sum(dim=1)
        centre = self.over_group(sums)
        if offset is not None:  # moves the mean, and no element on its own
            offset = offset.float().expand(B, C)
            centre = self.over_group(sums + H * W * offset) - offset
        self.centered = x - centre[:, None]  # before squaring: exact for |mean| >> std
        self.rstd = (self.over_group(self.centered.square().sum(dim=1)) + eps).rsqrt()
        if scale is not None and shift is not None:
            self.gain, constant = weight * (1 + scale), bias * (1 + scale) + shift
        else:
            self.gain, constant = weight.expand(B, C), bias.expand(B, C)
        slope, out = (self.rstd * self.gain)[:, None], self.centered if in_place else None
        self.h = torch.addcmul(constant[:, None], self.centered, slope, out=out)
        self.excess = sums / (H * W) - centre if offset is not None else None

    def over_group(self, sums: Tensor) -> Tensor:
        """Sums over the pixels [B, C] → their mean over each group, [B, C]."""
        groups = sums.view(len(sums), self.num_groups, -1)
        return (groups.sum(-1, keepdim=True) / self.size).expand_as(groups).reshape(sums.shape)


def _without_gradient(x: Tensor, *given: Any) -> Tensor:
    """As `_GroupNormSiLU.apply`, in one map: allocating another costs as much as a pass over it."""
    *settings, silu = given
    B, C, H, W = x.shape
    h = _Normed(x, True, *settings).h
    return (F.silu(h, inplace=True) if silu else h).view(B, H, W, C).permute(0, 3, 1, 2)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        *settings, silu = given
        weight, bias, scale = settings[:3]
        B, C, H, W = x.shape
        found = _Normed(x, False, *settings)
        h = found.h
        ctx.save_for_backward(
            *(found.centered, h if silu else None, found.rstd, found.gain, weight, bias, scale, found.excess)
        )
        ctx.over_group, ctx.shape = found.over_group, (B, H, W, C)
        y = F.silu(h) if silu else h
        return y.view(B, H, W, C).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centered, h, rstd, gain, weight, bias, scale, excess = ctx.saved_tensors
        B, H, W, C = ctx.shape
        grad = grad.permute(0, 2, 3, 1).reshape(B, H * W, C)
        if h is not None:
            grad = torch.ops.aten.silu_backward(grad, h)
        sum_g = grad.sum(dim=1)  # [B, C]
        sum_gx = (grad * centered).sum(dim=1) * rstd
        slope = -rstd.square() * ctx.over_group(sum_gx * gain)
        constant = -rstd * ctx.over_group(sum_g * gain)
        dx = torch.addcmul(constant[:, None], centered, slope[:, None]).addcmul_(grad, (rstd * gain)[:, None])
        doffset = None  # the sum of dx, from sums computed above
        if excess is not None:
            doffset = rstd * gain * sum_g + H * W * (slope * excess + constant)
        dx = dx.view(B, H, W, C).permute(0, 3, 1, 2)
        if scale is None:
            return dx, sum_gx.sum(0), sum_g.sum(0), None, None, doffset, None, None, None
        dweight, dbias = ((total * (1 + scale)).sum(0) for total in (sum_gx, sum_g))
        return dx, dweight, dbias, sum_gx * weight + sum_g * bias, sum_g, doffset, None, None, None


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """As `reference.group_norm_silu`, which describes the arguments."""
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if offset is not None and offset.dim() == 1:
        offset = offset.expand(x.shape[0], -1)
    tensors = (x, weight, bias, scale, shift, offset)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    apply = _GroupNormSiLU.apply if needs_grad else _without_gradient
    h = apply(x.float(), weight.float(), bias.float(), scale, shift, offset, num_groups, eps, silu)
    if dropout > 0:
        h = F.dropout(h, dropout)
    return h.to(x.dtype)


def add_group_norm_silu(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, *, b_bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `reference.add_group_norm_silu`; the options are those of `group_norm_silu`."""
    total = residual_sum(a, b, b_bias)
    return total, group_norm_silu(total, weight, bias, **options)
