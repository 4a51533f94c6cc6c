"""Softmax attention over packed heads, forward and backward, with no score matrix in memory.

Shapes   qkv [B, L, 3C], last axis [head][q, k, v][channel]; out [B, L, C]; lse [B, N, L] float32, the log of each
         query's softmax denominator. C = N * D, D a multiple of 8 up to 512. float32, float16, bfloat16.
         qkv_bias [3C], whose gradient is the sum of qkv's; up to 256 positions that is summed before it is written.
FLOPs    forward 4 * B * N * L^2 * D, backward 10 * B * N * L^2 * D (two and five matrix products).
Traffic  forward 4 * B * L * C elements, backward 7; it dominates for maps of up to a few hundred pixels.
Source   Vaswani et al. 2017, eq. 1; for L > 256 the online softmax of Dao et al. 2022 (https://arxiv.org/abs/2205.14135).

Up to 256 positions a program holds whole rows of scores on chip: the softmax needs one pass, and the products with V
(in the backward with Q, K and dO) are stored in chunks of channels. So no accumulator is as wide as a head, and head
sizes such as 144, 192 and 512 need no padding. Longer sequences are processed block by block.

In the backward dQ and dK are one computation with (Q, dO) and (K, V) exchanged: KEYS tells a program whether its rows
are queries or keys. No atomics: results are deterministic. Block sizes and kernels are in one file as they depend on
each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import channels_last, kernel_op, launcher, no_derivative
from fastdiff.kernels.products import dot
from torch import Tensor

SHORT = 256
"""The longest sequence for which a program holds whole rows of scores."""
WHOLE = 128
"""The longest sequence whose whole score matrix one program of the backward holds (in 16-bit types)."""

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp two
LN2 = tl.constexpr(0.6931471805599453)


# --- launch choices ---


@dataclass(frozen=True)
class Config:
    """Block sizes of a launch."""

    rows: int
    """Queries per program; in a launch for dK and dV, keys."""
    columns: int
    """Keys at a time (for dK and dV, queries); all of them, padded to a power of two, where L <= SHORT."""
    block_d: int
    """Channels per step of a product."""
    block_out: int
    """For L > SHORT, channels of the result per program; each program recomputes the scores. Else 0, for all."""
    warps: int
    stages: int = 2


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # the least size of a dot


def _step(D: int, largest: int) -> int:
    """A power of two whose last step pads at most an eighth of D: 64 for 192, 32 for 96 and 144; else 16."""
    block = largest
    while block > 16 and (block > D or -D % block * 8 > D):
        block //= 2
    return block


def config_for(L: int, D: int, dtype: torch.dtype, backward: bool = False) -> Config:
    """The block sizes, which depend on shape and dtype alone.

    They were chosen by compiling, not by timing: at the sizes of the configurations no register spills for compute
    capability 8.0, 9.0 or 10.0.
    """
    columns, block, out = _power(L), _step(D, 64), min(256, _power(D))
    if dtype == torch.float32:  # products without tensor cores: small blocks, or the registers run out
        if L > SHORT:
            return Config(32, 32, _step(D, 32), min(64, out), warps=4)
        rows = columns if backward and L <= 32 else 16
        return Config(rows, columns, _step(D, 32 if L <= WHOLE else 16), 0, warps=4)
    if L <= WHOLE:
        warps = {16: 1, 32: 2, 64: 4}.get(columns, 8 if backward else 4)
        return Config(columns if backward else min(64, columns), columns, block, 0, warps)
    if L <= SHORT:
        # At least two steps: dots outside of a loop would be laid out as a chain, whose registers spill.
        return Config(64, columns, _step(D, 32 if D >= 64 else 16), 0, warps=8 if backward else 4)
    if backward:
        rows, columns = {256: (64, 32), 128: (64, 64)}.get(out, (128, 32))
        return Config(rows, columns, block, out, warps=8)
    return Config(128 if out == 128 else 64, 64, block, out, warps=8 if out > 64 else 4)


def unsupported(dtype: torch.dtype, L: int, width: int, num_heads: int) -> str:
    """The reason why the kernels don't support qkv [B, L, width]; empty if they do."""
    if num_heads < 1 or width % (3 * num_heads):
        return f"{width} channels are not 3 * {num_heads} heads * D"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {dtype} is none of float32, float16, bfloat16"
    D = width // (3 * num_heads)
    if D % 8 or not 8 <= D <= 512:
        return f"head size {D} is not a multiple of 8 from 8 to 512"
    if L * width >= 2**31:  # offsets within an image are 32 bits
        return f"one image has {L * width} numbers, 2^31 or more"
    return ""


