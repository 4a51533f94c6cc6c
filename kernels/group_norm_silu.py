"""dropout(silu(group_norm(cat(x, skip) + offset) * (1 + scale) + shift)) on channels-last maps, forward and backward.

A second op adds up a residual before it: x = a + b + b_bias, where b or b_bias may be absent. It returns x as well,
whose own gradient joins the norm's. The file holds both ops, their gradients and all launches, which share their
arguments; hence its length.

Shapes   x [B, C1, H, W], skip [B, C2, H, W] or None, in channels-last memory; C = C1 + C2, C1 and C2 multiples of 8.
         weight, bias [C]; scale, shift [B, C] or None; offset [B, C], [C] or None. All arithmetic in float32.
Traffic  forward: x once, y once. backward: x and dy once, dx once. Each map is read a second time from a cache: see
         `group_norm_silu_kernels.py`. The backward pass needs 3 * B * C floats of the forward, no mask.
         The gradient of offset is the sum of dx over the pixels, from sums that the backward computes anyway: with a
         convolution's bias as offset, the convolution needs neither an addition nor a reduction of its own.
         With a sum: a and b read once, the sum and y written once; backward one more read, of the sum's own gradient,
         and dx is the gradient of a and of b. b_bias's is a by-product.
Numbers  sums around a value of the data, merged by Chan et al. 1979, never E[x²] - E[x]²; in a fixed order, so equal
         inputs give equal bits. SiLU by the GPU's approximations: see `ptx.py`.
Source   Wu & He 2018 (https://arxiv.org/abs/1803.08494); Nichol & Dhariwal 2021, appendix A, for scale and shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from fastdiff.kernels import group_norm_silu_kernels as device
from fastdiff.kernels.group_norm_silu_plan import Plan, check_norm, check_sum, plan
from fastdiff.kernels.launch import (
    IMPLEMENTATIONS,
    Launcher,
    channels_last,
    empty_map,
    is_channels_last,
    kernel_op,
    launcher,
    no_derivative,
    once_per_layout,
    processors,
)
from torch import Tensor

DROPOUT_BITS = 16


def drop_below(dropout: float) -> int:
    """The number of 16 random bits below which an element is dropped."""
    return round(dropout * 2**DROPOUT_BITS)


class Forward(NamedTuple):
    """The launch of a forward call, for tensors of one layout; there is none without elements."""

    converted: bool
    """Whether tensors have to be converted first: maps that are not channels-last, rows that are not contiguous."""
    y: tuple[int, int, int, int]
    """Shape of the result."""
    partial: int = 0
    """Number of partial statistics."""
    counters: int = 0
    """Number of counters, none if no program waits for another."""
    run: Launcher | None = None


@once_per_layout
def _forward_launch(
    plan: Callable[..., Plan],
    units: int,
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
) -> Forward:
    """Check the arguments and plan the launch on a GPU with `units` multiprocessors."""
    summed = second is not None or second_bias is not None
    if summed:
        check_sum(op, x, second, second_bias)
    check_norm(op, "a" if summed else "x", x, skip, weight, bias, scale, shift, offset, num_groups)
    B, C1, H, W = x.shape
    L, C2 = H * W, 0 if skip is None else skip.shape[1]
    C = C1 + C2
    rows = (scale, shift, offset, weight, bias, second_bias)
    as_they_are = all(map(is_channels_last, (x, second, skip))) and all(map(_has_rows, rows))
    if not as_they_are or not B * C * L:
        return Forward(not as_they_are, (B, C, H, W))
    p = plan(B, L, C1, C2, C // num_groups, x.itemsize, False, units)
    strides = map(_row_stride, (scale, shift, offset))
    run = launcher(
        device._norm_forward,
        (p.programs,),
        *(*p.numbers, L, C1, C2, *strides, eps, *_dropped(dropout)),
        **p.constexprs,
        SILU=silu,
    )
    return Forward(False, (B, C, H, W), _partial_size(p), _counters(p), run)


def _partial_size(plan: Plan) -> int:
    return plan.slabs * plan.splits * plan.tiles * 2 * plan.block_c


def _counters(plan: Plan) -> int:
    return 0 if plan.whole else 1 + plan.slabs


def _scratch(run: Forward | Backward, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(partial sums, uninitialised; counters, which are 0)."""
    partial = torch.empty(run.partial, dtype=torch.float32, device=device)
    return partial, torch.zeros(run.counters, dtype=torch.int32, device=device) if run.counters else None


