"""The Triton kernels of `group_norm_silu.py`, which describes what they compute. One file: all share its first part.

Maps are [B, L, C] channels-last, L = H * W pixels; with a second input, x [B, L, C1] and skip [B, L, C2] are read as
if concatenated. With other summands the norm's input is the sum of x, second [B, L, C1] and second_bias [C1], or of two
of them, rounded as it is stored in total [B, L, C1]. Coefficients are fp32 [C] or [B, C].

A slab is an image's channels of one or more whole groups. It is divided into parts: ROWS pixels of `span` tiles, where
a tile is BLOCK_C neighbouring channels of one map. Each pass takes three steps: every part is summed, the slab's sums
are merged into coefficients, and every part is read again to write the result.

WHOLE    A slab is one part. One program takes all three steps, and its second read comes from its own cache.
else     A program takes tickets. With ticket i it sums part i, and then writes the result of part i - lag, which is
         still in the L2 cache. The program that sums a slab's last part merges the slab; who writes a part waits for
         that. Waiting always ends, however many programs run at once: the parts of a slab have lower numbers than any
         ticket that waits for it, tickets are taken in order by programs that are running, and a program sums the part
         of its ticket before it waits.

Sums are merged in the order of the parts, whichever program merges, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels.launch import Launch, Work
from fastdiff.kernels.ptx import sigmoid, to_float, trap
from torch import Tensor

# Numbers for whose values Triton compiles no variants, as no alignment depends on them.
SHAPES = [
    *("parts", "lag", "L", "splits", "tiles", "span", "groups", "group"),
    *("per_slab", "per_row", "chunks", "B", "drop_below"),
]

# --- pieces ---


@triton.jit
def _activate(b_h, SILU: tl.constexpr):
    if SILU:
        b_h = b_h * sigmoid(b_h)
    return b_h


@triton.jit
def _through_activation(b_dy, b_h, SILU: tl.constexpr):
    """The gradient before the activation: SiLU's derivative is s + y * (1 - s), with s = sigmoid(h) and y = h * s."""
    if SILU:
        b_sigmoid = sigmoid(b_h)
        b_y = b_h * b_sigmoid
        b_dy = b_dy * (b_sigmoid + (b_y - b_y * b_sigmoid))
    return b_dy


@triton.jit
def _quotient(n, reciprocal):
    """n // d for 0 <= n < 2^22 and reciprocal = 1 / d; a division of integers takes six times as long."""
    return ((n.to(tl.float32) + 0.5) * reciprocal).to(tl.int32)


@triton.jit
def _place(i_part, walk, WHOLE: tl.constexpr):
    """A part's number → its slab, its image (int64), its first pixels' number among the splits, its first tile."""
    splits, tiles, span, per_slab, per_row, chunks, r_slab, r_row, r_chunks = walk
    if WHOLE:
        i_slab, i_split, i_tile = i_part, 0, 0
    else:
        i_slab = _quotient(i_part, r_slab)
        i_in = i_part - i_slab * per_slab
        i_split = _quotient(i_in, r_row)
        i_tile = (i_in - i_split * per_row) * span
    i_b = _quotient(i_slab, r_chunks)
    i_chunk = i_slab - i_b * chunks
    return i_slab, i_b.to(tl.int64), i_chunk, i_split, i_tile


@triton.jit
def _column(x_ptr, skip_ptr, i_c, C1, C2):
    """The map that contains channel i_c of the concatenation, its width, and the channel's number in it."""
    if skip_ptr is None:
        p, width, i_in = x_ptr, C1, i_c
    else:
        p = tl.where(i_c < C1, x_ptr, skip_ptr)
        width = tl.where(i_c < C1, C1, C2)
        i_in = tl.where(i_c < C1, i_c, i_c - C1)
    return p, width, i_in


