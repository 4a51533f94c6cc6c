"""A group norm as one affine map per image and channel, for a convolution that applies it while it reads.

group_norm(x + offset) * (1 + scale) + shift = (x - mean) * gain + constant, with mean, gain, constant [B, C] float32.

Traffic  `moments` reads the map once; moments that a convolution has made of its own output cost nothing.
"""

from __future__ import annotations

import torch
from fastdiff.kernels import group_norm_silu_kernels as device
from fastdiff.kernels.group_norm_silu import plan
from fastdiff.kernels.launch import channels_last, kernel_op, launch, processors
from torch import Tensor


@kernel_op("group_norm_moments")
def _moments(x: Tensor, skip: Tensor | None) -> Tensor:
    x = channels_last(x, "group_norm_moments", "x")
    skip = None if skip is None else channels_last(skip, "group_norm_moments", "skip")
    B, C1, H, W = x.shape
    L, C2 = H * W, 0 if skip is None else skip.shape[1]
    C = C1 + C2
    p = plan(B, L, C1, C2, 1, x.itemsize, False, processors(x.device), False)
    block_l = min(p.rows, 2048 // p.block_c)
    partial = torch.empty(B, p.splits, 2, C, dtype=torch.float32, device=x.device)
    grid = (B * p.splits, C // p.block_c)
    launch(
        device._moments, grid, x, skip, partial, p.splits, L, C1, C2, ROWS=p.rows, BLOCK_L=block_l, BLOCK_C=p.block_c
    )
    first = torch.arange(p.splits, device=x.device) * p.rows
    count = (L - first).clamp(max=p.rows).float()[:, None]  # pixels of each part
    mean = (partial[:, :, 0] * count).sum(1) / L
    off = partial[:, :, 0] - mean[:, None]
    return torch.stack([mean, (partial[:, :, 1] + count * off.square()).sum(1)], dim=-1)


@_moments.register_fake
def _(x: Tensor, skip: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1]), 2, dtype=torch.float32)


def moments(x: Tensor, skip: Tensor | None = None) -> Tensor:
    """[B, C, 2] float32: the mean of each channel and the sum of its squared deviations from it."""
    return _moments(x, skip)


def from_moments(
    moments: Tensor,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, gain, constant), each [B, C] float32, from the moments of a map of `pixels` pixels."""
    B, C, _ = moments.shape
    mean, m2 = moments.unbind(-1)
    if offset is not None:
        mean = mean + offset
    groups = mean.view(B, num_groups, -1)
    group = groups.mean(-1, keepdim=True)
    variance = (m2.view_as(groups) / pixels + (groups - group).square()).mean(-1, keepdim=True)
    spread = lambda value: value.expand_as(groups).reshape(B, C)
    gain, constant = spread((variance + eps).rsqrt()) * weight.float(), bias.float().expand(B, C)
    if scale is not None and shift is not None:
        gain, constant = gain * (1 + scale), constant * (1 + scale) + shift
    centre = spread(group)
    return (centre if offset is None else centre - offset), gain.contiguous(), constant.contiguous()
