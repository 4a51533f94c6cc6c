"""dropout(silu(group_norm(cat(x, skip) + offset) * (1 + scale) + shift)) on channels-last maps, forward and backward.

And the same with the residual sum before it: x = a + b + b_bias, which is a result, too, and whose own gradient joins
the norm's.

Shapes   x [B, C1, H, W], skip [B, C2, H, W] or None, in channels-last memory; C = C1 + C2, C1 and C2 multiples of 8.
         weight, bias [C]; scale, shift, offset [B, C] or None. Arithmetic and statistics in float32.
Traffic  forward: x and skip once, y once, for maps whose slab (a few groups of one image) stays on chip or in L2;
         x twice for larger ones. backward: x and dy, dx, likewise. Kept for it: 3 * B * C floats, no mask.
         The gradient of offset is the sum of dx over the pixels, from sums the backward has made already: with a
         convolution's bias as offset, the convolution needs neither an addition nor a reduction of its own.
         With a sum: a and b read once, the sum and y written once (larger maps read the sum again); backward one more
         read, of the sum's own gradient, and dx is the gradient of a and of b. That of b_bias is summed on the way.
Numbers  mean and deviations by Chan et al. 1979, never E[x²] - E[x]²; no atomics, so equal inputs give equal bits.
Source   Wu & He 2018 (https://arxiv.org/abs/1803.08494); Nichol & Dhariwal 2021, appendix A, for scale and shift.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
from fastdiff.kernels import group_norm_silu_kernels as device
from fastdiff.kernels.launch import channels_last, empty_map, kernel_op, launch, processors
from torch import Tensor

L2_BYTES = 32 << 20  # of slabs that all programs together may count on finding again in an L2 of 40 to 60 MB
ONE_BLOCK = {False: 16384, True: 8192}  # elements of a slab kept in registers, forward and backward
MAX_GROUP = 128  # channels
DROPOUT_BITS = 16


@dataclass(frozen=True)
class Tile:
    """Whole groups of one image: `channels` of them, `padded` to a power of two."""

    channels: int
    padded: int

    @staticmethod
    def of(C: int, group: int, align: int, wanted: int, limit: int) -> Tile:
        """Whole groups in multiples of `align`: the fewest channels from `wanted` on, or the most below `limit`."""
        unit = math.lcm(group, align)
        sizes = [size for size in range(unit, C + 1, unit) if C % size == 0] or [C]
        fitting = [size for size in sizes if triton.next_power_of_2(size) <= limit] or sizes[:1]
        size = next((size for size in fitting if size >= wanted), fitting[-1])
        return Tile(size, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Plan:
    """How one call runs. `slab`: in one launch; else three, ROWS pixels of BLOCK_C channels per program."""

    slab: bool
    tile: Tile
    finish: Tile  # of the programs that merge parts
    block_l: int
    one_block: bool
    num_warps: int
    programs: int
    rows: int
    splits: int
    block_c: int


@functools.cache  # a step asks for some hundred, of a few dozen shapes, and each takes as long as several launches
def plan(
    B: int,
    L: int,
    C1: int,
    C2: int,
    group: int,
    itemsize: int,
    backward: bool,
    units: int,
    dropout: bool,
    summed: bool = False,
) -> Plan:
    """The launch configuration for a shape, on a GPU with `units` multiprocessors. `summed`: x is made of two maps."""
    C = C1 + C2
    maps = 2 if backward else 1
    padded_l = triton.next_power_of_2(L)
    limit = ONE_BLOCK[backward] // (2 if dropout or (summed and itemsize > 2) else 1)
    # 64 bytes of a pixel fill a DRAM burst; 32 fill a sector, and the neighbouring program takes the other one.
    tile = Tile.of(C, group, 8, 64 // itemsize, max(limit // padded_l, 1))
    if tile.padded > 32 and padded_l * tile.padded > limit // 2:
        tile = Tile.of(C, group, 8, 32 // itemsize, max(limit // padded_l, 1))
    # The [K, K] table of groups takes registers, too.
    room = limit if tile.padded <= 32 else limit // 2 if tile.padded <= 64 or not backward else 0
    one_block = padded_l * tile.padded <= room and tile.channels >= min(32 // itemsize, C)
    if not one_block:
        tile = Tile.of(C, group, 8, 32 // itemsize, 64)
    slabs = B * (C // tile.channels)
    in_l2 = maps * L * tile.channels * itemsize * units <= L2_BYTES and slabs >= units
    slab = (one_block or in_l2) and tile.padded <= 128
    few = backward or (summed and tile.padded > 64)  # registers are left, beside a second map and the table
    block_l = padded_l if one_block else (4096 if few else 8192) // tile.padded
    # 32 values of 16 bits per thread, at least 8; the [K, K] table of groups wants threads too.
    size = block_l * tile.padded * itemsize
    warps = min(16, max(1, size // 2048, min(tile.padded // 8, size // 512))) if one_block else 16
    # For the split way: enough programs to fill the GPU, and at most 128 parts to merge.
    common = math.gcd(C1, C2) if C2 else C1
    block_c = next(size for size in (128, 64, 32, 16, 8) if common % size == 0)
    rows = max(64, triton.next_power_of_2(-(-L // 128)))
    while rows < min(1024, L) and B * -(-L // (2 * rows)) * (C // block_c) >= 8 * units:
        rows *= 2
    return Plan(
        slab=slab,
        tile=tile,
        finish=Tile.of(C, group, 1, 16, 128),
        block_l=block_l if slab else min(rows, 2048 // block_c),
        one_block=one_block,
        num_warps=warps if slab else 4,
        programs=min(slabs, units) if slab and not one_block else slabs,
        rows=rows,
        splits=-(-L // rows),
        block_c=block_c,
    )


def _refuse(op: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op} needs {expected}; got {got}")


def _check_sum(op: str, a: Tensor, b: Tensor, b_bias: Tensor | None) -> None:
    if b.shape != a.shape:
        _refuse(op, f"b of the shape of a, {tuple(a.shape)}", tuple(b.shape))
    if b.dtype != a.dtype:
        _refuse(op, f"b in the dtype of a, {a.dtype}", f"{b.dtype}; convert it with .to(a.dtype)")
    if b_bias is not None and b_bias.shape != a.shape[1:2]:
        _refuse(op, f"b_bias of shape ({a.shape[1]},), one per channel", tuple(b_bias.shape))
    for name, given in (("b", b), ("b_bias", b_bias)):
        if given is not None and given.device != a.device:
            _refuse(op, f"{name} on the device of a, {a.device}", f"{given.device}; move it with .to(a.device)")


def _check(
    op: str,
    name: str,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
) -> None:
    refuse = functools.partial(_refuse, op)

    if x.dim() != 4:
        refuse(f"a map {name} [B, C, H, W]", f"{name} {tuple(x.shape)}; a sequence wants .unsqueeze(-1)")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse(f"{name} in float32, bfloat16 or float16", f"{x.dtype}; convert it with .float()")
    B, C = x.shape[0], x.shape[1]
    if skip is not None:
        if skip.dim() != 4 or skip.shape[0] != B or skip.shape[2:] != x.shape[2:]:
            refuse(f"skip with the batch and size of {name} {tuple(x.shape)}", f"{tuple(skip.shape)}; resize it first")
        if skip.dtype != x.dtype:
            refuse(f"skip in the dtype of {name}, {x.dtype}", f"{skip.dtype}; convert it with .to({name}.dtype)")
        C += skip.shape[1]
    if num_groups < 1 or C % num_groups:
        refuse(f"channels divisible by {num_groups} groups", f"{C}; change num_groups or the width")
    if C // num_groups > MAX_GROUP:
        refuse(f"at most {MAX_GROUP} channels in a group", f"{C // num_groups}; use more groups, or the reference")
    if x.shape[1] % 8 or C % 8:
        refuse(
            f"channels of {name} and skip in multiples of 8", f"{x.shape[1]} and {C - x.shape[1]}; use the reference"
        )
    for what, value in (("weight", weight), ("bias", bias)):
        if value.shape != (C,):
            refuse(f"{what} of shape ({C},), one per channel", tuple(value.shape))
    if (scale is None) != (shift is None):
        refuse("scale and shift together", "only one; give zeros for the other")
    for what, given in (("scale", scale), ("shift", shift), ("offset", offset)):
        if given is not None and given.shape != (B, C):
            refuse(
                f"{what} of shape (B, C) = {(B, C)}",
                f"{tuple(given.shape)}; a [B, C, 1, 1] embedding wants .flatten(1)",
            )
    for what, given in (("skip", skip), ("weight", weight), ("scale", scale), ("shift", shift), ("offset", offset)):
        if given is not None and given.device != x.device:
            refuse(f"{what} on the device of {name}, {x.device}", f"{given.device}; move it with .to({name}.device)")


def drop_below(dropout: float) -> int:
    """The threshold of 16 random bits: below it an element is dropped."""
    return round(dropout * 2**DROPOUT_BITS)


def _rows(value: Tensor | None) -> tuple[Tensor | None, int]:
    """A [B, C] tensor whose rows are contiguous (half of a chunked one is taken as it is), and the rows' distance."""
    if value is None:
        return None, 0
    if value.stride(1) != 1 and value.shape[1] > 1:
        value = value.contiguous()
    return value, value.stride(0)


