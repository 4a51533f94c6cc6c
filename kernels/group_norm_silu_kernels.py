"""The Triton kernels of `group_norm_silu.py`, which describes what they compute. One file: all share its first part.

Maps are [B, L, C] channels-last, L = H * W pixels; with a second input, x [B, L, C1] and skip [B, L, C2] are read as
if concatenated. With a second summand the norm's input is the sum of x, second [B, L, C1] and second_bias [C1], rounded
as it is stored in total [B, L, C1]. Coefficients are fp32 [C] or [B, C]. There are two ways through memory:

slab    one program computes whole groups of an image: sums, coefficients and result in one launch. A slab of one block
        stays in registers (one read); a longer one is read again while it is still in L2.
split   many programs sum parts of an image, one per group merges them, many apply the result (two reads).

stats [B, 3, C] holds what the backward pass needs: the value subtracted from x, 1 / std, and the channel's mean after
the subtraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers for whose values Triton compiles no variants, as no alignment depends on them.
SHAPES = ["slabs", "tiles", "splits", "parts", "L", "B", "drop_below"]

# --- pieces ---


@triton.jit
def _load_pair(x_ptr, skip_ptr, i_row, o_c, m, C1, C2):
    """x and skip side by side at pixels i_row [R, 1] (int64, over all images) and channels o_c [1, K], as fp32."""
    if skip_ptr is None:
        b_x = tl.load(x_ptr + i_row * C1 + o_c, mask=m, other=0.0).to(tl.float32)
    else:
        b_x = tl.load(x_ptr + i_row * C1 + o_c, mask=m & (o_c < C1), other=0.0).to(tl.float32)
        b_x += tl.load(skip_ptr + i_row * C2 + (o_c - C1), mask=m & (o_c >= C1), other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _load_first(x_ptr, skip_ptr, i_row, o_c, m, C1):
    """A map of C1 channels that is read only once, in its own dtype; 0 in the channels of a skip."""
    if skip_ptr is not None:
        m &= o_c < C1
    return tl.load(x_ptr + i_row * C1 + o_c, mask=m, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_input(x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, i_row, o_c, m, C1, C2):
    """As _load_pair; with a second summand x becomes the sum, which is stored."""
    if second_ptr is None:
        b_x = _load_pair(x_ptr, skip_ptr, i_row, o_c, m, C1, C2)
    else:
        b_x = _load_first(second_ptr, skip_ptr, i_row, o_c, m, C1).to(tl.float32)
        if second_bias_ptr is not None:  # loaded from L1 at every use, which saves registers
            b_x = tl.where(m, b_x + tl.load(second_bias_ptr + o_c, mask=o_c < C1, other=0.0).to(tl.float32), 0.0)
        b_x += _load_first(x_ptr, skip_ptr, i_row, o_c, m, C1).to(tl.float32)
        b_total = b_x.to(total_ptr.dtype.element_ty)
        b_x = b_total.to(tl.float32)
        if skip_ptr is None:
            tl.store(total_ptr + i_row * C1 + o_c, b_total, mask=m)
        else:
            tl.store(total_ptr + i_row * C1 + o_c, b_total, mask=m & (o_c < C1))
            b_x += tl.load(skip_ptr + i_row * C2 + (o_c - C1), mask=m & (o_c >= C1), other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _store_pair(x_ptr, skip_ptr, i_row, o_c, m, C1, C2, b_x):
    b_x = b_x.to(x_ptr.dtype.element_ty)
    if skip_ptr is None:
        tl.store(x_ptr + i_row * C1 + o_c, b_x, mask=m)
    else:
        tl.store(x_ptr + i_row * C1 + o_c, b_x, mask=m & (o_c < C1))
        tl.store(skip_ptr + i_row * C2 + (o_c - C1), b_x, mask=m & (o_c >= C1))


@triton.jit
def _merge(b_mean, b_m2, b_n, n):
    """Means and squared deviations [R, K] of b_n [R, 1] values each → those of all n values, [K] (Chan et al. 1979).

    The mean is corrected by what its own rounding left, so that |mean| >> std costs no digits.
    """
    b_first = tl.sum(b_mean * b_n, axis=0) / n
    b_off = b_mean - b_first[None, :]
    b_rest = tl.sum(b_off * b_n, axis=0) / n
    return b_first + b_rest, tl.sum(b_m2 + b_n * b_off * b_off, axis=0) - n * b_rest * b_rest


@triton.jit
def _same_group(CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr):
    """[K, K]: 1 where two channels of a tile are of one group. Whole groups lie in a tile of CT channels."""
    o = tl.arange(0, CT_PAD)
    return ((o[:, None] // CG == o[None, :] // CG) & (o[None, :] < CT)).to(tl.float32)


@triton.jit
def _group_stats(b_mean, b_m2, L, eps, CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr):
    """Channel means and squared deviations [K] → group mean and 1 / std of each channel's group."""
    b_same = _same_group(CG, CT, CT_PAD)
    b_group = tl.sum(b_same * b_mean[None, :], axis=1) / CG
    b_off = b_mean[None, :] - b_group[:, None]
    b_rest = tl.sum(b_same * b_off, axis=1) / CG
    b_m2 = tl.sum(b_same * (b_m2[None, :] + L * b_off * b_off), axis=1) - (L * CG) * b_rest * b_rest
    # A lane beyond the tile belongs to no group; its variance is 0.
    return b_group + b_rest, 1.0 / tl.sqrt(tl.maximum(b_m2, 0.0) / (L * CG) + eps)


