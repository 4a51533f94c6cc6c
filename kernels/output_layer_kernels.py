"""The Triton kernels of `output_layer.py`, which describes what they compute.

Maps are [B, L, C] channels-last, L = H * W pixels. A product's columns are [tap][output channel], padded to COLUMNS.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels.launch import Launch, Work
from fastdiff.kernels.products import dot
from fastdiff.kernels.ptx import sigmoid

SHAPES = ["splits", "rows", "tiles", "H", "W", "stride_b", "stride_o", "stride_h", "stride_w", "stride_c"]
"""Numbers for whose values Triton compiles no variants, as no alignment depends on them."""


@triton.jit
def _two_parts(b_x):
    """float32 as the sum of two bf16 numbers, of which the first is truncated."""
    b_hi = (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return b_hi.to(tl.bfloat16), (b_x - b_hi).to(tl.bfloat16)


@triton.jit
def _product(b_a, b_a_lo, b_b, b_b_lo, b_sum):
    """b_sum + (a + a_lo) @ (b + b_lo) without the product of the low parts, the smallest addends first."""
    return dot(b_a, b_b, dot(b_a, b_b_lo, dot(b_a_lo, b_b, b_sum)))


@triton.jit
def _load_map(x_ptr, i_b, o_l, o_c, L, C):
    """A map at pixels o_l and channels o_c as float32, 0 outside."""
    p = x_ptr + i_b.to(tl.int64) * L * C + o_l[:, None] * C + o_c[None, :]
    return tl.load(p, mask=(o_l < L)[:, None] & (o_c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_row(row_ptr, i_row, o_c, C):
    """Row i_row of a table [rows, C], [1, K]."""
    return tl.load(row_ptr + i_row * C + o_c, mask=o_c < C, other=0.0)[None, :]


@triton.jit
def _load_two(p_x, low, m):
    """High and low parts, which lie `low` elements apart."""
    return tl.load(p_x, mask=m, other=0.0), tl.load(p_x + low, mask=m, other=0.0)


# --- forward ---


@triton.jit(do_not_specialize=SHAPES)
def _output_weights(
    weight_ptr, packed_ptr, stride_o, stride_c, stride_h, stride_w, C,
    OUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weights [O, C, 3, 3] → their high and low parts, packed [2, COLUMNS, C]."""
    o_r, o_c = tl.arange(0, COLUMNS)[:, None], tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_t, o_o = o_r // OUT, o_r % OUT
    p = weight_ptr + o_o * stride_o + o_c * stride_c + (o_t // 3) * stride_h + (o_t % 3) * stride_w
    b_hi, b_lo = _two_parts(tl.load(p, mask=(o_t < 9) & (o_c < C), other=0.0).to(tl.float32))
    p_packed = packed_ptr + o_r * C + o_c
    tl.store(p_packed, b_hi, mask=o_c < C)
    tl.store(p_packed + COLUMNS * C, b_lo, mask=o_c < C)


@triton.jit(do_not_specialize=SHAPES)
def _output_moments(
    x_ptr, second_ptr, second_bias_ptr, total_ptr, partial_ptr, splits, rows, L, C,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each channel over `rows` pixels, partial [B, splits, 2, C]; stores the sum."""
    i_b, i_first = tl.program_id(0) // splits, tl.program_id(0) % splits * rows
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c, n = o_c < C, tl.minimum(rows, L - i_first)
    b_mean = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    b_m2 = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for i in range(0, n, BLOCK_L):  # every lane by Welford 1962
        o_l = i + tl.arange(0, BLOCK_L)
        m = (o_l < n)[:, None] & m_c[None, :]
        i_x = (i_b.to(tl.int64) * L + i_first) * C + o_l[:, None] * C + o_c[None, :]
        b_x = tl.load(x_ptr + i_x, mask=m, other=0.0).to(tl.float32)
        if second_ptr is not None:
            b_second = tl.load(second_ptr + i_x, mask=m, other=0.0).to(tl.float32)
            if second_bias_ptr is not None:
                b_second += tl.load(second_bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            b_total = (b_x + b_second).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + i_x, b_total, mask=m)
            b_x = b_total.to(tl.float32)
        b_off = tl.where(m, b_x - b_mean, 0.0)
        b_mean += b_off * (1.0 / (i // BLOCK_L + 1))
        b_m2 += b_off * (b_x - b_mean)
    b_n = tl.maximum((n - tl.arange(0, BLOCK_L) + BLOCK_L - 1) // BLOCK_L, 0).to(tl.float32)[:, None]
    b_first = tl.sum(b_mean * b_n, axis=0) / n  # then lanes by Chan et al. 1979
    b_off = b_mean - b_first[None, :]
    b_rest = tl.sum(b_off * b_n, axis=0) / n
    p = partial_ptr + tl.program_id(0) * 2 * C + o_c
    tl.store(p, b_first + b_rest, mask=m_c)
    tl.store(p + C, tl.sum(b_m2 + b_n * b_off * b_off, axis=0) - n * b_rest * b_rest, mask=m_c)


@triton.jit
def _channels_by_group(CG: tl.constexpr, CG_PAD: tl.constexpr, GROUPS: tl.constexpr):
    """(channels [GROUPS, CG_PAD], which of them exist)."""
    o_k = tl.arange(0, CG_PAD)[None, :]
    return tl.arange(0, GROUPS)[:, None] * CG + o_k, (o_k < CG) & (tl.arange(0, GROUPS)[:, None] >= 0)


@triton.jit(do_not_specialize=SHAPES)
def _output_statistics(
    partial_ptr, weight_ptr, bias_ptr, stats_ptr, splits, rows, L, C, eps,
    CG: tl.constexpr, CG_PAD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """partial → stats [B, 5, C]: the group's mean, its 1 / std, the channel's mean minus the group's, and the gain and
    the bias by which the norm's result is x * gain + bias."""
    i_b = tl.program_id(0)
    o_c, m = _channels_by_group(CG, CG_PAD, GROUPS)
    b_mean = tl.zeros((GROUPS, CG_PAD), tl.float32)
    b_m2 = tl.zeros((GROUPS, CG_PAD), tl.float32)
    for i in range(splits):
        p = partial_ptr + (i_b * splits + i) * 2 * C + o_c
        n, n_before = tl.minimum(rows, L - i * rows), i * rows
        b_off = tl.load(p, mask=m, other=0.0) - b_mean
        b_mean += b_off * (n / (n_before + n))
        b_m2 += tl.load(p + C, mask=m, other=0.0) + b_off * b_off * (n / (n_before + n) * n_before)
    b_group = (tl.sum(b_mean, axis=1) / CG)[:, None]
    b_off = tl.where(m, b_mean - b_group, 0.0)
    b_rest = (tl.sum(b_off, axis=1) / CG)[:, None]
    b_group += b_rest
    b_off = tl.where(m, b_off - b_rest, 0.0)
    b_variance = (tl.sum(b_m2 + L * b_off * b_off, axis=1) / (L * CG))[:, None]
    b_rstd = 1.0 / tl.sqrt(b_variance + eps)
    b_gain = b_rstd * tl.load(weight_ptr + o_c, mask=m, other=0.0).to(tl.float32)
    p = stats_ptr + i_b * 5 * C + o_c
    tl.store(p, b_group + b_off * 0, mask=m)
    tl.store(p + C, b_rstd + b_off * 0, mask=m)
    tl.store(p + 2 * C, b_off, mask=m)
    tl.store(p + 3 * C, b_gain, mask=m)
    tl.store(p + 4 * C, tl.load(bias_ptr + o_c, mask=m, other=0.0).to(tl.float32) - b_group * b_gain, mask=m)


@triton.jit(do_not_specialize=SHAPES)
def _output_products(
    x_ptr, stats_ptr, packed_ptr, taps_ptr, tiles, L, C,
    OUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """taps [B, 9 * O, L] float32: each pixel's activations times each tap's weights."""
    i_b, o_l = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    o_r = tl.arange(0, COLUMNS)
    b_taps = tl.zeros((BLOCK_L, COLUMNS), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_h = _load_map(x_ptr, i_b, o_l, o_c, L, C) * _load_row(stats_ptr, i_b * 5 + 3, o_c, C)
        b_h += _load_row(stats_ptr, i_b * 5 + 4, o_c, C)
        b_hi, b_lo = _two_parts(b_h * sigmoid(b_h))
        b_w, b_w_lo = _load_two(packed_ptr + o_r[None, :] * C + o_c[:, None], COLUMNS * C, (o_c < C)[:, None])
        b_taps = _product(b_hi, b_lo, b_w, b_w_lo, b_taps)
    p = taps_ptr + i_b.to(tl.int64) * 9 * OUT * L + o_l[:, None] + o_r[None, :] * L
    tl.store(p, b_taps, mask=(o_l < L)[:, None] & (o_r < 9 * OUT)[None, :])


@triton.jit(do_not_specialize=SHAPES)
def _output_sum(taps_ptr, bias_ptr, y_ptr, tiles, H, W, OUT: tl.constexpr, BLOCK_L: tl.constexpr):
    """y [B, H, W, O]: the bias and, for each tap, the product of the neighbouring pixel that it sees."""
    i_b, o_l = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    L, o_h, o_w = H * W, o_l // W, o_l % W
    for i_o in tl.static_range(OUT):
        b_y = tl.zeros((BLOCK_L,), tl.float32) + tl.load(bias_ptr + i_o).to(tl.float32)
        for t in tl.static_range(9):
            i_h, i_w = o_h + t // 3 - 1, o_w + t % 3 - 1
            m = (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
            p = taps_ptr + (i_b.to(tl.int64) * 9 * OUT + t * OUT + i_o) * L
            b_y += tl.load(p + i_h * W + i_w, mask=m, other=0.0)
        tl.store(y_ptr + (i_b.to(tl.int64) * L + o_l) * OUT + i_o, b_y, mask=o_l < L)


# --- backward ---


@triton.jit(do_not_specialize=SHAPES)
def _output_patches(
    dy_ptr, patches_ptr, stride_b, stride_o, stride_h, stride_w, tiles, H, W, low,
    OUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dy [B, O, H, W] → high and low parts of what each pixel's product for each tap went into, [2, B, L, COLUMNS].

    low  elements from the high to the low parts
    """
    i_b, o_l = tl.program_id(0) // tiles, (tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]
    o_r = tl.arange(0, COLUMNS)[None, :]
    o_t, o_o = o_r // OUT, o_r % OUT
    i_h, i_w = o_l // W + 1 - o_t // 3, o_l % W + 1 - o_t % 3
    m = (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W) & (o_t < 9)
    p = dy_ptr + i_b.to(tl.int64) * stride_b + i_h * stride_h + i_w * stride_w + o_o * stride_o
    b_hi, b_lo = _two_parts(tl.load(p, mask=m, other=0.0).to(tl.float32))
    p_patches = patches_ptr + (i_b.to(tl.int64) * H * W + o_l) * COLUMNS + o_r
    tl.store(p_patches, b_hi, mask=o_l < H * W)
    tl.store(p_patches + low, b_lo, mask=o_l < H * W)


@triton.jit
def _load_patches(patches_ptr, i_b, o_l, o_r, L, low, COLUMNS: tl.constexpr):
    p = patches_ptr + i_b.to(tl.int64) * L * COLUMNS + o_l[:, None] * COLUMNS + o_r[None, :]
    return _load_two(p, low, (o_l < L)[:, None])


@triton.jit
def _through_silu(b_dy, b_h, b_sigmoid):
    return b_dy * b_sigmoid * (1.0 + b_h * (1.0 - b_sigmoid))


@triton.jit(do_not_specialize=SHAPES)
def _output_backward_sums(
    x_ptr, stats_ptr, packed_ptr, patches_ptr, partial_ptr, dpacked_ptr, splits, rows, L, C, low,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over `rows` pixels: partial [B, splits, 2, C] of dh and of dh times the normalised x, dpacked [B * splits,
    COLUMNS, C] of the weights' gradient. dh is the gradient before SiLU."""
    i_part = tl.program_id(1)
    i_b, i_first = i_part // splits, i_part % splits * rows
    o_r, o_c = tl.arange(0, COLUMNS), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (o_c < C)[None, :]
    b_w, b_w_lo = _load_two(packed_ptr + o_r[:, None] * C + o_c[None, :], COLUMNS * C, m_c)
    b_mean, b_rstd = _load_row(stats_ptr, i_b * 5, o_c, C), _load_row(stats_ptr, i_b * 5 + 1, o_c, C)
    b_gain, b_bias = _load_row(stats_ptr, i_b * 5 + 3, o_c, C), _load_row(stats_ptr, i_b * 5 + 4, o_c, C)
    b_dw = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    b_sum = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    b_sum_x = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    # On sm_80 registers spill if the weights' fragments stay in them throughout the loop, and with 3 stages.
    for i in tl.range(0, tl.minimum(rows, L - i_first), BLOCK_L, disable_licm=True):
        o_l = i_first + i + tl.arange(0, BLOCK_L)
        b_dy, b_dy_lo = _load_patches(patches_ptr, i_b, o_l, o_r, L, low, COLUMNS)
        b_x = _load_map(x_ptr, i_b, o_l, o_c, L, C)
        b_h = b_x * b_gain + b_bias
        b_sigmoid = sigmoid(b_h)
        b_hi, b_lo = _two_parts(b_h * b_sigmoid)
        b_dw = _product(tl.trans(b_dy), tl.trans(b_dy_lo), b_hi, b_lo, b_dw)
        b_dh = _product(b_dy, b_dy_lo, b_w, b_w_lo, tl.zeros((BLOCK_L, BLOCK_C), tl.float32))
        b_dh = _through_silu(b_dh, b_h, b_sigmoid)  # 0 beyond L, as are the patches
        b_sum += b_dh
        b_sum_x += b_dh * (b_x - b_mean)
    p = partial_ptr + i_part * 2 * C + o_c[None, :]
    tl.store(p, tl.sum(b_sum, axis=0)[None, :], mask=m_c)
    tl.store(p + C, tl.sum(b_sum_x, axis=0)[None, :] * b_rstd, mask=m_c)
    tl.store(dpacked_ptr + (i_part.to(tl.int64) * COLUMNS + o_r[:, None]) * C + o_c[None, :], b_dw, mask=m_c)


@triton.jit(do_not_specialize=SHAPES)
def _output_finish(
    partial_ptr, stats_ptr, sums_ptr, line_ptr, splits, L, C,
    CG: tl.constexpr, CG_PAD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """partial → sums [B, 3, C]: gradients of the norm's bias and weight, and the sum of dx over the pixels.

    line [B, 2, C]: dx = dh * gain + x * line[0] + line[1].
    """
    i_b = tl.program_id(0)
    o_c, m = _channels_by_group(CG, CG_PAD, GROUPS)
    b_sum = tl.zeros((GROUPS, CG_PAD), tl.float32)
    b_sum_x = tl.zeros((GROUPS, CG_PAD), tl.float32)
    for i in range(splits):
        p = partial_ptr + (i_b * splits + i) * 2 * C + o_c
        b_sum += tl.load(p, mask=m, other=0.0)
        b_sum_x += tl.load(p + C, mask=m, other=0.0)
    p_stats = stats_ptr + i_b * 5 * C + o_c
    b_rstd, b_gain = tl.load(p_stats + C, mask=m, other=0.0), tl.load(p_stats + 3 * C, mask=m, other=0.0)
    b_shift = -(tl.sum(b_gain * b_sum, axis=1) / (L * CG))[:, None]
    b_slope = -(tl.sum(b_gain * b_sum_x, axis=1) / (L * CG))[:, None] * b_rstd
    p_line, p_sums = line_ptr + i_b * 2 * C + o_c, sums_ptr + i_b * 3 * C + o_c
    tl.store(p_line, b_slope, mask=m)
    tl.store(p_line + C, b_shift - tl.load(p_stats, mask=m, other=0.0) * b_slope, mask=m)
    tl.store(p_sums, b_sum, mask=m)
    tl.store(p_sums + C, b_sum_x, mask=m)
    b_off = tl.load(p_stats + 2 * C, mask=m, other=0.0)
    tl.store(p_sums + 2 * C, b_gain * b_sum + L * (b_shift + b_slope * b_off), mask=m)


@triton.jit(do_not_specialize=SHAPES)
def _output_gradient(
    x_ptr, stats_ptr, packed_ptr, patches_ptr, line_ptr, dx_ptr, splits, rows, L, C, low,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, L, C]."""
    i_b, i_first = tl.program_id(1) // splits, tl.program_id(1) % splits * rows
    o_r, o_c = tl.arange(0, COLUMNS), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_w, b_w_lo = _load_two(packed_ptr + o_r[:, None] * C + o_c[None, :], COLUMNS * C, (o_c < C)[None, :])
    b_gain, b_bias = _load_row(stats_ptr, i_b * 5 + 3, o_c, C), _load_row(stats_ptr, i_b * 5 + 4, o_c, C)
    b_slope, b_shift = _load_row(line_ptr, i_b * 2, o_c, C), _load_row(line_ptr, i_b * 2 + 1, o_c, C)
    for i in range(0, tl.minimum(rows, L - i_first), BLOCK_L):
        o_l = i_first + i + tl.arange(0, BLOCK_L)
        b_dy, b_dy_lo = _load_patches(patches_ptr, i_b, o_l, o_r, L, low, COLUMNS)
        b_dh = _product(b_dy, b_dy_lo, b_w, b_w_lo, tl.zeros((BLOCK_L, BLOCK_C), tl.float32))
        b_x = _load_map(x_ptr, i_b, o_l, o_c, L, C)
        b_h = b_x * b_gain + b_bias
        b_dx = _through_silu(b_dh, b_h, sigmoid(b_h)) * b_gain + (b_x * b_slope + b_shift)
        p_dx = dx_ptr + i_b.to(tl.int64) * L * C + o_l[:, None] * C + o_c[None, :]
        tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=(o_l < L)[:, None] & (o_c < C)[None, :])


def _work(launch: Launch) -> Work:
    """Every program has `rows` pixels, of which an image's last may lack some."""
    given = launch.named()
    return Work(values={"i_first": 0, "n": min(given["rows"], given["L"])})


WORK = dict.fromkeys(("_output_moments", "_output_backward_sums", "_output_gradient"), _work)