def _launch_forward(
    op: str,
    x: Tensor,
    second: Tensor | None,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x itself or, with a second summand, the sum; y; stats [B, 3, C])."""
    name = "x" if second is None else "a"
    _check(op, name, x, skip, weight, bias, scale, shift, offset, num_groups)
    x = channels_last(x, op, name)
    skip = None if skip is None else channels_last(skip, op, "skip")
    B, C1, H, W = x.shape
    L, C2 = H * W, 0 if skip is None else skip.shape[1]
    C, group = C1 + C2, (C1 + C2) // num_groups
    total = None
    if second is not None:
        second, total = channels_last(second, op, "b"), empty_map(B, C1, H, W, x)
    made = x if total is None else total
    y = empty_map(B, C, H, W, x)
    stats = torch.empty(B, 3, C, dtype=torch.float32, device=x.device)
    if not y.numel():
        return made, y, stats.zero_()
    (scale, scale_stride), (shift, shift_stride), (offset, offset_stride) = _rows(scale), _rows(shift), _rows(offset)
    p = plan(B, L, C1, C2, group, x.itemsize, False, processors(x.device), seed is not None, second is not None)
    below = drop_below(dropout)
    keep = 1 / (1 - below / 2**DROPOUT_BITS)
    chosen = p.tile if p.slab else p.finish
    tile = {"CG": group, "CT": chosen.channels, "CT_PAD": chosen.padded}
    tiles = C // chosen.channels
    if p.slab:
        launch(
            device._slab_forward,
            (p.programs,),
            *(x, second, second_bias, skip, weight, bias, scale, shift, offset, seed, total, y, stats),
            *(B * tiles, tiles, L, C1, C2, scale_stride, shift_stride, offset_stride, eps, below, keep),
            **tile,
            BLOCK_L=p.block_l,
            ONE_BLOCK=p.one_block,
            SILU=silu,
            num_warps=p.num_warps,
        )
        return made, y, stats
    partial = torch.empty(B, p.splits, 2, C, dtype=torch.float32, device=x.device)
    grid = (B * p.splits, C // p.block_c)
    block = {"ROWS": p.rows, "BLOCK_L": p.block_l, "BLOCK_C": p.block_c}
    if second is None:
        launch(device._moments, grid, x, skip, partial, p.splits, L, C1, C2, **block)
    else:
        summands = (x, second, second_bias, skip, total)
        launch(device._sum_moments, grid, *summands, partial, p.splits, L, C1, C2, **block)
    launch(
        device._finalize_forward,
        (B * tiles,),
        *(partial, offset, stats, p.splits, tiles, L, C, offset_stride, eps),
        **tile,
        ROWS=p.rows,
        BLOCK_S=triton.next_power_of_2(p.splits),
    )
    launch(
        device._apply,
        grid,
        *(made, skip, weight, bias, scale, shift, seed, y, stats),
        *(p.splits, L, C1, C2, scale_stride, shift_stride, below, keep),
        **block,
        SILU=silu,
    )
    return made, y, stats


@kernel_op("group_norm_silu")
def _forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """y and stats."""
    affine = (weight, bias, scale, shift, offset)
    return _launch_forward("group_norm_silu", x, None, None, skip, *affine, seed, num_groups, eps, silu, dropout)[1:]


@_forward.register_fake
def _(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    B, C, H, W = x.shape
    C += 0 if skip is None else skip.shape[1]
    return empty_map(B, C, H, W, x), x.new_empty(B, 3, C, dtype=torch.float32)


@kernel_op("add_group_norm_silu")
def _add_forward(
    a: Tensor,
    b: Tensor,
    b_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, y and stats."""
    op = "add_group_norm_silu"
    _check_sum(op, a, b, b_bias)
    affine = (weight, bias, scale, shift, offset)
    return _launch_forward(op, a, b, b_bias, skip, *affine, seed, num_groups, eps, silu, dropout)