def _dropped(dropout: float) -> tuple[int, float]:
    """The number below which random bits drop an element, and the factor for those that are kept."""
    below = drop_below(dropout)
    return below, 1 / (1 - below / 2**DROPOUT_BITS)


def _has_rows(value: Tensor | None) -> bool:
    """Whether a [C] tensor, or each row of a [B, C] tensor, is contiguous, as those of a half from `chunk` are."""
    return value is None or value.stride(-1) == 1 or value.shape[-1] <= 1


def _contiguous(values: Iterable[Tensor | None]) -> list[Any]:
    return [None if value is None else value.contiguous() for value in values]


def _row_stride(value: Tensor | None) -> int:
    """The elements from one image's row of a [B, C] tensor to the next; 0 for a row [C] that serves all images."""
    return 0 if value is None or value.dim() == 1 else value.stride(0)


def launch_forward(
    op: str,
    x: Tensor,
    second: Tensor | None,
    second_bias: Tensor | None,
    skip: Tensor | None,
    affine: tuple[Any, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (the norm's input, which is x or its sum with `second` and `second_bias`; y; stats [B, 3, C]).

    affine   weight, bias, scale, shift, offset, seed
    options  num_groups, eps, silu, dropout
    """
    run = _forward_launch(plan, processors(x.device), op, x, second, second_bias, skip, *affine, *options)
    weight, bias, scale, shift, offset, seed = affine
    summed = second is not None or second_bias is not None
    if run.converted:
        x = channels_last(x, op, "a" if summed else "x")
        second, skip = channels_last(second, op, "b"), channels_last(skip, op, "skip")
        weight, bias, scale, shift, offset, second_bias = _contiguous((weight, bias, scale, shift, offset, second_bias))
        affine = (weight, bias, scale, shift, offset, seed)
        return launch_forward(op, x, second, second_bias, skip, affine, options)
    total = empty_map(*x.shape, like=x) if summed else None
    y = empty_map(*run.y, like=x)
    stats = torch.empty(len(x), 3, run.y[1], dtype=torch.float32, device=x.device)
    if run.run:
        run.run(x, second, second_bias, skip, *affine, total, y, stats, *_scratch(run, x.device))
    else:
        stats.zero_()
    return x if total is None else total, y, stats


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
    """Returns (y, stats)."""
    affine, options = (weight, bias, scale, shift, offset, seed), (num_groups, eps, silu, dropout)
    return launch_forward("group_norm_silu", x, None, None, skip, affine, options)[1:]


@_forward.register_fake
def _(x: Tensor, skip: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    B, C, H, W = x.shape
    C += 0 if skip is None else skip.shape[1]
    return empty_map(B, C, H, W, x), x.new_empty(B, 3, C, dtype=torch.float32)


@kernel_op("add_group_norm_silu")
def _add_forward(
    a: Tensor,
    b: Tensor | None,
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
    """Returns (the sum, y, stats)."""
    if b is None and b_bias is None:
        raise ValueError("add_group_norm_silu needs b or b_bias; group_norm_silu is the norm of a alone")
    affine, options = (weight, bias, scale, shift, offset, seed), (num_groups, eps, silu, dropout)
    return launch_forward("add_group_norm_silu", a, b, b_bias, skip, affine, options)


@_add_forward.register_fake
def _(
    a: Tensor, b: Tensor | None, b_bias: Tensor | None, skip: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = a.shape
    total = empty_map(B, C, H, W, a)
    C += 0 if skip is None else skip.shape[1]
    return total, empty_map(B, C, H, W, a), a.new_empty(B, 3, C, dtype=torch.float32)


class Backward(NamedTuple):
    """The launches of a backward call, for tensors of one layout; there are none without elements."""

    converted: bool
    """As in `Forward`, like the next two."""
    partial: int = 0
    counters: int = 0
    run: Launcher | None = None
    parameters: Launcher | None = None


@once_per_layout
def _backward_launches(
    plan: Callable[..., Plan],
    units: int,
    dy: Tensor,
    dtotal: Tensor | None,
    dtotal_more: Tensor | None,
    dskip_other: Tensor | None,
    x: Tensor,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> Backward:
    """Plan the launches on a GPU with `units` multiprocessors."""
    B, C1, H, W = x.shape
    L, C2 = H * W, 0 if skip is None else skip.shape[1]
    C = C1 + C2
    rows = (scale, shift, weight, bias, second_bias)
    as_they_are = all(map(is_channels_last, (dy, dtotal, dtotal_more, dskip_other, x, skip))) and all(
        map(_has_rows, rows)
    )
    if not as_they_are or not x.numel():
        return Backward(not as_they_are)
    scale_stride, shift_stride = map(_row_stride, (scale, shift))
    p = plan(B, L, C1, C2, C // num_groups, x.itemsize, True, units)
    run = launcher(
        device._norm_backward,
        (p.programs,),
        *(*p.numbers, L, C1, C2, scale_stride, shift_stride, *_dropped(dropout)),
        **p.constexprs,
        SILU=silu,
    )
    parameters = launcher(  # 8 channels fill a sector of memory; more for a program would leave few programs
        device._parameter_gradients,
        (triton.cdiv(C, 8),),
        *(B, C, C1, scale_stride),
        BLOCK_B=min(256, triton.next_power_of_2(B)),
        BLOCK_C=8,
    )
    return Backward(False, _partial_size(p), _counters(p), run, parameters)


@kernel_op("group_norm_silu_backward")
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    dtotal_more: Tensor | None,
    dskip_other: Tensor | None,
    x: Tensor,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dskip, dweight, dbias, dscale, dsecond_bias, doffset, and sums [B, 3, C].

    dtotal is the gradient that x gets from its other readers, or with dtotal_more a part of it; it is added to dx.
    dskip_other is that of skip. Both need dtotal beside them. dsecond_bias [C1] is the sum of dx over pixels and
    images. sums: dshift, an intermediate, and the gradient of an offset [B, C], the sum of dx without the gradients
    that are added. doffset is its sum over the images, for an `offset` [C]; an offset [B, C] is not passed.
    """
    given = (weight, bias, scale, shift, seed)
    options = (num_groups, silu, dropout)
    others = (dtotal, dtotal_more, dskip_other)
    run = _backward_launches(plan, processors(x.device), dy, *others, x, second_bias, skip, *given, *options)
    if run.converted:
        op = "group_norm_silu"
        dy, x, skip = channels_last(dy, op, "the gradient"), channels_last(x, op, "x"), channels_last(skip, op, "skip")
        dtotal, dtotal_more = (
            channels_last(each, "add_group_norm_silu", "the gradient of the sum") for each in (dtotal, dtotal_more)
        )
        dskip_other = channels_last(dskip_other, op, "the other gradient of skip")
        weight, bias, scale, shift, second_bias = _contiguous((weight, bias, scale, shift, second_bias))
        return IMPLEMENTATIONS["group_norm_silu_backward"](
            *(dy, dtotal, dtotal_more, dskip_other, x, second_bias, skip),
            *(weight, bias, scale, shift, offset, seed, stats, *options),
        )
    gradients = _empty_gradients(x, second_bias, skip, weight, bias, scale, offset)
    if not run.run or not run.parameters:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dx, dskip, dweight, dbias, *of_inputs, sums = gradients
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    total_sums = None if dtotal is None or second_bias is None else make(*x.shape[:2])
    out_skip, line = None if skip is None else dskip, make(len(x), 2, len(weight))
    scratch = _scratch(run, x.device)
    run.run(x, skip, *given, dy, *others, stats, dx, out_skip, sums, line, total_sums, *scratch)
    wanted = [
        gradient if value is not None else None
        for gradient, value in zip(of_inputs, (scale, second_bias, offset), strict=True)
    ]
    run.parameters(sums, total_sums, weight, bias, scale, dweight, dbias, *wanted)
    return gradients


def _empty_gradients(
    x: Tensor,
    second_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the backward op; those of absent inputs are empty."""
    C = weight.shape[0]
    return (
        empty_map(*x.shape, like=x),
        x.new_empty(0) if skip is None else empty_map(*skip.shape, like=skip),
        torch.empty_like(weight),
        torch.empty_like(bias),
        x.new_empty(0) if scale is None else torch.empty(x.shape[0], C, dtype=scale.dtype, device=x.device),
        x.new_empty(0) if second_bias is None else torch.empty_like(second_bias),
        x.new_empty(0) if offset is None else torch.empty_like(offset),
        torch.empty(x.shape[0], 3, C, dtype=torch.float32, device=x.device),
    )


@_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, second_bias, skip, weight, bias, scale, _shift, offset = inputs[3:11]
    return _empty_gradients(x, second_bias, skip, weight, bias, scale, offset)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, skip, weight, bias, scale, shift, offset, seed, num_groups, _, silu, dropout = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # saves a fill with zeros for stats
    ctx.save_for_backward(x, None, skip, weight, bias, scale, shift, offset, seed, output[1])
    ctx.settings = num_groups, silu, dropout


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, b, b_bias, skip, weight, bias, scale, shift, offset, seed, num_groups, _, silu, dropout = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # saves a map of zeros where only the norm reads the sum
    ctx.save_for_backward(total, b_bias, skip, weight, bias, scale, shift, offset, seed, stats)
    ctx.settings, ctx.has_b = (num_groups, silu, dropout), b is not None


def _gradients(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of x, of second_bias, and of (skip, weight, bias, scale, shift, offset)."""
    if torch.is_grad_enabled():
        no_derivative("the backward pass of group_norm_silu")
    x, second_bias, skip, weight, bias, scale, shift, offset, seed, stats = ctx.saved_tensors
    shared = offset if offset is not None and offset.dim() == 1 else None
    dx, dskip, dweight, dbias, dscale, dsecond_bias, doffset, sums = _backward(
        dy, dtotal, None, None, x, second_bias, skip, weight, bias, scale, shift, shared, seed, stats, *ctx.settings
    )
    if offset is not None and shared is None:
        doffset = sums[:, 2].to(offset.dtype)
    rest = (
        None if skip is None else dskip,
        dweight,
        dbias,
        None if scale is None else dscale,
        None if shift is None else sums[:, 0].to(shift.dtype),
        None if offset is None else doffset,
    )
    return dx, None if second_bias is None else dsecond_bias, rest


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, _no_bias, rest = _gradients(ctx, dy, None)
    return (dx, *rest, *(None,) * 5)


def _add_differentiate(ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:  # nothing read y
        total, skip = ctx.saved_tensors[0], ctx.saved_tensors[2]
        B, C, H, W = total.shape
        dy = empty_map(B, C + (0 if skip is None else skip.shape[1]), H, W, total).zero_()
    dx, db_bias, rest = _gradients(ctx, dy, dtotal)
    return (dx, dx if ctx.has_b else None, db_bias, *rest, *(None,) * 5)


_forward.register_autograd(_differentiate, setup_context=_setup)
_add_forward.register_autograd(_add_differentiate, setup_context=_add_setup)


def _dropout(dropout: float, seed: Tensor | None, device: torch.device) -> tuple[Tensor | None, float]:
    """(seed, probability), or (None, 0) where the probability rounds to 0; the seed is drawn if none is given."""
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

    offset   [B, C] or [C], added to x (and skip) before the norm; its gradient is the sum of dx over the pixels, and
             for [C] over the images.
    dropout  probability to the nearest 1 / 65536, by a counter from seed.
    seed     [1] int64 on x's device; drawn from torch's generator if dropout needs one and none is given.
    Raises ValueError for shapes, dtypes or devices that don't fit; a channels-first map is copied, with a warning.
    """
    seed, dropout = _dropout(dropout, seed, x.device)
    return _forward(x, skip, weight, bias, scale, shift, offset, seed, num_groups, eps, silu, dropout)[0]


def add_group_norm_silu(
    a: Tensor,
    b: Tensor | None,
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

    The gradients of a and b are one map.
    """
    seed, dropout = _dropout(dropout, seed, a.device)
    affine = (weight, bias, scale, shift, offset)
    total, y, _ = _add_forward(a, b, b_bias, skip, *affine, seed, num_groups, eps, silu, dropout)
    return total, y
