"""Noise from counters, in kernels: the same numbers as `reference.image_noise` and `reference.image_uniform`.

Elements 4k .. 4k + 3 of an image (in C, H, W order) come from one call of philox-4x32-10, with the seed as key and the
counter (k, draw, index low, index high), by the Box-Muller transform in float64. Transforms of the same words on a CPU
and on GPUs differ by rounding of float64, so the float32 results agree but for a rare last bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import kernel_op, launcher
from torch import Tensor

# Numbers for whose values Triton compiles no variants, as no alignment depends on them.
UNALIGNED = ["seed", "draw", "N", "HW", "W", "B", "parts", "x_channel", "n_channel", "coef_stride"]


@triton.jit
def _cos_sin(b_u):
    """cos and sin of 2 pi u for u in (0, 1), float64.

    Subtracting quarter turns is exact; for the rest, at most pi / 4, Taylor's series to a^16 are exact to rounding. A
    library's functions would have a branch for huge angles, which needs a stack.
    """
    TWO_PI: tl.constexpr = 6.283185307179586
    b_turn = tl.floor(b_u * 4.0 + 0.5)
    b_a = (b_u - b_turn * 0.25) * TWO_PI
    b_a2 = b_a * b_a
    b_sin = 1.0 - b_a2 * (1.0 / 210.0)
    b_sin = 1.0 - b_a2 * (1.0 / 156.0) * b_sin
    b_sin = 1.0 - b_a2 * (1.0 / 110.0) * b_sin
    b_sin = 1.0 - b_a2 * (1.0 / 72.0) * b_sin
    b_sin = 1.0 - b_a2 * (1.0 / 42.0) * b_sin
    b_sin = 1.0 - b_a2 * (1.0 / 20.0) * b_sin
    b_sin = b_a * (1.0 - b_a2 * (1.0 / 6.0) * b_sin)
    b_cos = 1.0 - b_a2 * (1.0 / 240.0)
    b_cos = 1.0 - b_a2 * (1.0 / 182.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 132.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 90.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 56.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 30.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 12.0) * b_cos
    b_cos = 1.0 - b_a2 * (1.0 / 2.0) * b_cos
    b_odd = (b_turn == 1.0) | (b_turn == 3.0)
    b_x, b_y = tl.where(b_odd, b_sin, b_cos), tl.where(b_odd, b_cos, b_sin)
    b_x = tl.where((b_turn == 1.0) | (b_turn == 2.0), -b_x, b_x)
    return b_x, tl.where((b_turn == 2.0) | (b_turn == 3.0), -b_y, b_y)


@triton.jit
def _box_muller(w_a, w_b):
    b_radius = tl.sqrt(-2.0 * tl.log((w_a.to(tl.float64) + 0.5) * 2.0**-32))
    b_cos, b_sin = _cos_sin((w_b.to(tl.float64) + 0.5) * 2.0**-32)
    return (b_radius * b_cos).to(tl.float32), (b_radius * b_sin).to(tl.float32)


@triton.jit
def counter_noise(seed, i_index, i_draw, o_e, Q: tl.constexpr, ALIGNED: tl.constexpr):
    """Noise [Q, 4] of one image at elements o_e [Q, 4] int32, four neighbours per row.

    ALIGNED: rows start at multiples of 4, so that one call serves a row.
    """
    i_low = (i_index & 0xFFFFFFFF).to(tl.uint32)
    i_high = (i_index >> 32).to(tl.uint32)
    i_draw = i_draw.to(tl.uint32)
    b_call = (o_e // 4).to(tl.uint32)
    if ALIGNED:
        b_call = tl.max(b_call.to(tl.int32), axis=1).to(tl.uint32)
    b_zero = b_call * 0
    w0, w1, w2, w3 = tl.philox(seed, b_call, b_zero + i_draw, b_zero + i_low, b_zero + i_high, 10)
    if ALIGNED:
        n0, n1 = _box_muller(w0, w1)
        n2, n3 = _box_muller(w2, w3)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (Q, 4))
    else:
        b_first = o_e % 4 < 2
        b_cos, b_sin = _box_muller(tl.where(b_first, w0, w2), tl.where(b_first, w1, w3))
        return tl.where(o_e % 2 == 0, b_cos, b_sin)


@triton.jit(do_not_specialize=UNALIGNED)
def _image_noise(out_ptr, index_ptr, draw_ptr, seed, N, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_e = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None] * 4 + tl.arange(0, 4)[None, :]
    i_draw = i_b * 0
    if draw_ptr is not None:
        i_draw = tl.load(draw_ptr + i_b)
    b_noise = counter_noise(seed, tl.load(index_ptr + i_b), i_draw, o_e, BLOCK, True)
    tl.store(out_ptr + i_b * N + o_e, b_noise, mask=o_e < N)


@triton.jit(do_not_specialize=UNALIGNED)
def _image_uniform(out_ptr, index_ptr, draw, seed, B, BLOCK: tl.constexpr):
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < B
    i_index = tl.load(index_ptr + o_b, mask=m_b, other=0)
    b_zero = (o_b * 0).to(tl.uint32)
    i_low, i_high = (i_index & 0xFFFFFFFF).to(tl.uint32), (i_index >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, b_zero, b_zero + draw.to(tl.uint32), i_low, i_high, 10)
    tl.store(out_ptr + o_b, (word.to(tl.float64) + 0.5) * 2.0**-32, mask=m_b)


@kernel_op("image_noise")
def _op(seed: int, index: Tensor, draw: Tensor | None, shape: list[int]) -> Tensor:
    out = torch.empty(len(index), *shape, dtype=torch.float32, device=index.device)
    count = math.prod(shape)
    if out.numel():
        grid = (len(index), triton.cdiv(count, 4 * 128))
        draw = None if draw is None else draw.contiguous()
        launcher(_image_noise, grid, seed, count, BLOCK=128)(out, index.contiguous(), draw)
    return out


@_op.register_fake
def _(seed: int, index: Tensor, draw: Tensor | None, shape: list[int]) -> Tensor:
    return torch.empty(len(index), *shape, dtype=torch.float32, device=index.device)


_op.register_no_derivative()


def image_noise(seed: int, index: Tensor, draw: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise [B, *shape]; index [B] int64, draw [B] int64 or None for 0.

    Raises ValueError when index or draw are of another kind.
    """
    check_counters(index, draw)
    return _op(seed, index, draw, list(shape))