@triton.jit
def _load(p, m, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """A tile as fp32; 0 beyond the last pixel."""
    b_x = tl.load(p, eviction_policy=POLICY) if EVEN else tl.load(p, mask=m, other=0.0, eviction_policy=POLICY)
    return to_float(b_x)


@triton.jit
def _store(p, b_x, m, EVEN: tl.constexpr, POLICY: tl.constexpr):
    b_x = b_x.to(p.dtype.element_ty)
    if EVEN:
        tl.store(p, b_x, eviction_policy=POLICY)
    else:
        tl.store(p, b_x, mask=m, eviction_policy=POLICY)


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
def _over_group(b_x, NG: tl.constexpr, PADDED: tl.constexpr):
    """Sums over the groups [NG, PADDED] that lie side by side in a vector, given back to every member of the group."""
    b_sum = tl.sum(tl.reshape(b_x, (NG, PADDED)), axis=1)
    return tl.reshape(tl.broadcast_to(b_sum[:, None], (NG, PADDED)), (NG * PADDED,))


@triton.jit
def _fold(b_x, R: tl.constexpr, FOLDED: tl.constexpr, K: tl.constexpr):
    """[R, K] → [FOLDED, K], sums of every FOLDED-th row: with 16 rows, as many as 4 warps hold, of a thread's own."""
    return tl.sum(tl.reshape(b_x, (R // FOLDED, FOLDED, K)), axis=0)


@triton.jit
def _affine(affine, i_b, o_c, m):
    """What follows the norm as gain and bias [K]: weight * (1 + scale), bias * (1 + scale) + shift; 0 outside m."""
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride = affine
    b_gain = tl.load(weight_ptr + o_c, mask=m, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_c, mask=m, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        b_scale = 1.0 + tl.load(scale_ptr + i_b * scale_stride + o_c, mask=m, other=0.0).to(tl.float32)
        b_shift = tl.load(shift_ptr + i_b * shift_stride + o_c, mask=m, other=0.0).to(tl.float32)
        b_gain *= b_scale
        b_bias = b_bias * b_scale + b_shift
    return b_gain, b_bias


@triton.jit
def _coefficients(affine, stats_ptr, i_b, o_c, C):
    """For channels o_c [K]: what is subtracted from x, and the gain and bias of (x - that) that give the result."""
    p_stats = stats_ptr + i_b * 3 * C + o_c
    b_gain, b_bias = _affine(affine, i_b, o_c, o_c < C)
    return tl.load(p_stats), b_gain * tl.load(p_stats + C), b_bias


@triton.jit
def _members(p_partial, i_group, groups, group, BLOCK_C: tl.constexpr, NG: tl.constexpr, PADDED: tl.constexpr):
    """Lanes [NG * PADDED] for the channels of NG groups: (number in the slab, whether it exists, its partial sums)."""
    o = tl.arange(0, NG * PADDED)
    o_group, o_member = i_group + o // PADDED, o % PADDED
    o_k = o_group * group + o_member
    p_in = p_partial + o_k // BLOCK_C * (2 * BLOCK_C) + o_k % BLOCK_C
    return o_k, (o_group < groups) & (o_member < group), p_in


@triton.jit
def _keep(seed_ptr, i_b, o_l, i_c, C, drop_below, R: tl.constexpr, K: tl.constexpr):
    """[R, K] bool: which elements at pixels o_l [R, 1] and channels i_c .. i_c + K - 1 dropout keeps.

    Eight neighbouring channels share one call of philox-4x32-7, 16 bits each; 7 rounds pass BigCrush (Salmon et al.
    2011). The element's place is the counter, so forward and backward agree and nothing is stored.
    """
    o_call = i_c // 8 + tl.arange(0, K // 8)
    b_call = o_l * (C // 8) + o_call[None, :]
    b_zero = b_call * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), b_call, b_zero + i_b.to(tl.int32), b_zero, b_zero, 7)
    b_even = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w2 & 0xFFFF, w2 >> 16))
    b_odd = tl.join(tl.join(w1 & 0xFFFF, w1 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    return tl.reshape(tl.join(b_even, b_odd), (R, K)).to(tl.int32) >= drop_below


# --- the order of the programs ---


@triton.jit
def _count(counter_ptr):
    """Count this program's stores as made, which all its threads have finished; returns how many were before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _wait(counter_ptr, count):
    """Wait until a counter exceeds `count`; the stores that were counted are visible then."""
    polls = 0
    while tl.atomic_add(counter_ptr, 0, sem="acquire") <= count:
        polls += 1
        if polls > 1 << 26:  # after half a minute or more, an error is better than a GPU that hangs
            trap()


# --- forward ---


@triton.jit
def _load_input(maps, p, o, i_c, o_c, m, C1, EVEN: tl.constexpr, AGAIN: tl.constexpr, SAVE: tl.constexpr):
    """The norm's input as fp32: a tile at offsets o of the map p that holds it, or of its summands, whose sum is saved.

    AGAIN is the eviction policy of what will be read again.
    """
    x_ptr, second_ptr, second_bias_ptr, total_ptr = maps
    if total_ptr is None:
        b_x = _load(p + o, m, EVEN, AGAIN)
    elif i_c < C1:
        b_x = _load((x_ptr if second_ptr is None else second_ptr) + o, m, EVEN, "evict_first")
        if second_bias_ptr is not None:  # loaded from L1 at every use, which saves registers
            b_x += tl.load(second_bias_ptr + i_c + o_c).to(tl.float32)
        if second_ptr is not None:
            b_x += _load(x_ptr + o, m, EVEN, "evict_first")
        b_total = b_x.to(total_ptr.dtype.element_ty)
        if SAVE:
            _store(total_ptr + o, b_total, m, EVEN, AGAIN)
        b_x = b_total.to(tl.float32)
    else:
        b_x = _load(p + o, m, EVEN, AGAIN)
    return b_x


@triton.jit
def _sum_tile(
    maps, skip_ptr, p_out, i_b, i_first, i_c, L, C1, C2,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of ROWS pixels from i_first on, per channel of a tile → out [2, BLOCK_C].

    They are computed from sums around the first pixel's value. No value of n can differ by more than sqrt(n) standard
    deviations from their mean, so that an outlier there costs at most a factor n of float32's precision.
    """
    x_ptr, _, _, total_ptr = maps
    AGAIN: tl.constexpr = "evict_last" if STREAM else ""
    p, width, i_in = _column(x_ptr if total_ptr is None else total_ptr, skip_ptr, i_c, C1, C2)
    o_c = tl.arange(0, BLOCK_C)[None, :]
    o_l = tl.arange(0, BLOCK_L)[:, None]
    start = (i_b * L + i_first) * width + i_in
    b_pivot = _load_input(maps, p, start + o_c, i_c, o_c, True, C1, True, AGAIN, False)
    FOLDED: tl.constexpr = min(BLOCK_L, 16)
    b_sum = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    b_sum2 = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    for i_l in range(0, ROWS, BLOCK_L):
        m = i_first + i_l + o_l < L
        b_d = _load_input(maps, p, start + ((i_l + o_l) * width + o_c), i_c, o_c, m, C1, EVEN, AGAIN, True) - b_pivot
        if not EVEN:
            b_d = tl.where(m, b_d, 0.0)
        b_sum += _fold(b_d, BLOCK_L, FOLDED, BLOCK_C)
        b_sum2 += _fold(b_d * b_d, BLOCK_L, FOLDED, BLOCK_C)
    b_off = tl.sum(b_sum, axis=0)
    b_mean = b_off / tl.minimum(L - i_first, ROWS).to(tl.float32)
    o_k = tl.arange(0, BLOCK_C)
    tl.store(p_out + o_k, tl.sum(b_pivot, axis=0) + b_mean)
    tl.store(p_out + BLOCK_C + o_k, tl.sum(b_sum2, axis=0) - b_off * b_mean)


@triton.jit
def _merge_slab(
    p_partial, offset_ptr, offset_stride, stats_ptr, i_b, i_first, splits, tiles, groups, group, L, C, eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, NG: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The sums of a slab's parts → stats of its channels from i_first on; NG groups at a time, each PADDED lanes."""
    for i_group in range(0, groups, NG):
        o_k, m, p_in = _members(p_partial, i_group, groups, group, BLOCK_C, NG, PADDED)
        o_c = i_first + o_k
        b_mean, b_m2 = tl.zeros((NG * PADDED,), tl.float32), tl.zeros((NG * PADDED,), tl.float32)
        n = 0.0
        for i_s in range(0, splits, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)[:, None]
            p = p_in[None, :] + o_s * tiles * (2 * BLOCK_C)
            m_s = (o_s < splits) & m[None, :]
            b_n = tl.maximum(tl.minimum(L - o_s * ROWS, ROWS), 0).to(tl.float32)
            n_more = tl.minimum(L - i_s * ROWS, BLOCK_S * ROWS).to(tl.float32)
            b_more, b_more2 = _merge(
                tl.load(p, mask=m_s, other=0.0), tl.load(p + BLOCK_C, mask=m_s, other=0.0), b_n, n_more
            )
            b_off, share = b_more - b_mean, n_more / (n + n_more)
            b_mean += b_off * share
            b_m2 += b_more2 + b_off * b_off * (n * share)
            n += n_more
        b_offset = tl.zeros_like(b_mean)
        if offset_ptr is not None:
            b_offset = tl.load(offset_ptr + i_b * offset_stride + o_c, mask=m, other=0.0).to(tl.float32)
        b_mean += b_offset
        b_group = _over_group(b_mean, NG, PADDED) / group
        b_off = tl.where(m, b_mean - b_group, 0.0)
        b_rest = _over_group(b_off, NG, PADDED) / group
        count = L * (group * 1.0)
        b_m2 = _over_group(b_m2 + L * b_off * b_off, NG, PADDED) - count * b_rest * b_rest
        b_m2 = tl.maximum(b_m2, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN if squares overflow, as in PyTorch
        b_group += b_rest
        p_stats = stats_ptr + i_b * 3 * C + o_c
        tl.store(p_stats, b_group - b_offset, mask=m)
        tl.store(p_stats + C, 1.0 / tl.sqrt(b_m2 / count + eps), mask=m)
        tl.store(p_stats + 2 * C, b_mean - b_group, mask=m)


@triton.jit
def _apply_tile(
    x_ptr, skip_ptr, affine, seed_ptr, y_ptr, stats_ptr, i_b, i_first, i_c, L, C1, C2, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, STREAM: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Read ROWS pixels of a tile again and write y."""
    LAST: tl.constexpr = "evict_first" if STREAM else ""
    C = C1 + C2
    p, width, i_in = _column(x_ptr, skip_ptr, i_c, C1, C2)
    o_c = tl.arange(0, BLOCK_C)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    b_centre, b_gain, b_bias = _coefficients(affine, stats_ptr, i_b, i_c + o_c, C)
    p += (i_b * L + i_first) * width + i_in
    y_ptr += (i_b * L + i_first) * C + i_c
    for i_l in range(0, ROWS, BLOCK_L):
        m = i_first + i_l + o_l < L
        b_x = _load(p + ((i_l + o_l) * width + o_c[None, :]), m, EVEN, LAST)
        b_y = _activate((b_x - b_centre[None, :]) * b_gain[None, :] + b_bias[None, :], SILU)
        if seed_ptr is not None:
            b_keep = _keep(seed_ptr, i_b, i_first + i_l + o_l, i_c, C, drop_below, BLOCK_L, BLOCK_C)
            b_y = tl.where(b_keep, b_y * keep_scale, 0.0)
        _store(y_ptr + ((i_l + o_l) * C + o_c[None, :]), b_y, m, EVEN, LAST)


@triton.jit(do_not_specialize=SHAPES)
def _norm_forward(
    x_ptr, second_ptr, second_bias_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, offset_ptr, seed_ptr,
    total_ptr, y_ptr, stats_ptr, partial_ptr, counters_ptr,
    parts, lag, splits, tiles, span, per_slab, per_row, chunks, r_slab, r_row, r_chunks, groups, group,
    L, C1, C2, scale_stride, shift_stride, offset_stride, eps, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, NG: tl.constexpr,
    PADDED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, STREAM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C = C1 + C2
    if WHOLE:
        splits = 1  # a constant, so that the compiler makes no loop over splits
    maps = (x_ptr, second_ptr, second_bias_ptr, total_ptr)
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    walk = (splits, tiles, span, per_slab, per_row, chunks, r_slab, r_row, r_chunks)
    made_ptr = x_ptr if total_ptr is None else total_ptr
    i_ticket = tl.program_id(0) if WHOLE else tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while i_ticket < parts + lag:
        if i_ticket < parts:
            i_slab, i_b, i_chunk, i_split, i_tile = _place(i_ticket, walk, WHOLE)
            p_partial = partial_ptr + i_slab.to(tl.int64) * splits * tiles * (2 * BLOCK_C)
            for i_t in range(i_tile, i_tile + span):
                _sum_tile(
                    maps, skip_ptr, p_partial + (i_split * tiles + i_t) * (2 * BLOCK_C), i_b, i_split * ROWS,
                    (i_chunk * tiles + i_t) * BLOCK_C, L, C1, C2, ROWS, BLOCK_L, BLOCK_C, EVEN, STREAM,
                )  # fmt: skip
            last = True
            if WHOLE:
                tl.debug_barrier()
            else:
                last = _count(counters_ptr + 1 + i_slab) == per_slab - 1
            if last:
                _merge_slab(
                    p_partial, offset_ptr, offset_stride, stats_ptr, i_b, i_chunk * tiles * BLOCK_C, splits, tiles,
                    groups, group, L, C, eps, ROWS, BLOCK_C, BLOCK_S, NG, PADDED,
                )  # fmt: skip
                if WHOLE:
                    tl.debug_barrier()
                else:
                    _count(counters_ptr + 1 + i_slab)
        if i_ticket >= lag:
            i_slab, i_b, i_chunk, i_split, i_tile = _place(i_ticket - lag, walk, WHOLE)
            if not WHOLE:
                _wait(counters_ptr + 1 + i_slab, per_slab)
            for i_t in range(i_tile, i_tile + span):
                _apply_tile(
                    made_ptr, skip_ptr, affine, seed_ptr, y_ptr, stats_ptr, i_b, i_split * ROWS,
                    (i_chunk * tiles + i_t) * BLOCK_C, L, C1, C2, drop_below, keep_scale,
                    ROWS, BLOCK_L, BLOCK_C, EVEN, STREAM, SILU,
                )  # fmt: skip
        i_ticket = i_ticket + tl.num_programs(0) if WHOLE else tl.atomic_add(counters_ptr, 1, sem="relaxed")


# --- backward ---


@triton.jit
def _load_gradient(
    p_x, p_dy, seed_ptr, b_centre, b_gain, b_bias, i_b, o_l, i_c, m, C, drop_below, keep_scale,
    R: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """(gradient before the activation, which is 0 beyond the last pixel; x - centre), [R, K]."""
    b_d = _load(p_x, m, EVEN, POLICY) - b_centre[None, :]
    b_g = _load(p_dy, m, EVEN, POLICY)
    if seed_ptr is not None:
        b_g = tl.where(_keep(seed_ptr, i_b, o_l, i_c, C, drop_below, R, K), b_g * keep_scale, 0.0)
    return _through_activation(b_g, b_d * b_gain[None, :] + b_bias[None, :], SILU), b_d


@triton.jit
def _sum_gradients(
    x_ptr, skip_ptr, affine, seed_ptr, dy_ptr, stats_ptr, p_out, i_b, i_first, i_c, L, C1, C2, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, STREAM: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * (x - centre) over ROWS pixels of a tile → out [2, BLOCK_C]."""
    AGAIN: tl.constexpr = "evict_last" if STREAM else ""
    C = C1 + C2
    p, width, i_in = _column(x_ptr, skip_ptr, i_c, C1, C2)
    o_c = tl.arange(0, BLOCK_C)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    b_centre, b_gain, b_bias = _coefficients(affine, stats_ptr, i_b, i_c + o_c, C)
    p += (i_b * L + i_first) * width + i_in
    dy_ptr += (i_b * L + i_first) * C + i_c
    FOLDED: tl.constexpr = min(BLOCK_L, 16)
    b_sum = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    b_sumd = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    for i_l in range(0, ROWS, BLOCK_L):
        b_g, b_d = _load_gradient(
            p + ((i_l + o_l) * width + o_c[None, :]), dy_ptr + ((i_l + o_l) * C + o_c[None, :]), seed_ptr,
            b_centre, b_gain, b_bias, i_b, i_first + i_l + o_l, i_c, i_first + i_l + o_l < L, C,
            drop_below, keep_scale, BLOCK_L, BLOCK_C, EVEN, AGAIN, SILU,
        )  # fmt: skip
        b_sum += _fold(b_g, BLOCK_L, FOLDED, BLOCK_C)
        b_sumd += _fold(b_g * b_d, BLOCK_L, FOLDED, BLOCK_C)
    tl.store(p_out + o_c, tl.sum(b_sum, axis=0))
    tl.store(p_out + BLOCK_C + o_c, tl.sum(b_sumd, axis=0))


@triton.jit
def _sum_parts(p_in, m, splits, stride, BLOCK_S: tl.constexpr, K: tl.constexpr):
    """The sum of `splits` values at p_in [K], each `stride` after the one before."""
    b_sum = tl.zeros((K,), tl.float32)
    for i_s in range(0, splits, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)[:, None]
        b_sum += tl.sum(tl.load(p_in[None, :] + o_s * stride, mask=(o_s < splits) & m[None, :], other=0.0), axis=0)
    return b_sum


@triton.jit
def _merge_gradients(
    p_partial, affine, stats_ptr, sums_ptr, line_ptr, i_b, i_first, splits, tiles, groups, group, L, C,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, NG: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The sums of a slab's parts → line [B, 2, C], slope and constant of dx = rstd * gain * g + slope * d + constant.

    sums [B, 3, C] receives the sums of g, of g * xhat, and of dx, which is the gradient of the offset.
    """
    for i_group in range(0, groups, NG):
        o_k, m, p_in = _members(p_partial, i_group, groups, group, BLOCK_C, NG, PADDED)
        o_c = i_first + o_k
        p_stats = stats_ptr + i_b * 3 * C + o_c
        b_rstd = tl.load(p_stats + C, mask=m, other=0.0)
        b_gain, _ = _affine(affine, i_b, o_c, m)
        b_g = _sum_parts(p_in, m, splits, tiles * (2 * BLOCK_C), BLOCK_S, NG * PADDED)
        b_gx = _sum_parts(p_in + BLOCK_C, m, splits, tiles * (2 * BLOCK_C), BLOCK_S, NG * PADDED) * b_rstd
        count = L * (group * 1.0)
        b_constant = -b_rstd * (_over_group(b_gain * b_g, NG, PADDED) / count)
        b_slope = -b_rstd * b_rstd * (_over_group(b_gain * b_gx, NG, PADDED) / count)
        b_excess = tl.load(p_stats + 2 * C, mask=m, other=0.0)
        p_sums = sums_ptr + i_b * 3 * C + o_c
        tl.store(p_sums, b_g, mask=m)
        tl.store(p_sums + C, b_gx, mask=m)
        tl.store(p_sums + 2 * C, b_rstd * b_gain * b_g + L * (b_slope * b_excess + b_constant), mask=m)
        p_line = line_ptr + i_b * 2 * C + o_c
        tl.store(p_line, b_slope, mask=m)
        tl.store(p_line + C, b_constant, mask=m)


@triton.jit
def _merge_totals(p_partial, p_out, i_first, splits, tiles, C1, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sums of dtotal over a slab's parts, each where the part's other sums were → out [C1], from i_first on."""
    o_c = tl.arange(0, BLOCK_C)
    for i_t in range(0, tiles):
        i_c = i_first + i_t * BLOCK_C + o_c
        b_sum = _sum_parts(
            p_partial + i_t * (2 * BLOCK_C) + o_c, i_c < C1, splits, tiles * (2 * BLOCK_C), BLOCK_S, BLOCK_C
        )
        tl.store(p_out + i_c, b_sum, mask=i_c < C1)


@triton.jit
def _apply_gradients(
    x_ptr, skip_ptr, affine, seed_ptr, dy_ptr, others, stats_ptr, line_ptr, dx_ptr, dskip_ptr, p_out, i_b, i_first,
    i_c, L, C1, C2, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, STREAM: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Read ROWS pixels of a tile again and write dx or dskip; the sums of dtotal → out [BLOCK_C], unless it is None.

    others: the gradients that x and skip get from their other readers, dtotal, dtotal_more and dskip_other; the second
    belongs to dtotal. No others without dtotal.
    """
    LAST: tl.constexpr = "evict_first" if STREAM else ""
    C = C1 + C2
    p, width, i_in = _column(x_ptr, skip_ptr, i_c, C1, C2)
    p_dx, _, _ = _column(dx_ptr, dskip_ptr, i_c, C1, C2)
    o_c = tl.arange(0, BLOCK_C)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    b_centre, b_gain, b_bias = _coefficients(affine, stats_ptr, i_b, i_c + o_c, C)
    p_line = line_ptr + i_b * 2 * C + i_c + o_c
    b_slope, b_constant = tl.load(p_line), tl.load(p_line + C)
    start = (i_b * L + i_first) * width + i_in
    dy_ptr += (i_b * L + i_first) * C + i_c
    dtotal_ptr, dtotal_more_ptr, dskip_other_ptr = others
    if dtotal_ptr is not None:
        p_other, _, _ = _column(dtotal_ptr, dskip_other_ptr, i_c, C1, C2)
    FOLDED: tl.constexpr = min(BLOCK_L, 16)
    b_sum = tl.zeros((FOLDED, BLOCK_C), tl.float32)
    for i_l in range(0, ROWS, BLOCK_L):
        o = start + ((i_l + o_l) * width + o_c[None, :])
        m = i_first + i_l + o_l < L
        b_g, b_d = _load_gradient(
            p + o, dy_ptr + ((i_l + o_l) * C + o_c[None, :]), seed_ptr, b_centre, b_gain, b_bias,
            i_b, i_first + i_l + o_l, i_c, m, C, drop_below, keep_scale, BLOCK_L, BLOCK_C, EVEN, LAST, SILU,
        )  # fmt: skip
        b_dx = b_g * b_gain[None, :] + (b_d * b_slope[None, :] + b_constant[None, :])
        if dtotal_ptr is not None and (dskip_other_ptr is not None or i_c < C1):
            b_other = _load(p_other + o, m, EVEN, "evict_first")
            if dtotal_more_ptr is not None and (dskip_other_ptr is None or i_c < C1):
                b_other += _load(dtotal_more_ptr + o, m, EVEN, "evict_first")
            b_dx += b_other
            if p_out is not None:
                b_sum += _fold(b_other, BLOCK_L, FOLDED, BLOCK_C)
        _store(p_dx + o, b_dx, m, EVEN, LAST)
    if p_out is not None:
        tl.store(p_out + o_c, tl.sum(b_sum, axis=0), mask=i_c + o_c < C1)


@triton.jit(do_not_specialize=SHAPES)
def _norm_backward(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, seed_ptr, dy_ptr, dtotal_ptr, dtotal_more_ptr,
    dskip_other_ptr, stats_ptr, dx_ptr, dskip_ptr, sums_ptr, line_ptr, total_sums_ptr, partial_ptr, counters_ptr,
    parts, lag, splits, tiles, span, per_slab, per_row, chunks, r_slab, r_row, r_chunks, groups, group,
    L, C1, C2, scale_stride, shift_stride, drop_below, keep_scale,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, NG: tl.constexpr,
    PADDED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, STREAM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """total_sums [B, C1] receives the sums of dtotal, and of dtotal_more with it, over an image's pixels."""
    C = C1 + C2
    if WHOLE:
        splits = 1  # a constant, so that the compiler makes no loop over splits
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    walk = (splits, tiles, span, per_slab, per_row, chunks, r_slab, r_row, r_chunks)
    i_ticket = tl.program_id(0) if WHOLE else tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while i_ticket < parts + lag:
        if i_ticket < parts:
            i_slab, i_b, i_chunk, i_split, i_tile = _place(i_ticket, walk, WHOLE)
            p_partial = partial_ptr + i_slab.to(tl.int64) * splits * tiles * (2 * BLOCK_C)
            for i_t in range(i_tile, i_tile + span):
                _sum_gradients(
                    x_ptr, skip_ptr, affine, seed_ptr, dy_ptr, stats_ptr,
                    p_partial + (i_split * tiles + i_t) * (2 * BLOCK_C), i_b, i_split * ROWS,
                    (i_chunk * tiles + i_t) * BLOCK_C, L, C1, C2, drop_below, keep_scale,
                    ROWS, BLOCK_L, BLOCK_C, EVEN, STREAM, SILU,
                )  # fmt: skip
            last = True
            if WHOLE:
                tl.debug_barrier()
            else:
                last = _count(counters_ptr + 1 + i_slab) == per_slab - 1
            if last:
                _merge_gradients(
                    p_partial, affine, stats_ptr, sums_ptr, line_ptr, i_b, i_chunk * tiles * BLOCK_C, splits, tiles,
                    groups, group, L, C, BLOCK_C, BLOCK_S, NG, PADDED,
                )  # fmt: skip
                if WHOLE:
                    tl.debug_barrier()
                else:
                    _count(counters_ptr + 1 + i_slab)
        if i_ticket >= lag:
            i_slab, i_b, i_chunk, i_split, i_tile = _place(i_ticket - lag, walk, WHOLE)
            if not WHOLE:
                _wait(counters_ptr + 1 + i_slab, per_slab)
            p_partial = partial_ptr + i_slab.to(tl.int64) * splits * tiles * (2 * BLOCK_C)
            for i_t in range(i_tile, i_tile + span):
                i_c = (i_chunk * tiles + i_t) * BLOCK_C
                p_out = None
                if total_sums_ptr is not None:
                    if WHOLE:
                        p_out = total_sums_ptr + i_b * C1 + i_c
                    else:  # where this part's sums were, which have been merged
                        p_out = p_partial + (i_split * tiles + i_t) * (2 * BLOCK_C)
                _apply_gradients(
                    x_ptr, skip_ptr, affine, seed_ptr, dy_ptr, (dtotal_ptr, dtotal_more_ptr, dskip_other_ptr),
                    stats_ptr, line_ptr, dx_ptr, dskip_ptr, p_out, i_b, i_split * ROWS, i_c, L, C1, C2, drop_below,
                    keep_scale, ROWS, BLOCK_L, BLOCK_C, EVEN, STREAM, SILU,
                )  # fmt: skip
            # The count comes after those of all the slab's parts and of their merging.
            if total_sums_ptr is not None and not WHOLE and _count(counters_ptr + 1 + i_slab) == 2 * per_slab:
                _merge_totals(
                    p_partial, total_sums_ptr + i_b * C1, i_chunk * tiles * BLOCK_C, splits, tiles, C1, BLOCK_C, BLOCK_S
                )
        i_ticket = i_ticket + tl.num_programs(0) if WHOLE else tl.atomic_add(counters_ptr, 1, sem="relaxed")


@triton.jit(do_not_specialize=SHAPES)
def _parameter_gradients(
    sums_ptr, total_sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dsecond_bias_ptr,
    doffset_ptr, B, C, C1, scale_stride, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight, dbias [C] from sums over the batch in a fixed order, and dscale [B, C] on the way.

    doffset [C], if one offset serves all images, and dsecond_bias [C1] likewise. Both are sums of dx; to the second
    belongs that of dtotal, which is in total_sums [B, C1].
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dx = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    b_dtotal = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for i_b in range(0, B, BLOCK_B):
        o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        m = (o_b < B) & m_c[None, :]
        p_sums = sums_ptr + o_b * 3 * C + o_c[None, :]
        # All loads come before the store: the compiler moves none across it, and each would be waited for.
        b_g = tl.load(p_sums, mask=m, other=0.0)
        b_gx = tl.load(p_sums + C, mask=m, other=0.0)
        if dsecond_bias_ptr is not None or doffset_ptr is not None:
            b_dx += tl.load(p_sums + 2 * C, mask=m, other=0.0)
        if total_sums_ptr is not None:
            b_dtotal += tl.load(total_sums_ptr + o_b * C1 + o_c[None, :], mask=m & (o_c < C1)[None, :], other=0.0)
        if scale_ptr is not None:
            b_scale = tl.load(scale_ptr + o_b * scale_stride + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            b_dscale = b_weight * b_gx + b_bias * b_g
            tl.store(dscale_ptr + o_b * C + o_c[None, :], b_dscale.to(dscale_ptr.dtype.element_ty), mask=m)
            b_g *= 1.0 + b_scale
            b_gx *= 1.0 + b_scale
        b_dweight += b_gx
        b_dbias += b_g
    tl.store(dweight_ptr + o_c, tl.sum(b_dweight, axis=0), mask=m_c)
    tl.store(dbias_ptr + o_c, tl.sum(b_dbias, axis=0), mask=m_c)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + o_c, tl.sum(b_dx, axis=0), mask=m_c)
    if dsecond_bias_ptr is not None:
        tl.store(dsecond_bias_ptr + o_c, tl.sum(b_dx + b_dtotal, axis=0), mask=o_c < C1)


# --- costs ---


def _work(launch: Launch) -> Work:
    """How often each step is taken, and what comes from the L2 cache: maps, and those again that are not whole slabs.

    Coefficients come from the multiprocessor's own cache, as does the second read of a whole slab.
    """
    given = launch.named()
    parts, (programs,) = given["parts"], launch.grid
    tiles, slabs = parts * given["span"], parts // given["per_slab"]
    steps = {"_sum_tile": tiles, "_merge_slab": slabs, "_apply_tile": tiles}
    if launch.kernel is _norm_backward:
        steps = {"_sum_gradients": tiles, "_merge_gradients": slabs, "_apply_gradients": tiles, "_merge_totals": slabs}
    maps = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() == 4}
    summed = given.get("total_ptr") is not None
    again = () if given["WHOLE"] else ("total_ptr" if summed else "x_ptr", "skip_ptr", "dy_ptr")
    return Work(
        executions={**{name: float(often) for name, often in steps.items()}, "_wait": float(parts)},
        turns={launch.kernel.fn.__name__: (parts + given["lag"]) / programs, "_wait": 1.0},
        values={"i_tile": 0},
        elements=float(given["L"] * (given["C1"] + given["C2"]) * len(maps["x_ptr"])),
        l2_bytes=float(sum((1 + (name in again)) * value.nbytes for name, value in maps.items())),
    )


WORK = {"_norm_forward": _work, "_norm_backward": _work}