@_add_forward.register_fake
def _(
    a: Tensor,
    b: Tensor,
    b_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = a.shape
    total = empty_map(B, C, H, W, a)
    C += 0 if skip is None else skip.shape[1]
    return total, empty_map(B, C, H, W, a), a.new_empty(B, 3, C, dtype=torch.float32)


@kernel_op("group_norm_silu_backward")
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dskip, dweight, dbias, dscale, dsecond_bias, and sums [B, 3, C].

    dtotal: what x, if it is a sum, gets as gradient from elsewhere; it is added to dx. dsecond_bias [C1] is the sum of
    dx over pixels and images. sums: dshift, an intermediate, and the gradient of offset, the sum of dx - dtotal.
    """
    dy = channels_last(dy, "group_norm_silu", "the gradient")
    dtotal = None if dtotal is None else channels_last(dtotal, "add_group_norm_silu", "the gradient of the sum")
    x = channels_last(x, "group_norm_silu", "x")
    skip = None if skip is None else channels_last(skip, "group_norm_silu", "skip")
    B, C1, H, W = x.shape
    L, C2 = H * W, 0 if skip is None else skip.shape[1]
    C, group = C1 + C2, (C1 + C2) // num_groups
    gradients = _empty_gradients(x, second_bias, skip, weight, bias, scale)
    dx, dskip, dweight, dbias, dscale, dsecond_bias, sums = gradients
    if not x.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    (scale, scale_stride), (shift, shift_stride) = _rows(scale), _rows(shift)
    p = plan(B, L, C1, C2, group, x.itemsize, True, processors(x.device), seed is not None, dtotal is not None)
    below = drop_below(dropout)
    keep = 1 / (1 - below / 2**DROPOUT_BITS)
    chosen = p.tile if p.slab else p.finish
    tile = {"CG": group, "CT": chosen.channels, "CT_PAD": chosen.padded}
    tiles = C // chosen.channels
    out_skip = None if skip is None else dskip
    total_sums, parts = None, B * (1 if p.slab else p.splits)
    if dtotal is not None and second_bias is not None:
        total_sums = torch.empty(parts, C1, dtype=torch.float32, device=x.device)
    if p.slab:
        launch(
            device._slab_backward,
            (p.programs,),
            *(x, skip, weight, bias, scale, shift, seed, dy, dtotal, stats, dx, out_skip, sums, total_sums),
            *(B * tiles, tiles, L, C1, C2, scale_stride, shift_stride, below, keep),
            **tile,
            BLOCK_L=p.block_l,
            ONE_BLOCK=p.one_block,
            SILU=silu,
            num_warps=p.num_warps,
        )
    else:
        partial = torch.empty(B, p.splits, 2, C, dtype=torch.float32, device=x.device)
        line = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
        grid = (B * p.splits, C // p.block_c)
        block = {"ROWS": p.rows, "BLOCK_L": p.block_l, "BLOCK_C": p.block_c, "SILU": silu}
        launch(
            device._backward_sums,
            grid,
            *(x, skip, weight, bias, scale, shift, seed, dy, stats, partial),
            *(p.splits, L, C1, C2, scale_stride, shift_stride, below, keep),
            **block,
        )
        launch(
            device._finalize_backward,
            (B * tiles,),
            *(partial, weight, bias, scale, shift, stats, sums, line),
            *(p.splits, tiles, L, C, scale_stride, shift_stride),
            **tile,
            BLOCK_S=triton.next_power_of_2(p.splits),
        )
        launch(
            device._apply_backward,
            grid,
            *(x, skip, weight, bias, scale, shift, seed, dy, dtotal, stats, line, dx, out_skip, total_sums),
            *(p.splits, L, C1, C2, scale_stride, shift_stride, below, keep),
            **block,
        )
    launch(
        device._parameter_gradients,
        (triton.cdiv(C, 32),),
        *(sums, total_sums, weight, bias, scale, dweight, dbias),
        *(None if scale is None else dscale, None if second_bias is None else dsecond_bias),
        *(B, parts, C, C1, scale_stride),
        BLOCK_B=min(64, triton.next_power_of_2(B)),
        BLOCK_C=32,
    )
    return gradients


def _empty_gradients(
    x: Tensor, second_bias: Tensor | None, skip: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the backward op; those of absent inputs are empty."""
    C = weight.shape[0]
    return (
        empty_map(*x.shape, like=x),
        x.new_empty(0) if skip is None else empty_map(*skip.shape, like=skip),
        torch.empty_like(weight),
        torch.empty_like(bias),
        x.new_empty(0) if scale is None else torch.empty(x.shape[0], C, dtype=scale.dtype, device=x.device),
        x.new_empty(0) if second_bias is None else torch.empty_like(second_bias),
        torch.empty(x.shape[0], 3, C, dtype=torch.float32, device=x.device),
    )


@_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(x, second_bias, skip, weight, bias, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, skip, weight, bias, scale, shift, offset, seed, num_groups, _, silu, dropout = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, None, skip, weight, bias, scale, shift, offset, seed, output[1])
    ctx.settings = num_groups, silu, dropout


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, b_bias, skip, weight, bias, scale, shift, offset, seed, num_groups, _, silu, dropout = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # no map of zeros for a sum that nothing else reads
    ctx.save_for_backward(total, b_bias, skip, weight, bias, scale, shift, offset, seed, stats)
    ctx.settings = num_groups, silu, dropout


def _gradients(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of x, of second_bias, and of (skip, weight, bias, scale, shift, offset)."""
    x, second_bias, skip, weight, bias, scale, shift, offset, seed, stats = ctx.saved_tensors
    dx, dskip, dweight, dbias, dscale, dsecond_bias, sums = _backward(
        dy, dtotal, x, second_bias, skip, weight, bias, scale, shift, seed, stats, *ctx.settings
    )
    rest = (
        None if skip is None else dskip,
        dweight,
        dbias,
        None if scale is None else dscale,
        None if shift is None else sums[:, 0].to(shift.dtype),
        None if offset is None else sums[:, 2].to(offset.dtype),
    )
    return dx, None if second_bias is None else dsecond_bias, rest


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, _no_bias, rest = _gradients(ctx, dy, None)
    return (dx, *rest, *(None,) * 5)


def _add_differentiate(
    ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:  # y went nowhere
        total, skip = ctx.saved_tensors[0], ctx.saved_tensors[2]
        B, C, H, W = total.shape
        dy = empty_map(B, C + (0 if skip is None else skip.shape[1]), H, W, total).zero_()
    dx, db_bias, rest = _gradients(ctx, dy, dtotal)
    return (dx, dx, db_bias, *rest, *(None,) * 5)


_forward.register_autograd(_differentiate, setup_context=_setup)
_add_forward.register_autograd(_add_differentiate, setup_context=_add_setup)


def _dropout(dropout: float, seed: Tensor | None, device: torch.device) -> tuple[Tensor | None, float]:
    """(seed or None, probability), both of nothing where the probability rounds to 0."""
    if not drop_below(dropout):
        return None, 0.0
    return torch.randint(2**62, (1,), device=device) if seed is None else seed, dropout


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
    seed: Tensor | None = None,
) -> Tensor:
    """As `reference.group_norm_silu`, on channels-last maps.

    offset   [B, C] added to x (and skip) before the norm; its gradient is the sum of dx over the pixels.
    dropout  probability to the nearest 1 / 65536, by a counter from seed.
    seed     [1] int64 on x's device; drawn from torch's generator if dropout needs one and none is given.
    Raises ValueError for shapes, dtypes or devices that don't fit; a channels-first map is copied, with a warning.
    """
    seed, dropout = _dropout(dropout, seed, x.device)
    return _forward(x, skip, weight, bias, scale, shift, offset, seed, num_groups, eps, silu, dropout)[0]


def add_group_norm_silu(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    b_bias: Tensor | None = None,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, y) as `reference.add_group_norm_silu`, on channels-last maps; the rest as `group_norm_silu`.

    The gradients of a and b are one map. Where total's own gradient is missing nothing is read in its place.
    """
    seed, dropout = _dropout(dropout, seed, a.device)
    affine = (weight, bias, scale, shift, offset)
    total, y, _ = _add_forward(a, b, b_bias, skip, *affine, seed, num_groups, eps, silu, dropout)
    return total, y