# --- kernels ---
# Rows are given as pointers [R, 1] to their first channel, with a mask [R, 1].


@triton.jit
def _chunk(p_x, m_x, i_d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Channels i_d .. i_d + BLOCK of some rows, [R, BLOCK]; zeros past their ends."""
    o_d = i_d + tl.arange(0, BLOCK)[None, :]
    if D % BLOCK:
        m_x = m_x & (o_d < D)
    return tl.load(p_x + o_d, mask=m_x, other=0.0)


@triton.jit
def _times_transposed(p_x, m_x, p_y, m_y, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x . y^T for x [M, D], y [N, D]: [M, N] float32."""
    b_s = tl.zeros([p_x.shape[0], p_y.shape[0]], dtype=tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_x = _chunk(p_x, m_x, i_d, D, BLOCK_D)
        b_y = _chunk(p_y, m_y, i_d, D, BLOCK_D)
        b_s = dot(b_x, tl.trans(b_y), b_s)
    return b_s


@triton.jit
def _write_times(p_y, m_y, b_w, factor, p_x, m_x, p_sums, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """y [M, D] = factor * (w . x) for w [M, N] in float32, x [N, D]; each chunk of channels is written once done.

    The sums of y's rows → sums [D] float32, unless it is None.
    """
    b_w = b_w.to(p_x.dtype.element_ty)
    for i_d in range(0, D, BLOCK_D):
        b_y = dot(b_w, _chunk(p_x, m_x, i_d, D, BLOCK_D), None) * factor
        o_d = i_d + tl.arange(0, BLOCK_D)
        tl.store(p_y + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y & (o_d < D)[None, :])
        if p_sums is not None:
            tl.store(p_sums + o_d, tl.sum(tl.where(m_y, b_y, 0.0), 0), mask=o_d < D)


@triton.jit
def _place(L, N, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row of this program, its head among B * N, and where the head's q and out begin in qkv and out."""
    blocks = tl.cdiv(L, BLOCK_M)
    i_m = tl.program_id(0) % blocks * BLOCK_M  # neighbours share a head's keys in the L2 cache
    i_bn = tl.program_id(0) // blocks
    i_b = (i_bn // N).to(tl.int64)
    i_n = i_bn % N
    return i_m, i_bn.to(tl.int64), (i_b * L * N * 3 + i_n * 3) * D, (i_b * L * N + i_n) * D


@triton.jit
def _sums(sums_ptr, i_third: tl.constexpr, D: tl.constexpr):
    """Where a program's sums of dQ (0), dK (1) or dV (2) are in sums [programs, 3, D]; None without sums."""
    return None if sums_ptr is None else sums_ptr + (tl.program_id(0).to(tl.int64) * 3 + i_third) * D


@triton.jit
def _forward_short(
    qkv_ptr, out_ptr, lse_ptr, N, scale,
    L: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_bn, i_qkv, i_out = _place(L, N, D, BLOCK_M)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < L)[:, None], (o_n < L)[:, None]
    p_q = qkv_ptr + i_qkv + o_m[:, None] * (3 * N * D)
    p_k = qkv_ptr + i_qkv + D + o_n[:, None] * (3 * N * D)

    b_s = _times_transposed(p_q, m_m, p_k, m_n, D, BLOCK_D) * (scale * LOG2E)  # [M, L]
    if L < BLOCK_N:
        b_s = tl.where((o_n < L)[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_p = tl.exp2(b_s - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    tl.store(lse_ptr + i_bn * L + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=o_m < L)
    p_out = out_ptr + i_out + o_m[:, None] * (N * D)
    _write_times(p_out, m_m, b_p, (1 / b_sum)[:, None], p_k + D, m_n, None, D, BLOCK_D)


@triton.jit
def _backward_whole(
    qkv_ptr, dout_ptr, lse_ptr, dqkv_ptr, sums_ptr, N, scale,
    L: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of all positions of a head: BLOCK_M = BLOCK_N, at least L."""
    _, i_bn, i_qkv, i_out = _place(L, N, D, BLOCK_M)
    o_l = tl.arange(0, BLOCK_N)
    m_l = (o_l < L)[:, None]
    p_q = qkv_ptr + i_qkv + o_l[:, None] * (3 * N * D)
    p_dq = dqkv_ptr + i_qkv + o_l[:, None] * (3 * N * D)
    p_do = dout_ptr + i_out + o_l[:, None] * (N * D)
    b_lse = tl.load(lse_ptr + i_bn * L + o_l, mask=o_l < L, other=0.0)[:, None]

    b_p = _times_transposed(p_q, m_l, p_q + D, m_l, D, BLOCK_D) * (scale * LOG2E)
    if L < BLOCK_N:
        b_p = tl.where((o_l < L)[None, :], b_p, float("-inf"))
    b_p = tl.exp2(b_p - b_lse * LOG2E)  # [L, L]; rows past L are meaningless, but dO is 0 there
    b_p *= (1 / tl.sum(b_p, 1))[:, None]  # without lse's rounding: rows of dS must add up to 0
    _write_times(p_dq + 2 * D, m_l, tl.trans(b_p), 1.0, p_do, m_l, _sums(sums_ptr, 2, D), D, BLOCK_D)
    b_dp = _times_transposed(p_do, m_l, p_q + 2 * D, m_l, D, BLOCK_D)
    b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
    _write_times(p_dq + D, m_l, tl.trans(b_ds), scale, p_q, m_l, _sums(sums_ptr, 1, D), D, BLOCK_D)
    _write_times(p_dq, m_l, b_ds, scale, p_q + D, m_l, _sums(sums_ptr, 0, D), D, BLOCK_D)


@triton.jit
def _backward_short(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sums_ptr, N, scale,
    KEYS: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries, and delta = rowsum(P * dP) of each; with KEYS, dK and dV of BLOCK_M keys."""
    i_m, i_bn, i_qkv, i_out = _place(L, N, D, BLOCK_M)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < L)[:, None], (o_n < L)[:, None]
    o_row, o_column = o_m[:, None] * (3 * N * D), o_n[:, None] * (3 * N * D)
    p_lse, p_delta = lse_ptr + i_bn * L, delta_ptr + i_bn * L
    p_q, p_do = qkv_ptr + i_qkv, dout_ptr + i_out
    p_result = dqkv_ptr + i_qkv + o_row
    if KEYS:
        p_x, p_dx = p_q + D + o_row, p_q + 2 * D + o_row
        p_y, p_dy = p_q + o_column, p_do + o_n[:, None] * (N * D)
        b_lse = tl.load(p_lse + o_n, mask=o_n < L, other=0.0)[None, :]
    else:
        p_x, p_dx = p_q + o_row, p_do + o_m[:, None] * (N * D)
        p_y, p_dy = p_q + D + o_column, p_q + 2 * D + o_column
        b_lse = tl.load(p_lse + o_m, mask=o_m < L, other=0.0)[:, None]

    b_p = _times_transposed(p_x, m_m, p_y, m_n, D, BLOCK_D) * (scale * LOG2E)
    if L < BLOCK_N:
        m_p = (o_n < L)[None, :]
        if KEYS:  # P of keys past L, which is never read, could overflow
            m_p = m_p & m_m
        b_p = tl.where(m_p, b_p, float("-inf"))
    b_p = tl.exp2(b_p - b_lse * LOG2E)  # [M, L]; with KEYS, rows of P^T
    if KEYS:  # dV before dP takes its registers
        _write_times(p_result + 2 * D, m_m, b_p, 1.0, p_dy, m_n, _sums(sums_ptr, 2, D), D, BLOCK_D)
    else:
        b_p *= (1 / tl.sum(b_p, 1))[:, None]  # as in _backward_whole
    b_dp = _times_transposed(p_dx, m_m, p_dy, m_n, D, BLOCK_D)
    if KEYS:
        b_ds = b_p * (b_dp - tl.load(p_delta + o_n, mask=o_n < L, other=0.0)[None, :])
        _write_times(p_result + D, m_m, b_ds, scale, p_y, m_n, _sums(sums_ptr, 1, D), D, BLOCK_D)
    else:
        b_delta = tl.sum(b_p * b_dp, 1)
        tl.store(p_delta + o_m, b_delta, mask=o_m < L)
        b_ds = b_p * (b_dp - b_delta[:, None])
        _write_times(p_result, m_m, b_ds, scale, p_y, m_n, _sums(sums_ptr, 0, D), D, BLOCK_D)


@triton.jit
def _forward_long(
    qkv_ptr, out_ptr, lse_ptr, L, N, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_m, i_bn, i_qkv, i_out = _place(L, N, D, BLOCK_M)
    i_v = tl.program_id(1) * BLOCK_V
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = (o_m < L)[:, None]
    p_q = qkv_ptr + i_qkv + o_m[:, None] * (3 * N * D)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for i_n in range(0, L, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n < L)[:, None]
        p_k = qkv_ptr + i_qkv + D + o_n[:, None] * (3 * N * D)
        b_s = _times_transposed(p_q, m_m, p_k, m_n, D, BLOCK_D) * (scale * LOG2E)
        b_s = tl.where((o_n < L)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new
        b_v = _chunk(p_k + D, m_n, i_v, D, BLOCK_V)
        b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None])
    if i_v == 0:
        tl.store(lse_ptr + i_bn * L + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=o_m < L)
    o_v = i_v + tl.arange(0, BLOCK_V)[None, :]
    p_out = out_ptr + i_out + o_m[:, None] * (N * D) + o_v
    tl.store(p_out, (b_out / b_sum[:, None]).to(out_ptr.dtype.element_ty), mask=m_m & (o_v < D))


@triton.jit
def _delta(out_ptr, dout_ptr, delta_ptr, L, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """rowsum(dO * O), which equals rowsum(P * dP), [B, N, L]."""
    i_m, i_bn, _, i_out = _place(L, N, D, BLOCK_M)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_out = i_out + o_m[:, None] * (N * D)
    b_out = _chunk(out_ptr + o_out, (o_m < L)[:, None], 0, D, BLOCK_D).to(tl.float32)
    b_do = _chunk(dout_ptr + o_out, (o_m < L)[:, None], 0, D, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + i_bn * L + o_m, tl.sum(b_out * b_do, 1), mask=o_m < L)


@triton.jit
def _backward_long(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, L, N, scale,
    KEYS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_V channels of dQ of BLOCK_M queries; with KEYS, of dK and dV of BLOCK_M keys."""
    i_m, i_bn, i_qkv, i_out = _place(L, N, D, BLOCK_M)
    i_v = tl.program_id(1) * BLOCK_V
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = (o_m < L)[:, None]
    o_row = o_m[:, None] * (3 * N * D)
    p_lse, p_delta = lse_ptr + i_bn * L, delta_ptr + i_bn * L
    p_q, p_do = qkv_ptr + i_qkv, dout_ptr + i_out
    if KEYS:
        p_x, p_dx = p_q + D + o_row, p_q + 2 * D + o_row
        b_dv = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    else:
        p_x, p_dx = p_q + o_row, p_do + o_m[:, None] * (N * D)
        b_lse = tl.load(p_lse + o_m, mask=o_m < L, other=0.0)[:, None]
        b_delta = tl.load(p_delta + o_m, mask=o_m < L, other=0.0)[:, None]
    b_dx = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for i_n in range(0, L, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n < L)[:, None]
        if KEYS:
            p_y, p_dy = p_q + o_n[:, None] * (3 * N * D), p_do + o_n[:, None] * (N * D)
            b_lse = tl.load(p_lse + o_n, mask=o_n < L, other=0.0)[None, :]
            b_delta = tl.load(p_delta + o_n, mask=o_n < L, other=0.0)[None, :]
        else:
            p_y = p_q + D + o_n[:, None] * (3 * N * D)
            p_dy = p_y + D
        b_p = _times_transposed(p_x, m_m, p_y, m_n, D, BLOCK_D) * (scale * LOG2E)
        b_p = tl.exp2(tl.where(m_m & (o_n < L)[None, :], b_p, float("-inf")) - b_lse * LOG2E)
        b_ds = b_p * (_times_transposed(p_dx, m_m, p_dy, m_n, D, BLOCK_D) - b_delta)
        b_y = _chunk(p_y, m_n, i_v, D, BLOCK_V)
        b_dx = dot(b_ds.to(b_y.dtype), b_y, b_dx)
        if KEYS:
            b_dv = dot(b_p.to(b_y.dtype), _chunk(p_dy, m_n, i_v, D, BLOCK_V), b_dv)
    o_v = i_v + tl.arange(0, BLOCK_V)[None, :]
    m_v = m_m & (o_v < D)
    p_result = dqkv_ptr + i_qkv + o_row + o_v
    if KEYS:
        p_result += D
        tl.store(p_result + D, b_dv.to(dqkv_ptr.dtype.element_ty), mask=m_v)
    tl.store(p_result, (b_dx * scale).to(dqkv_ptr.dtype.element_ty), mask=m_v)


# --- ops ---


def _rows(x: Tensor, name: str) -> Tensor:
    """x [B, L, C] contiguous. As `channels_last` does for a map, it is copied, with one warning, if it isn't."""
    return channels_last(x.transpose(1, 2)[:, :, None], "attention", name)[:, :, 0].transpose(1, 2)


def _sizes(qkv: Tensor, num_heads: int) -> tuple[int, int, int]:
    B, L, width = qkv.shape
    return B * num_heads, L, width // (3 * num_heads)


def _options(c: Config, L: int, D: int) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    sizes = {"D": D, "BLOCK_M": c.rows, "BLOCK_N": c.columns, "BLOCK_D": c.block_d}
    path = {"L": L} if L <= SHORT else {"BLOCK_V": c.block_out}
    return {**sizes, **path, "num_warps": c.warps, "num_stages": c.stages}


@kernel_op("attention")
def _attention(qkv: Tensor, num_heads: int, qkv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns out and lse; qkv_bias is there for its gradient."""
    shape = "" if qkv.dim() == 3 else f"shape {tuple(qkv.shape)} is not [B, L, 3C]"
    if reason := shape or unsupported(qkv.dtype, qkv.shape[1], qkv.shape[2], num_heads):
        raise ValueError(f"the attention kernels can't take this input: {reason}; reference.attention takes any.")
    qkv = _rows(qkv, "qkv")
    BN, L, D = _sizes(qkv, num_heads)
    out = qkv.new_empty(len(qkv), L, num_heads * D)
    lse = qkv.new_empty(len(qkv), num_heads, L, dtype=torch.float32)
    if not out.numel():
        return out, lse
    c = config_for(L, D, qkv.dtype)
    programs = BN * triton.cdiv(L, c.rows)
    if L <= SHORT:
        launcher(_forward_short, (programs,), num_heads, D**-0.5, **_options(c, L, D))(qkv, out, lse)
    else:
        grid = (programs, triton.cdiv(D, c.block_out))
        launcher(_forward_long, grid, L, num_heads, D**-0.5, **_options(c, L, D))(qkv, out, lse)
    return out, lse


@_attention.register_fake
def _(qkv: Tensor, num_heads: int, qkv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    B, L, width = qkv.shape
    return qkv.new_empty(B, L, width // 3), qkv.new_empty(B, num_heads, L, dtype=torch.float32)


@kernel_op("attention_backward")
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, qkv_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns dqkv [B, L, 3C], packed as qkv, and its sum over images and positions if qkv_bias is given, else [0]."""
    dout, qkv, out = _rows(dout, "the gradient"), _rows(qkv, "qkv"), _rows(out, "out")
    BN, L, D = _sizes(qkv, num_heads)
    dqkv = qkv.new_empty(qkv.shape)
    if not dqkv.numel():
        return dqkv, qkv.new_empty(0) if qkv_bias is None else torch.zeros_like(qkv_bias)
    c = config_for(L, D, qkv.dtype, backward=True)
    blocks = triton.cdiv(L, c.rows)
    programs = BN * blocks
    options, scale = _options(c, L, D), D**-0.5
    if L <= SHORT:
        sums = None if qkv_bias is None else torch.empty(programs, 3, D, dtype=torch.float32, device=qkv.device)
        if blocks == 1:
            launcher(_backward_whole, (programs,), num_heads, scale, **options)(qkv, dout, lse, dqkv, sums)
        else:
            delta = torch.empty_like(lse)
            for keys in (False, True):  # the first launch writes delta, the second reads it
                run = launcher(_backward_short, (programs,), num_heads, scale, KEYS=keys, **options)
                run(qkv, dout, lse, delta, dqkv, sums)
        if qkv_bias is None or sums is None:
            return dqkv, qkv.new_empty(0)
        return dqkv, sums.view(-1, num_heads, blocks, 3 * D).sum(dim=(0, 2)).flatten().to(qkv_bias.dtype)
    delta = torch.empty_like(lse)
    rows = 4096 // _power(D)
    launcher(_delta, (BN * triton.cdiv(L, rows),), L, num_heads, D=D, BLOCK_M=rows, BLOCK_D=_power(D))(out, dout, delta)
    grid = (programs, triton.cdiv(D, c.block_out))
    for keys in (False, True):
        launcher(_backward_long, grid, L, num_heads, scale, KEYS=keys, **options)(qkv, dout, lse, delta, dqkv)
    return dqkv, qkv.new_empty(0) if qkv_bias is None else dqkv.sum(dim=(0, 1), dtype=torch.float32).to(qkv_bias.dtype)


@_attention_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, qkv_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if qkv_bias is None else torch.empty_like(qkv_bias)


def _save(ctx: Any, inputs: tuple[Tensor, int, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, qkv_bias = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, qkv_bias)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, None, Tensor | None]:
    if torch.is_grad_enabled():
        no_derivative("the backward pass of attention")
    qkv, out, lse, qkv_bias = ctx.saved_tensors
    dqkv, dbias = torch.ops.fastdiff.attention_backward(dout, qkv, out, lse, ctx.num_heads, qkv_bias)
    return dqkv, None, None if qkv_bias is None else dbias


_attention.register_autograd(_backward, setup_context=_save)


def attention(qkv: Tensor, num_heads: int, qkv_bias: Tensor | None = None) -> Tensor:
    """Softmax attention over packed heads, [B, L, 3C] → [B, L, C]; see `reference.attention`.

    qkv must be contiguous (else it is copied, with one warning) and is kept for the backward, as is the result.
    qkv_bias [3C]: the bias that was added to qkv as a constant. Its gradient is the sum of qkv's, which the kernels of
    the backward have at hand, so that it needs no pass over memory.
    """
    return _attention(qkv, num_heads, qkv_bias)[0]