@kernel_op("image_uniform")
def _uniform_op(seed: int, index: Tensor, draw: int) -> Tensor:
    B = len(index)
    out = torch.empty(B, dtype=torch.float64, device=index.device)
    if B:
        launcher(_image_uniform, (triton.cdiv(B, 128),), draw, seed, B, BLOCK=128)(out, index.contiguous())
    return out


@_uniform_op.register_fake
def _(seed: int, index: Tensor, draw: int) -> Tensor:
    return torch.empty(len(index), dtype=torch.float64, device=index.device)


_uniform_op.register_no_derivative()


def image_uniform(seed: int, index: Tensor, draw: int) -> Tensor:
    """Uniform float64 in (0, 1), [B]; index [B] int64. Raises ValueError when index is of another kind.

    This is a single launch, where the reference needs over a hundred. Every training step draws its timesteps with it.
    """
    check_counters(index, None)
    return _uniform_op(seed, index, draw)


def check_counters(index: Tensor, draw: Tensor | None) -> None:
    """Raise ValueError unless index and draw are [B] int64."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"noise needs index [B] int64; got {tuple(index.shape)} {index.dtype}: use .long()")
    if draw is not None and (draw.shape != index.shape or draw.dtype != torch.int64):
        raise ValueError(
            f"noise needs draw of shape {tuple(index.shape)} int64; got {tuple(draw.shape)} {draw.dtype}: one per image"
        )