@triton.jit
def _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride):
    """What follows the norm as gain and bias [K]: weight * (1 + scale), bias * (1 + scale) + shift."""
    b_gain = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        b_scale = 1.0 + tl.load(scale_ptr + i_b * scale_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_shift = tl.load(shift_ptr + i_b * shift_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_gain *= b_scale
        b_bias = b_bias * b_scale + b_shift
    return b_gain, b_bias


@triton.jit
def _keep(seed_ptr, i_b, o_l, i_c, C, drop_below, R: tl.constexpr, K: tl.constexpr):
    """[R, K] bool: which elements at pixels o_l [R] and channels i_c .. i_c + K - 1 dropout keeps.

    Eight neighbouring channels share one call of philox-4x32-7, 16 bits each; 7 rounds pass BigCrush (Salmon et al.
    2011). The element's place is the counter, so forward and backward agree and nothing is stored.
    """
    o_call = i_c // 8 + tl.arange(0, K // 8)
    b_call = o_l[:, None] * (C // 8) + o_call[None, :]
    b_zero = b_call * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), b_call, b_zero + i_b.to(tl.int32), b_zero, b_zero, 7)
    b_even = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w2 & 0xFFFF, w2 >> 16))
    b_odd = tl.join(tl.join(w1 & 0xFFFF, w1 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    return tl.reshape(tl.join(b_even, b_odd), (R, K)).to(tl.int32) >= drop_below


@triton.jit
def _activate(b_h, SILU: tl.constexpr):
    if SILU:
        b_h = b_h * tl.sigmoid(b_h)
    return b_h


@triton.jit
def _through_activation(b_dy, b_h, SILU: tl.constexpr):
    """The gradient before the activation."""
    if SILU:
        b_sigmoid = tl.sigmoid(b_h)
        b_dy = b_dy * b_sigmoid * (1.0 + b_h * (1.0 - b_sigmoid))
    return b_dy


@triton.jit
def _load_stats(stats_ptr, i_b, o_c, m_c, C):
    p = stats_ptr + i_b * 3 * C + o_c
    return tl.load(p, mask=m_c, other=0.0), tl.load(p + C, mask=m_c, other=0.0)


@triton.jit
def _finish_forward(
    b_mean, b_m2, offset_ptr, offset_stride, stats_ptr, i_b, o_c, m_c, L, C, eps,
    CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr,
):  # fmt: skip
    """Channel means and squared deviations → (the value to subtract, 1 / std) [K], which are also stored in stats."""
    b_offset = tl.zeros_like(b_mean)
    if offset_ptr is not None:
        b_offset = tl.load(offset_ptr + i_b * offset_stride + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_mean += b_offset
    b_group, b_rstd = _group_stats(b_mean, b_m2, L, eps, CG, CT, CT_PAD)
    b_centre = b_group - b_offset
    p_stats = stats_ptr + i_b * 3 * C + o_c
    tl.store(p_stats, b_centre, mask=m_c)
    tl.store(p_stats + C, b_rstd, mask=m_c)
    tl.store(p_stats + 2 * C, b_mean - b_group, mask=m_c)
    return b_centre, b_rstd


@triton.jit
def _finish_backward(
    b_g, b_gd, b_gain, b_rstd, stats_ptr, sums_ptr, i_b, o_c, m_c, L, C,
    CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * (x - centre) → slope and constant of dx = rstd * gain * g + slope * d + constant.

    sums [B, 3, C] receives the sums of g, of g * xhat, and of dx, which is the gradient of the offset.
    """
    b_same = _same_group(CG, CT, CT_PAD)
    b_gx = b_gd * b_rstd
    b_constant = -b_rstd * (tl.sum(b_same * (b_gain * b_g)[None, :], axis=1) / (L * CG))
    b_slope = -b_rstd * b_rstd * (tl.sum(b_same * (b_gain * b_gx)[None, :], axis=1) / (L * CG))
    b_excess = tl.load(stats_ptr + i_b * 3 * C + 2 * C + o_c, mask=m_c, other=0.0)
    p_sums = sums_ptr + i_b * 3 * C + o_c
    tl.store(p_sums, b_g, mask=m_c)
    tl.store(p_sums + C, b_gx, mask=m_c)
    tl.store(p_sums + 2 * C, b_rstd * b_gain * b_g + L * (b_slope * b_excess + b_constant), mask=m_c)
    return b_slope, b_constant


# --- forward ---


@triton.jit(do_not_specialize=SHAPES)
def _slab_forward(
    x_ptr, second_ptr, second_bias_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, offset_ptr, seed_ptr,
    total_ptr, y_ptr, stats_ptr,
    slabs, tiles, L, C1, C2, scale_stride, shift_stride, offset_stride, eps, drop_below, keep_scale,
    CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr, BLOCK_L: tl.constexpr, ONE_BLOCK: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    C = C1 + C2
    made_ptr = x_ptr if second_ptr is None else total_ptr
    o_l = tl.arange(0, BLOCK_L)
    for i_slab in range(tl.program_id(0), slabs, tl.num_programs(0)):
        i_b = (i_slab // tiles).to(tl.int64)
        i_c = i_slab % tiles * CT
        o_c = i_c + tl.arange(0, CT_PAD)
        m_c = (tl.arange(0, CT_PAD) < CT) & (o_c < C)
        i_row = i_b * L
        m = (o_l[:, None] < L) & m_c[None, :]
        b_x = _load_input(
            x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, i_row + o_l[:, None], o_c[None, :], m, C1, C2
        )
        if ONE_BLOCK:
            b_mean, b_m2 = _merge(b_x, tl.zeros_like(b_x), (o_l[:, None] < L).to(tl.float32), L)
        else:  # each lane sums around its first value
            b_first, b_sum, b_sum2 = b_x, tl.zeros_like(b_x), tl.zeros_like(b_x)
            for i_l in range(BLOCK_L, L, BLOCK_L):
                m = (i_l + o_l[:, None] < L) & m_c[None, :]
                b_x = _load_input(
                    x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr,
                    i_row + i_l + o_l[:, None], o_c[None, :], m, C1, C2,
                )  # fmt: skip
                b_d = tl.where(m, b_x - b_first, 0.0)
                b_sum += b_d
                b_sum2 += b_d * b_d
            # A lane beyond the last pixel has read no value if the block is longer than the map; it divides by 1.
            b_n = ((L - o_l + BLOCK_L - 1) // BLOCK_L).to(tl.float32)[:, None]
            b_each = tl.maximum(b_n, 1.0)
            b_mean, b_m2 = _merge(b_first + b_sum / b_each, b_sum2 - b_sum * b_sum / b_each, b_n, L)
            if second_ptr is not None:
                tl.debug_barrier()  # other threads may read what a thread has stored
        b_centre, b_rstd = _finish_forward(
            b_mean, b_m2, offset_ptr, offset_stride, stats_ptr, i_b, o_c, m_c, L, C, eps, CG, CT, CT_PAD
        )
        b_gain, b_bias = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
        b_gain *= b_rstd
        for i_l in range(0, L, BLOCK_L):
            m = (i_l + o_l[:, None] < L) & m_c[None, :]
            if not ONE_BLOCK:
                b_x = _load_pair(made_ptr, skip_ptr, i_row + i_l + o_l[:, None], o_c[None, :], m, C1, C2)
            b_y = _activate((b_x - b_centre[None, :]) * b_gain[None, :] + b_bias[None, :], SILU)
            if seed_ptr is not None:
                b_keep = _keep(seed_ptr, i_b, i_l + o_l, i_c, C, drop_below, BLOCK_L, CT_PAD)
                b_y = tl.where(b_keep, b_y * keep_scale, 0.0)
            tl.store(y_ptr + (i_row + i_l + o_l[:, None]) * C + o_c[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _part_moments(
    x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, partial_ptr, splits, L, C1, C2,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of ROWS pixels, per channel → partial [B, splits, 2, C]."""
    C = C1 + C2
    i_part = tl.program_id(0).to(tl.int64)
    i_b, i_first = i_part // splits, i_part % splits * ROWS
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_c = i_c[None, :]
    o_l = (i_first + tl.arange(0, BLOCK_L))[:, None]
    count = tl.minimum(L - i_first, ROWS)
    m = (o_l < L) & (o_c < C)
    b_first = _load_input(x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, i_b * L + o_l, o_c, m, C1, C2)
    b_sum, b_sum2 = tl.zeros_like(b_first), tl.zeros_like(b_first)
    for i_l in range(BLOCK_L, ROWS, BLOCK_L):
        m = (i_l + o_l < L) & (o_c < C)
        b_x = _load_input(x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, i_b * L + i_l + o_l, o_c, m, C1, C2)
        b_d = tl.where(m, b_x - b_first, 0.0)
        b_sum += b_d
        b_sum2 += b_d * b_d
    # The number of values that a lane has read: none if its first pixel lies beyond the image.
    b_n = (tl.maximum(count - (o_l - i_first) + BLOCK_L - 1, 0) // BLOCK_L).to(tl.float32)
    b_each = tl.maximum(b_n, 1.0)
    b_mean, b_m2 = _merge(b_first + b_sum / b_each, b_sum2 - b_sum * b_sum / b_each, b_n, count.to(tl.float32))
    p_out = partial_ptr + i_part * 2 * C + i_c
    tl.store(p_out, b_mean)
    tl.store(p_out + C, b_m2)


@triton.jit(do_not_specialize=SHAPES)
def _moments(
    x_ptr, skip_ptr, partial_ptr, splits, L, C1, C2,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _part_moments(x_ptr, None, None, skip_ptr, None, partial_ptr, splits, L, C1, C2, ROWS, BLOCK_L, BLOCK_C)


@triton.jit(do_not_specialize=SHAPES)
def _sum_moments(
    x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, partial_ptr, splits, L, C1, C2,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As _moments, for the sum of two maps, which it stores."""
    _part_moments(
        x_ptr, second_ptr, second_bias_ptr, skip_ptr, total_ptr, partial_ptr, splits, L, C1, C2, ROWS, BLOCK_L, BLOCK_C
    )


@triton.jit(do_not_specialize=SHAPES)
def _finalize_forward(
    partial_ptr, offset_ptr, stats_ptr, splits, tiles, L, C, offset_stride, eps,
    ROWS: tl.constexpr, CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges an image's parts and its groups → stats."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_c = tl.program_id(0) % tiles * CT + tl.arange(0, CT_PAD)
    m_c = (tl.arange(0, CT_PAD) < CT) & (o_c < C)
    o_s = tl.arange(0, BLOCK_S)[:, None]
    p_in = partial_ptr + (i_b * splits + o_s) * 2 * C + o_c[None, :]
    m = (o_s < splits) & m_c[None, :]
    b_n = tl.where(o_s < splits, tl.minimum(L - o_s * ROWS, ROWS), 0).to(tl.float32)
    b_mean, b_m2 = _merge(tl.load(p_in, mask=m, other=0.0), tl.load(p_in + C, mask=m, other=0.0), b_n, L)
    _finish_forward(b_mean, b_m2, offset_ptr, offset_stride, stats_ptr, i_b, o_c, m_c, L, C, eps, CG, CT, CT_PAD)


@triton.jit(do_not_specialize=SHAPES)
def _apply(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, seed_ptr, y_ptr, stats_ptr,
    splits, L, C1, C2, scale_stride, shift_stride, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C = C1 + C2
    i_b, i_first = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * ROWS
    i_c = tl.program_id(1) * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_l = i_first + tl.arange(0, BLOCK_L)
    b_centre, b_rstd = _load_stats(stats_ptr, i_b, o_c, m_c, C)
    b_gain, b_bias = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
    b_gain *= b_rstd
    for i_l in range(0, ROWS, BLOCK_L):
        i_row = i_b * L + i_l + o_l[:, None]
        m = (i_l + o_l[:, None] < L) & m_c[None, :]
        b_x = _load_pair(x_ptr, skip_ptr, i_row, o_c[None, :], m, C1, C2)
        b_y = _activate((b_x - b_centre[None, :]) * b_gain[None, :] + b_bias[None, :], SILU)
        if seed_ptr is not None:
            b_keep = _keep(seed_ptr, i_b, i_l + o_l, i_c, C, drop_below, BLOCK_L, BLOCK_C)
            b_y = tl.where(b_keep, b_y * keep_scale, 0.0)
        tl.store(y_ptr + i_row * C + o_c[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m)


# --- backward ---


@triton.jit
def _load_gradient(
    x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_gain, b_bias, i_b, i_row, o_l, i_c, o_c, m, C1, C2,
    drop_below, keep_scale, R: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """(gradient before the activation, x - centre), [R, K]."""
    b_d = _load_pair(x_ptr, skip_ptr, i_row + o_l[:, None], o_c[None, :], m, C1, C2) - b_centre[None, :]
    b_g = tl.load(dy_ptr + (i_row + o_l[:, None]) * (C1 + C2) + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        b_keep = _keep(seed_ptr, i_b, o_l, i_c, C1 + C2, drop_below, R, K)
        b_g = tl.where(b_keep, b_g * keep_scale, 0.0)
    return _through_activation(b_g, b_d * b_gain[None, :] + b_bias[None, :], SILU), b_d


@triton.jit(do_not_specialize=SHAPES)
def _slab_backward(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, seed_ptr, dy_ptr, dtotal_ptr, stats_ptr,
    dx_ptr, dskip_ptr, sums_ptr, total_sums_ptr,
    slabs, tiles, L, C1, C2, scale_stride, shift_stride, drop_below, keep_scale,
    CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr, BLOCK_L: tl.constexpr, ONE_BLOCK: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    C = C1 + C2
    o_l = tl.arange(0, BLOCK_L)
    for i_slab in range(tl.program_id(0), slabs, tl.num_programs(0)):
        i_b = (i_slab // tiles).to(tl.int64)
        i_c = i_slab % tiles * CT
        o_c = i_c + tl.arange(0, CT_PAD)
        m_c = (tl.arange(0, CT_PAD) < CT) & (o_c < C)
        i_row = i_b * L
        b_centre, b_rstd = _load_stats(stats_ptr, i_b, o_c, m_c, C)
        b_gain, b_bias = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
        b_full = b_gain * b_rstd
        m = (o_l[:, None] < L) & m_c[None, :]
        b_total = tl.zeros((BLOCK_L, CT_PAD), tl.float32)
        if ONE_BLOCK and dtotal_ptr is not None:
            b_dtotal = _load_first(dtotal_ptr, skip_ptr, i_row + o_l[:, None], o_c[None, :], m, C1)
            if total_sums_ptr is not None:
                p_total = total_sums_ptr + i_b * C1 + o_c
                tl.store(p_total, tl.sum(b_dtotal.to(tl.float32), axis=0), mask=m_c & (o_c < C1))
        b_g, b_d = _load_gradient(
            x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_full, b_bias, i_b, i_row, o_l, i_c, o_c, m, C1, C2,
            drop_below, keep_scale, BLOCK_L, CT_PAD, SILU,
        )  # fmt: skip
        b_sum, b_sumd = b_g, b_g * b_d
        if not ONE_BLOCK:
            for i_l in range(BLOCK_L, L, BLOCK_L):
                m = (i_l + o_l[:, None] < L) & m_c[None, :]
                b_g, b_d = _load_gradient(
                    x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_full, b_bias, i_b, i_row, i_l + o_l, i_c, o_c, m,
                    C1, C2, drop_below, keep_scale, BLOCK_L, CT_PAD, SILU,
                )  # fmt: skip
                b_sum += b_g
                b_sumd += b_g * b_d
        b_slope, b_constant = _finish_backward(
            tl.sum(b_sum, axis=0), tl.sum(b_sumd, axis=0), b_gain, b_rstd, stats_ptr, sums_ptr, i_b, o_c, m_c, L, C,
            CG, CT, CT_PAD,
        )  # fmt: skip
        for i_l in range(0, L, BLOCK_L):
            m = (i_l + o_l[:, None] < L) & m_c[None, :]
            if not ONE_BLOCK:
                if dtotal_ptr is not None:
                    b_dtotal = _load_first(dtotal_ptr, skip_ptr, i_row + i_l + o_l[:, None], o_c[None, :], m, C1)
                    b_total += b_dtotal.to(tl.float32)
                b_g, b_d = _load_gradient(
                    x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_full, b_bias, i_b, i_row, i_l + o_l, i_c, o_c, m,
                    C1, C2, drop_below, keep_scale, BLOCK_L, CT_PAD, SILU,
                )  # fmt: skip
            b_dx = b_g * b_full[None, :] + (b_d * b_slope[None, :] + b_constant[None, :])
            if dtotal_ptr is not None:
                b_dx += b_dtotal.to(tl.float32)
            _store_pair(dx_ptr, dskip_ptr, i_row + i_l + o_l[:, None], o_c[None, :], m, C1, C2, b_dx)
        if total_sums_ptr is not None and not ONE_BLOCK:
            tl.store(total_sums_ptr + i_b * C1 + o_c, tl.sum(b_total, axis=0), mask=m_c & (o_c < C1))


@triton.jit(do_not_specialize=SHAPES)
def _backward_sums(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, seed_ptr, dy_ptr, stats_ptr, partial_ptr,
    splits, L, C1, C2, scale_stride, shift_stride, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * (x - centre) over ROWS pixels → partial [B, splits, 2, C]."""
    C = C1 + C2
    i_part = tl.program_id(0).to(tl.int64)
    i_b, i_first = i_part // splits, tl.program_id(0) % splits * ROWS
    i_c = tl.program_id(1) * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_centre, b_rstd = _load_stats(stats_ptr, i_b, o_c, m_c, C)
    b_gain, b_bias = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
    b_gain *= b_rstd
    b_sum = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    b_sumd = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for i_l in range(0, ROWS, BLOCK_L):
        o_l = i_first + i_l + tl.arange(0, BLOCK_L)
        m = (o_l[:, None] < L) & m_c[None, :]
        b_g, b_d = _load_gradient(
            x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_gain, b_bias, i_b, i_b * L, o_l, i_c, o_c, m, C1, C2,
            drop_below, keep_scale, BLOCK_L, BLOCK_C, SILU,
        )  # fmt: skip
        b_sum += b_g
        b_sumd += b_g * b_d
    p_out = partial_ptr + i_part * 2 * C + o_c
    tl.store(p_out, tl.sum(b_sum, axis=0), mask=m_c)
    tl.store(p_out + C, tl.sum(b_sumd, axis=0), mask=m_c)


@triton.jit(do_not_specialize=SHAPES)
def _finalize_backward(
    partial_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stats_ptr, sums_ptr, line_ptr,
    splits, tiles, L, C, scale_stride, shift_stride,
    CG: tl.constexpr, CT: tl.constexpr, CT_PAD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds up an image's parts → sums, and line [B, 2, C]: slope and constant of dx."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_c = tl.program_id(0) % tiles * CT + tl.arange(0, CT_PAD)
    m_c = (tl.arange(0, CT_PAD) < CT) & (o_c < C)
    o_s = tl.arange(0, BLOCK_S)[:, None]
    p_in = partial_ptr + (i_b * splits + o_s) * 2 * C + o_c[None, :]
    m = (o_s < splits) & m_c[None, :]
    b_g = tl.sum(tl.load(p_in, mask=m, other=0.0), axis=0)
    b_gd = tl.sum(tl.load(p_in + C, mask=m, other=0.0), axis=0)
    _, b_rstd = _load_stats(stats_ptr, i_b, o_c, m_c, C)
    b_gain, _ = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
    b_slope, b_constant = _finish_backward(
        b_g, b_gd, b_gain, b_rstd, stats_ptr, sums_ptr, i_b, o_c, m_c, L, C, CG, CT, CT_PAD
    )
    tl.store(line_ptr + i_b * 2 * C + o_c, b_slope, mask=m_c)
    tl.store(line_ptr + i_b * 2 * C + C + o_c, b_constant, mask=m_c)


@triton.jit(do_not_specialize=SHAPES)
def _apply_backward(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, seed_ptr, dy_ptr, dtotal_ptr, stats_ptr, line_ptr,
    dx_ptr, dskip_ptr, total_sums_ptr,
    splits, L, C1, C2, scale_stride, shift_stride, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C = C1 + C2
    i_part = tl.program_id(0).to(tl.int64)
    i_b, i_first = i_part // splits, tl.program_id(0) % splits * ROWS
    i_c = tl.program_id(1) * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_centre, b_rstd = _load_stats(stats_ptr, i_b, o_c, m_c, C)
    b_gain, b_bias = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, i_b, o_c, m_c, scale_stride, shift_stride)
    b_gain *= b_rstd
    b_slope = tl.load(line_ptr + i_b * 2 * C + o_c, mask=m_c, other=0.0)
    b_constant = tl.load(line_ptr + i_b * 2 * C + C + o_c, mask=m_c, other=0.0)
    b_total = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for i_l in range(0, ROWS, BLOCK_L):
        o_l = i_first + i_l + tl.arange(0, BLOCK_L)
        m = (o_l[:, None] < L) & m_c[None, :]
        b_g, b_d = _load_gradient(
            x_ptr, skip_ptr, dy_ptr, seed_ptr, b_centre, b_gain, b_bias, i_b, i_b * L, o_l, i_c, o_c, m, C1, C2,
            drop_below, keep_scale, BLOCK_L, BLOCK_C, SILU,
        )  # fmt: skip
        b_dx = b_g * b_gain[None, :] + (b_d * b_slope[None, :] + b_constant[None, :])
        if dtotal_ptr is not None:
            b_dtotal = _load_first(dtotal_ptr, skip_ptr, i_b * L + o_l[:, None], o_c[None, :], m, C1).to(tl.float32)
            b_dx += b_dtotal
            if total_sums_ptr is not None:
                b_total += b_dtotal
        _store_pair(dx_ptr, dskip_ptr, i_b * L + o_l[:, None], o_c[None, :], m, C1, C2, b_dx)
    if total_sums_ptr is not None:
        tl.store(total_sums_ptr + i_part * C1 + o_c, tl.sum(b_total, axis=0), mask=m_c & (o_c < C1))


@triton.jit(do_not_specialize=SHAPES)
def _parameter_gradients(
    sums_ptr, total_sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dsecond_bias_ptr,
    B, parts, C, C1, scale_stride, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight, dbias [C] from sums over the batch in a fixed order, and dscale [B, C] on the way.

    dsecond_bias [C1] likewise: the norm's share of dx is in sums, that of dtotal in total_sums [parts, C1].
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dx = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for i_b in range(0, B, BLOCK_B):
        o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        m = (o_b < B) & m_c[None, :]
        p_sums = sums_ptr + o_b * 3 * C + o_c[None, :]
        b_g = tl.load(p_sums, mask=m, other=0.0)
        b_gx = tl.load(p_sums + C, mask=m, other=0.0)
        if scale_ptr is not None:
            b_scale = tl.load(scale_ptr + o_b * scale_stride + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            b_dscale = b_weight * b_gx + b_bias * b_g
            tl.store(dscale_ptr + o_b * C + o_c[None, :], b_dscale.to(dscale_ptr.dtype.element_ty), mask=m)
            b_g *= 1.0 + b_scale
            b_gx *= 1.0 + b_scale
        b_dweight += b_gx
        b_dbias += b_g
        if dsecond_bias_ptr is not None:
            b_dx += tl.load(p_sums + 2 * C, mask=m, other=0.0)
    tl.store(dweight_ptr + o_c, tl.sum(b_dweight, axis=0), mask=m_c)
    tl.store(dbias_ptr + o_c, tl.sum(b_dbias, axis=0), mask=m_c)
    if dsecond_bias_ptr is not None:
        m_c = o_c < C1
        if total_sums_ptr is not None:
            for i_part in range(0, parts, BLOCK_B):
                o_part = (i_part + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
                m = (o_part < parts) & m_c[None, :]
                b_dx += tl.load(total_sums_ptr + o_part * C1 + o_c[None, :], mask=m, other=0.0)
        tl.store(dsecond_bias_ptr + o_c, tl.sum(b_dx, axis=0), mask=m_c)
