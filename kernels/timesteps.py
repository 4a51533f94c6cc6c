"""Two small kernels of every training step, each in place of a chain of PyTorch operations.

timesteps_at  random numbers → timesteps and importance weights.
add_losses_   adds the losses of a micro-batch to sums by timestep, which the log shows.

Their definitions are `reference_diffusion.timesteps_at` and `reference_diffusion.add_losses_`. They are no torch ops:
they run outside compiled code and have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import launcher
from torch import Tensor

BLOCK = 256


@triton.jit
def _timesteps_at(
    uniform_ptr, edges_ptr, importance_ptr, t_ptr, weights_ptr, B, T, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """A binary search: T has DIGITS binary digits."""
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < B
    b_uniform = tl.load(uniform_ptr + o_b, mask=m_b, other=0.0)
    b_target = (b_uniform * tl.load(edges_ptr + T - 1).to(tl.float64)).to(tl.int64)
    b_t = tl.zeros([BLOCK], tl.int32)  # the number of edges known to be at most the target
    for i in tl.static_range(DIGITS):
        b_more = b_t + (1 << (DIGITS - 1 - i))
        m_more = b_more <= T
        b_edge = tl.load(edges_ptr + b_more - 1, mask=m_b & m_more, other=0)
        b_t = tl.where(m_more & (b_edge <= b_target), b_more, b_t)
    b_t = tl.minimum(b_t, T - 1)
    tl.store(t_ptr + o_b, b_t.to(tl.int64), mask=m_b)
    tl.store(weights_ptr + o_b, tl.load(importance_ptr + b_t, mask=m_b, other=0.0), mask=m_b)


@triton.jit
def _by_quartile(b_values, b_quartile):
    """Sums [4] of [BLOCK] values by quartile."""
    return tl.sum(tl.where(b_quartile[:, None] == tl.arange(0, 4)[None, :], b_values[:, None], 0.0), axis=0)


@triton.jit
def _add(p_sums, b_added):
    """Add sums by quartile to four numbers and their total to a fifth; the numbers are three apart."""
    p_quartile = p_sums + 3 * tl.arange(0, 4)
    tl.store(p_quartile, tl.load(p_quartile) + b_added)
    tl.store(p_sums + 12, tl.load(p_sums + 12) + tl.sum(b_added, axis=0))


@triton.jit
def _add_losses(first_ptr, second_ptr, third_ptr, t_ptr, weights_ptr, sums_ptr, B, T, BLOCK: tl.constexpr):
    """A program adds up one kind of loss."""
    losses_ptr = first_ptr
    if tl.program_id(0) == 1:
        losses_ptr = second_ptr
    if tl.program_id(0) == 2:
        losses_ptr = third_ptr
    b_sum = tl.zeros([4], tl.float64)
    b_count = tl.zeros([4], tl.float64)
    b_bad = tl.zeros([4], tl.float64)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < B
        b_t = tl.load(t_ptr + o_b, mask=m_b, other=0)
        b_quartile = tl.where(m_b, 4 * b_t // T, 4)  # 4: no image
        b_value = tl.load(losses_ptr + o_b, mask=m_b, other=0.0) * tl.load(weights_ptr + o_b, mask=m_b, other=0.0)
        b_finite = (b_value == b_value) & (tl.abs(b_value) != float("inf"))
        b_sum += _by_quartile(tl.where(b_finite, b_value, 0.0).to(tl.float64), b_quartile)
        b_count += _by_quartile(b_finite.to(tl.float64), b_quartile)
        b_bad += _by_quartile(1.0 - b_finite.to(tl.float64), b_quartile)
    sums_ptr += tl.program_id(0) * 15
    _add(sums_ptr, b_sum)
    _add(sums_ptr + 1, b_count)
    _add(sums_ptr + 2, b_bad)


def _check(op: str, name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(f"{op} needs {name} of shape {shape} in {dtype}; got {tuple(given.shape)} in {given.dtype}")


def timesteps_at(uniform: Tensor, edges: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [B] int64 and importance weights [B] float32; see `reference_diffusion.timesteps_at`.

    uniform [B] float64, edges [T] int64, importance [T] float32; ValueError for others.
    """
    B, T = uniform.numel(), edges.numel()
    _check("timesteps_at", "uniform", uniform, (B,), torch.float64)
    _check("timesteps_at", "edges", edges, (T,), torch.int64)
    _check("timesteps_at", "importance", importance, (T,), torch.float32)
    t = torch.empty(B, dtype=torch.int64, device=uniform.device)
    weights = torch.empty(B, dtype=torch.float32, device=uniform.device)
    if B:
        run = launcher(_timesteps_at, (triton.cdiv(B, BLOCK),), B, T, DIGITS=T.bit_length(), BLOCK=BLOCK)
        run(uniform.contiguous(), edges.contiguous(), importance.contiguous(), t, weights)
    return t, weights


def add_losses_(sums: Tensor, losses: Sequence[Tensor], t: Tensor, weights: Tensor, num_timesteps: int) -> None:
    """Add one to three losses [B] float32 to rows of sums [3, 5, 3]; see `reference_diffusion.add_losses_`.

    sums float64 and contiguous, t [B] int64, weights [B] float32; ValueError for others.
    """
    B = t.numel()
    if not 1 <= len(losses) <= 3:
        raise ValueError(f"add_losses_ needs one to three losses; got {len(losses)}")
    for values in losses:
        _check("add_losses_", "losses", values, (B,), torch.float32)
    _check("add_losses_", "t", t, (B,), torch.int64)
    _check("add_losses_", "weights", weights, (B,), torch.float32)
    _check("add_losses_", "sums", sums, (3, 5, 3), torch.float64)
    if not sums.is_contiguous():
        raise ValueError(f"add_losses_ needs contiguous sums, which it changes; got strides {sums.stride()}")
    first, second, third = (*(values.contiguous() for values in losses), *[losses[0]] * (3 - len(losses)))
    run = launcher(_add_losses, (len(losses),), B, num_timesteps, BLOCK=BLOCK)
    run(first, second, third, t.contiguous(), weights.contiguous(), sums)
