"""A residual block's first norm and the 1x1 convolution of its shortcut, which read the same maps, as one op.

    y = silu(group_norm(cat(x, skip))), shortcut = conv1x1(cat(x, skip)) without bias, where x may be a + b + b_bias,
a + b or a + b_bias.

Shapes   as in `group_norm_silu.py`; conv_weight [C_out, C] in x's dtype, shortcut [B, C_out, H, W].
Traffic  The norm's, and that of matrix products. The second one adds its result to the first one's in place: out of
         place PyTorch would copy that first. The convolution's gradients of x and skip are read by the norm's backward
         pass, which adds them to its own before it rounds and writes these. So is the sum's from its other readers.
"""

from __future__ import annotations

from typing import Any

import torch
from fastdiff.kernels.group_norm_silu import launch_forward
from fastdiff.kernels.launch import IMPLEMENTATIONS, channels_last, empty_map, kernel_op, no_derivative
from torch import Tensor

OP = "norm_and_shortcut"


def _rows(x: Tensor) -> Tensor:
    """A channels-last map [B, C, H, W] as a matrix [B * H * W, C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def _summed(b: Tensor | None, b_bias: Tensor | None) -> bool:
    return b is not None or b_bias is not None


@kernel_op(OP)
def _forward(
    a: Tensor,
    b: Tensor | None,
    b_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (the sum, which is empty without b and b_bias; y; stats [B, 3, C]; shortcut)."""
    a, skip = channels_last(a, OP, "a"), channels_last(skip, OP, "skip")
    affine = (weight, bias, None, None, None, None)
    total, y, stats = launch_forward(OP, a, b, b_bias, skip, affine, (num_groups, eps, True, 0.0))
    C1 = a.shape[1]
    rows = torch.mm(_rows(total), conv_weight[:, :C1].t())
    if skip is not None:
        rows.addmm_(_rows(skip), conv_weight[:, C1:].t())
    return total if _summed(b, b_bias) else a.new_empty(0), y, stats, _map(rows, a)


@_forward.register_fake
def _(
    a: Tensor, b: Tensor | None, b_bias: Tensor | None, skip: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C1, H, W = a.shape
    C = C1 + (0 if skip is None else skip.shape[1])
    total = empty_map(B, C1, H, W, a) if _summed(b, b_bias) else a.new_empty(0)
    stats, C_out = a.new_empty(B, 3, C, dtype=torch.float32), rest[2].shape[0]
    return total, empty_map(B, C, H, W, a), stats, empty_map(B, C_out, H, W, a)


@kernel_op("norm_and_shortcut_backward")
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    dshortcut: Tensor,
    x: Tensor,
    b_bias: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    stats: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dskip, dweight, dbias, db_bias and dconv_weight; those of absent inputs are empty.

    x is the sum, if there is one, and dtotal its gradient from readers beyond this op.
    """
    x, skip = channels_last(x, OP, "x"), channels_last(skip, OP, "skip")
    d_rows, C1 = _rows(channels_last(dshortcut, OP, "the gradient of the shortcut")), x.shape[1]
    dconv_weight = torch.empty_like(conv_weight)
    torch.mm(d_rows.t(), _rows(x), out=dconv_weight[:, :C1])
    dx_other, dskip_other = _map(torch.mm(d_rows, conv_weight[:, :C1]), x), None
    if skip is not None:
        torch.mm(d_rows.t(), _rows(skip), out=dconv_weight[:, C1:])
        dskip_other = _map(torch.mm(d_rows, conv_weight[:, C1:]), x)
    dx, dskip, dweight, dbias, _, db_bias, *_ = IMPLEMENTATIONS["group_norm_silu_backward"](
        *(dy, dx_other, dtotal, dskip_other, x, b_bias, skip, weight, bias),
        *(None, None, None, None, stats, num_groups, True, 0.0),
    )
    return dx, dskip, dweight, dbias, db_bias, dconv_weight


@_backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, dshortcut: Tensor, x: Tensor, b_bias: Tensor | None, skip: Tensor | None,
    weight: Tensor, bias: Tensor, conv_weight: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = (None if skip is None else empty_map(*skip.shape, like=skip), weight, bias, b_bias, conv_weight)
    return empty_map(*x.shape, like=x), *(x.new_empty(0) if each is None else torch.empty_like(each) for each in given)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    a, b, b_bias, skip, weight, bias, conv_weight, num_groups, _ = inputs
    total, _, stats, _ = output
    summed = _summed(b, b_bias)
    ctx.mark_non_differentiable(*((stats,) if summed else (stats, total)))
    ctx.set_materialize_grads(False)  # saves a map of zeros where nothing else reads the sum
    ctx.save_for_backward(total if summed else a, b_bias, skip, weight, bias, conv_weight, stats)
    ctx.num_groups, ctx.has_b = num_groups, b is not None


def _differentiate(
    ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: None, dshortcut: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        no_derivative(f"the backward pass of {OP}")
    x, b_bias, skip, weight, bias, conv_weight, stats = ctx.saved_tensors
    B, C1, H, W = x.shape
    if dy is None:  # nothing read y
        dy = empty_map(B, C1 + (0 if skip is None else skip.shape[1]), H, W, x).zero_()
    if dshortcut is None:
        dshortcut = empty_map(B, conv_weight.shape[0], H, W, x).zero_()
    dx, dskip, dweight, dbias, db_bias, dconv_weight = torch.ops.fastdiff.norm_and_shortcut_backward(
        dy, dtotal, dshortcut, x, b_bias, skip, weight, bias, conv_weight, stats, ctx.num_groups
    )
    return (
        *(dx, dx if ctx.has_b else None, None if b_bias is None else db_bias, None if skip is None else dskip),
        *(dweight, dbias, dconv_weight, None, None),
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


def norm_and_shortcut(
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    *,
    b: Tensor | None = None,
    b_bias: Tensor | None = None,
    skip: Tensor | None = None,
    num_groups: int = 32,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, shortcut) as `reference.norm_and_shortcut`, on channels-last maps."""
    total, y, _, shortcut = _forward(a, b, b_bias, skip, weight, bias, conv_weight, num_groups, eps)
    return total if _summed(b, b_bias) else a, y, shortcut
