"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, from bytes to the network's input, in one pass.

Shapes   x_start uint8 [B, H, W, C] (scaled to [-1, 1]) or float32 [B, C, H, W]; coefficients [B, 2] float32;
         noise float32 [B, C, H, W], or counters from which it is computed here and never stored.
         x_t channels-last [B, P, H, W] in the compute dtype; P is C, or 8 with the other channels zero, so that the
         first convolution reads 16 bytes per pixel.
Traffic  x_start once, x_t once; noise once if given. Computed noise costs about 60 float64 operations an element.
Source   Ho et al. 2020, eq. 4 (https://arxiv.org/abs/2006.11239).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import Work, empty_map, kernel_op, launcher
from fastdiff.kernels.noise import UNALIGNED
from fastdiff.kernels.pixels import (
    QUADS,
    check_coefficients,
    load_noise,
    load_start,
    noise_args,
    noise_strides,
    start_map,
    store_padded,
    strides,
)
from fastdiff.kernels.reference import CounterNoise
from torch import Tensor

MAX_CHANNELS = 4


@triton.jit
def _channel(
    x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, i_c: tl.constexpr, o_p, m, HW, W,
    x_channel, x_pixel, n_channel, n_pixel, C: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One channel of x_t [Q, 4]; zeros beyond C."""
    if i_c < C:
        b_x = load_start(x_ptr, flip_ptr, i_b, i_c, o_p, m, C, HW, W, x_channel, x_pixel)
        b_noise = load_noise(
            noise_ptr, index_ptr, draw_ptr, seed, i_b, i_c, o_p, m, C, HW, n_channel, n_pixel, Q, ALIGNED
        )
        return b_a * b_x + b_s * b_noise
    else:
        return tl.zeros((Q, 4), tl.float32)


@triton.jit(do_not_specialize=UNALIGNED)
def _q_sample(
    x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, coef_ptr, out_ptr,
    seed, HW, W, x_channel, x_pixel, n_channel, n_pixel, coef_stride,
    C: tl.constexpr, PAD: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_p = (tl.program_id(1) * Q + tl.arange(0, Q))[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = o_p < HW
    b_a = tl.load(coef_ptr + i_b * coef_stride)
    b_s = tl.load(coef_ptr + i_b * coef_stride + 1)
    if PAD == 1:  # gray and unpadded
        b_v = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, 0, o_p, m, HW, W,
                       x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
        tl.store(out_ptr + i_b * HW + o_p, b_v.to(out_ptr.dtype.element_ty), mask=m)
    elif PAD == C and PAD != 4:
        for i_c in tl.static_range(C):
            b_v = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, i_c, o_p, m, HW, W,
                           x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
            tl.store(out_ptr + (i_b * HW + o_p) * PAD + i_c, b_v.to(out_ptr.dtype.element_ty), mask=m)
    else:
        v0 = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, 0, o_p, m, HW, W,
                      x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
        v1 = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, 1, o_p, m, HW, W,
                      x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
        v2 = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, 2, o_p, m, HW, W,
                      x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
        v3 = _channel(x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, seed, b_a, b_s, i_b, 3, o_p, m, HW, W,
                      x_channel, x_pixel, n_channel, n_pixel, C, Q, ALIGNED)  # fmt: skip
        store_padded(out_ptr, i_b, o_p, m, HW, v0, v1, v2, v3, PAD)


WORK = {"_q_sample": lambda launch: Work(elements=launch.grid[0] * launch.named()["C"] * launch.named()["HW"])}


@kernel_op("q_sample")
def _op(
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: int,
    index: Tensor | None,
    draw: Tensor | None,
    flip: Tensor | None,
    dtype: torch.dtype,
    channels: int,
) -> Tensor:
    x = start_map(x_start, "q_sample")
    B, C, H, W = x.shape
    out = empty_map(B, channels, H, W, x, dtype)
    if not out.numel():
        return out
    x, x_channel, x_pixel = strides(x)
    noise, n_channel, n_pixel = noise_strides(noise)
    grid = (B, triton.cdiv(H * W, 4 * QUADS))
    run = launcher(
        _q_sample,
        grid,
        *(seed, H * W, W, x_channel, x_pixel, n_channel, n_pixel, coefficients.stride(0)),
        C=C,
        PAD=channels,
        Q=QUADS,
        ALIGNED=H * W % 4 == 0,
    )
    run(x, None if flip is None else flip.contiguous(), noise, index, draw, coefficients, out)
    return out


@_op.register_fake
def _(x_start, *others):
    dtype, channels = others[-2:]
    B, _, H, W = start_map(x_start, "q_sample").shape
    return empty_map(B, channels, H, W, x_start, dtype)


_op.register_no_derivative()


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor | CounterNoise,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Tensor:
    """x_t [B, channels, H, W] channels-last in `dtype`, at most 4 of its channels from x_start, the others zero.

    x_start       uint8 [B, H, W, C] or float32 [B, C, H, W].
    coefficients  [B, 2] float32: sqrt(abar_t), sqrt(1 - abar_t).
    flip          [B] bool: images to mirror left to right; None: none. The noise is not mirrored.
    channels      C or 8; None: C.
    Raises ValueError for shapes and dtypes that don't fit.
    """
    x = start_map(x_start, "q_sample")
    B, C = x.shape[:2]
    if C > MAX_CHANNELS:
        raise ValueError(f"q_sample takes at most {MAX_CHANNELS} channels; got {C}: use the reference")
    if channels not in (None, C, 8):
        raise ValueError(f"q_sample writes {C} or 8 channels, not {channels}")
    if flip is not None and (flip.shape != (B,) or flip.dtype != torch.bool):
        raise ValueError(f"q_sample needs flip of shape {(B,)} bool; got {tuple(flip.shape)} {flip.dtype}")
    check_coefficients(coefficients, B, 2, "q_sample")
    given, seed, index, draw = noise_args(noise, x.shape, "q_sample")
    return _op(x_start, coefficients, given, seed, index, draw, flip, dtype, channels or C)
