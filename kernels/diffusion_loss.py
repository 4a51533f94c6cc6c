"""Every loss of a diffusion model per image, and its gradient with respect to the network's output, in one pass.

Shapes   output [B, C or 2C, H, W] channels-last; x_start uint8 [B, H, W, C] or float32 [B, C, H, W]; noise float32
         [B, C, H, W], or its counters; coefficients [B, 10] float32, columns as in `reference_diffusion.LossTable`.
         → terms [3, B] float32: loss, mse, vb (bits/dim); gradient of each image's loss, like output.
Traffic  output, x_start and the gradient once; x_t and the noise are recomputed, not read.
Sums     per program in a fixed order, then over programs by one small kernel: no atomics.
Source   Ho et al. 2020, eq. 12-14; Nichol & Dhariwal 2021, eq. 4-7, 15, 16; Min-SNR: Hang et al. 2023.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import Launch, Work, channels_last, empty_map, kernel_op, launcher
from fastdiff.kernels.noise import UNALIGNED
from fastdiff.kernels.pixels import (
    QUADS,
    check_coefficients,
    load_noise,
    load_start,
    noise_args,
    noise_strides,
    start_map,
    strides,
)
from fastdiff.kernels.reference import CounterNoise
from torch import Tensor

COLUMNS = 10
VARIANCES = ("fixed", "range", "learned")
MAX_CHANNELS = 4

INV_LN2 = tl.constexpr(1 / math.log(2.0))


@triton.jit
def _cdf(b_z):
    """The tanh approximation of the normal distribution function (Page 1977), and its derivative."""
    SCALE: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    b_y = (b_z + 0.044715 * (b_z * b_z * b_z)) * SCALE
    b_tanh = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(b_y)) + 1.0)  # near 1 its error is float32's rounding
    b_tanh = tl.where(b_y < 0.0, -b_tanh, b_tanh)
    b_slope = (1.0 - b_tanh * b_tanh) * (1.0 + 3 * 0.044715 * b_z * b_z) * (0.5 * SCALE)
    return 0.5 * (1.0 + b_tanh), b_slope


@triton.jit
def _nll(b_x, b_mean, b_lv):
    """-log of the discretised Gaussian (Ho et al. 2020, eq. 13), and its derivatives by mean and log variance."""
    b_inv = tl.exp(-0.5 * b_lv)
    b_plus = b_inv * (b_x - b_mean + 1.0 / 255.0)
    b_minus = b_inv * (b_x - b_mean - 1.0 / 255.0)
    b_cp, b_pp = _cdf(b_plus)
    b_cm, b_pm = _cdf(b_minus)
    m_low, m_high = b_x < -0.999, b_x > 0.999
    b_pp = tl.where(m_high, 0.0, b_pp)
    b_pm = tl.where(m_low, 0.0, b_pm)
    b_p = tl.where(m_high, 1.0, b_cp) - tl.where(m_low, 0.0, b_cm)
    b_each = tl.where(b_p >= 1e-12, 1.0 / tl.maximum(b_p, 1e-12), 0.0)
    b_dmean = b_each * b_inv * (b_pp - b_pm)
    b_dlv = b_each * 0.5 * (b_plus * b_pp - b_minus * b_pm)
    return -tl.log(tl.maximum(b_p, 1e-12, propagate_nan=tl.PropagateNan.ALL)), b_dmean, b_dlv


@triton.jit
def _kl(b_d, b_true_lv, b_lv):
    """KL between Gaussians whose means differ by b_d (true - predicted), and its derivatives."""
    b_inv = tl.exp(-b_lv)
    b_ratio, b_square = tl.exp(b_true_lv - b_lv), b_d * b_d * b_inv
    return 0.5 * (b_lv - b_true_lv - 1.0 + b_ratio + b_square), -b_d * b_inv, 0.5 * (1.0 - b_ratio - b_square)


@triton.jit(do_not_specialize=UNALIGNED)
def _diffusion_loss(
    out_ptr, x_ptr, flip_ptr, noise_ptr, index_ptr, draw_ptr, coef_ptr, partial_ptr, grad_ptr,
    seed, HW, W, parts, x_channel, x_pixel, n_channel, n_pixel, coef_stride, vb_scale,
    C: tl.constexpr, EPSILON: tl.constexpr, VARIANCE: tl.constexpr, KL: tl.constexpr, Q: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_p = (tl.program_id(1) * Q + tl.arange(0, Q))[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = o_p < HW
    p_coef = coef_ptr + i_b * coef_stride
    b_a, b_s, b_recip, b_recipm1 = tl.load(p_coef), tl.load(p_coef + 1), tl.load(p_coef + 2), tl.load(p_coef + 3)
    b_c1, b_c2, b_low, b_high = tl.load(p_coef + 4), tl.load(p_coef + 5), tl.load(p_coef + 6), tl.load(p_coef + 7)
    b_weight, i_first = tl.load(p_coef + 8), tl.load(p_coef + 9)
    BOUND: tl.constexpr = KL or VARIANCE != 0
    OUT: tl.constexpr = C if VARIANCE == 0 else 2 * C
    p_row = (i_b * HW + o_p) * OUT
    b_mse = tl.zeros((Q, 4), tl.float32)
    b_vb = tl.zeros((Q, 4), tl.float32)
    b_each = 1.0 / (C * HW)
    for i_c in tl.static_range(C):
        b_x = load_start(x_ptr, flip_ptr, i_b, i_c, o_p, m, C, HW, W, x_channel, x_pixel)
        b_noise = load_noise(
            noise_ptr, index_ptr, draw_ptr, seed, i_b, i_c, o_p, m, C, HW, n_channel, n_pixel, Q, ALIGNED
        )
        b_out = tl.load(out_ptr + p_row + i_c, mask=m, other=0.0).to(tl.float32)
        b_off = b_out - (b_noise if EPSILON else b_x)
        b_dout = tl.zeros((Q, 4), tl.float32)
        if not KL:
            b_mse += tl.where(m, b_off * b_off, 0.0)
            b_dout = 2.0 * b_weight * b_each * b_off
        if BOUND:
            if VARIANCE == 0:
                b_lv = tl.zeros((Q, 4), tl.float32) + b_high
                b_slope = 0.0
            else:
                b_lv = tl.load(out_ptr + p_row + C + i_c, mask=m, other=0.0).to(tl.float32)
                b_slope = 1.0
                if VARIANCE == 1:  # Nichol & Dhariwal 2021, eq. 15
                    b_share = (b_lv + 1.0) / 2.0
                    b_lv = b_share * b_high + (1.0 - b_share) * b_low
                    b_slope = (b_high - b_low) / 2.0
            b_x_t = b_a * b_x + b_s * b_noise
            b_pred = b_recip * b_x_t - b_recipm1 * b_out if EPSILON else b_out
            if i_first > 0:
                b_term, b_dmean, b_dlv = _nll(b_x, b_c1 * b_pred + b_c2 * b_x_t, b_lv)
            else:  # x_0 - pred is (output - noise) * recipm1: late in the chain a difference would lose most digits
                b_term, b_dmean, b_dlv = _kl(b_c1 * (b_off * b_recipm1 if EPSILON else -b_off), b_low, b_lv)
            b_vb += tl.where(m, b_term, 0.0)
            b_unit = vb_scale * b_each * INV_LN2
            if KL:
                b_dout = b_unit * b_dmean * b_c1 * (-b_recipm1 if EPSILON else 1.0)
            if VARIANCE != 0:
                b_dlv = b_unit * b_dlv * b_slope
                tl.store(grad_ptr + p_row + C + i_c, b_dlv.to(grad_ptr.dtype.element_ty), mask=m)
        tl.store(grad_ptr + p_row + i_c, b_dout.to(grad_ptr.dtype.element_ty), mask=m)
    p_part = partial_ptr + (i_b * parts + tl.program_id(1)) * 2
    tl.store(p_part, tl.sum(tl.sum(b_mse, axis=1), axis=0) * b_each)
    tl.store(p_part + 1, tl.sum(tl.sum(b_vb, axis=1), axis=0) * (b_each * vb_scale * INV_LN2))


@triton.jit(do_not_specialize=UNALIGNED)
def _combine(
    partial_ptr, coef_ptr, terms_ptr, B, parts, coef_stride, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """partial [B, parts, 2] → terms [3, B]: weight * mse + vb, mse, vb."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_s = tl.arange(0, BLOCK_S)
    m_b = o_b < B
    b_mse = tl.zeros((BLOCK_B, BLOCK_S), tl.float32)
    b_vb = tl.zeros((BLOCK_B, BLOCK_S), tl.float32)
    for i_s in range(0, parts, BLOCK_S):
        m = m_b[:, None] & (i_s + o_s < parts)[None, :]
        p = partial_ptr + (o_b[:, None] * parts + i_s + o_s[None, :]) * 2
        b_mse += tl.load(p, mask=m, other=0.0)
        b_vb += tl.load(p + 1, mask=m, other=0.0)
    # The parts are summed after the loop because Triton 3.6 fails on a sum of 8 or more columns inside it.
    b_mse = tl.sum(b_mse, axis=1)
    b_vb = tl.sum(b_vb, axis=1)
    b_weight = tl.load(coef_ptr + o_b * coef_stride + 8, mask=m_b, other=0.0)
    tl.store(terms_ptr + o_b, b_weight * b_mse + b_vb, mask=m_b)
    tl.store(terms_ptr + B + o_b, b_mse, mask=m_b)
    tl.store(terms_ptr + 2 * B + o_b, b_vb, mask=m_b)


def _work(launch: Launch) -> Work:
    """Only images at t = 0, about one in a thousand, take the branch with _nll."""
    given = launch.named()
    return Work(executions={"_nll": 0.0}, elements=launch.grid[0] * given["C"] * given["HW"])


WORK = {"_diffusion_loss": _work}


@kernel_op("diffusion_loss")
def _op(
    output: Tensor,
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: int,
    index: Tensor | None,
    draw: Tensor | None,
    flip: Tensor | None,
    epsilon: bool,
    variance: str,
    kl: bool,
    vb_scale: float,
) -> tuple[Tensor, Tensor]:
    x = start_map(x_start, "diffusion_loss")
    B, C, H, W = x.shape
    output = channels_last(output, "diffusion_loss", "output")
    grad = empty_map(*output.shape, like=output)
    terms = torch.empty(3, B, dtype=torch.float32, device=output.device)
    if not output.numel():
        return terms.zero_(), grad
    x, x_channel, x_pixel = strides(x)
    noise, n_channel, n_pixel = noise_strides(noise)
    parts = triton.cdiv(H * W, 4 * QUADS)
    partial = torch.empty(B, parts, 2, dtype=torch.float32, device=output.device)
    run = launcher(
        _diffusion_loss,
        (B, parts),
        *(seed, H * W, W, parts, x_channel, x_pixel, n_channel, n_pixel, coefficients.stride(0), vb_scale),
        C=C,
        EPSILON=epsilon,
        VARIANCE=VARIANCES.index(variance),
        KL=kl,
        Q=QUADS,
        ALIGNED=H * W % 4 == 0,
    )
    run(output, x, None if flip is None else flip.contiguous(), noise, index, draw, coefficients, partial, grad)
    blocks = {"BLOCK_B": 32, "BLOCK_S": min(16, triton.next_power_of_2(parts))}
    combine = launcher(_combine, (triton.cdiv(B, 32),), B, parts, coefficients.stride(0), **blocks)
    combine(partial, coefficients, terms)
    return terms, grad


@_op.register_fake
def _(output: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return output.new_empty(3, len(output), dtype=torch.float32), empty_map(*output.shape, like=output)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # no map of zeros for the second output


def _differentiate(ctx: Any, dterms: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    if dterms is None:
        return (None,) * 12
    return grad * dterms[0].to(grad.dtype)[:, None, None, None], *(None,) * 11


_op.register_autograd(_differentiate, setup_context=_setup)


def diffusion_loss(
    output: Tensor,
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor | CounterNoise,
    *,
    epsilon: bool = True,
    variance: str = "fixed",
    kl: bool = False,
    vb_scale: float = 1.0,
    flip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mse, vb), each [B] float32; see `reference_diffusion.diffusion_loss`. Only loss carries a gradient.

    Raises ValueError for shapes and dtypes that don't fit; a channels-first output is copied, with a warning.
    """
    x = start_map(x_start, "diffusion_loss")
    B, C, H, W = x.shape
    if C > MAX_CHANNELS:
        raise ValueError(f"diffusion_loss takes at most {MAX_CHANNELS} channels; got {C}: use the reference")
    if variance not in VARIANCES:
        raise ValueError(f"diffusion_loss knows variance {', '.join(VARIANCES)}; got {variance!r}")
    wanted = (B, C if variance == "fixed" else 2 * C, H, W)
    if output.shape != wanted:
        raise ValueError(
            f"diffusion_loss needs output {wanted} for x_start {tuple(x_start.shape)} and variance {variance}; got "
            f"{tuple(output.shape)}: learn_sigma of the model and variance must agree"
        )
    if flip is not None and (flip.shape != (B,) or flip.dtype != torch.bool):
        raise ValueError(f"diffusion_loss needs flip of shape {(B,)} bool; got {tuple(flip.shape)} {flip.dtype}")
    check_coefficients(coefficients, B, COLUMNS, "diffusion_loss")
    given, seed, index, draw = noise_args(noise, x.shape, "diffusion_loss")
    terms, _ = _op(output, x_start, coefficients, given, seed, index, draw, flip, epsilon, variance, kl, vb_scale)
    return terms[0], terms[1].detach(), terms[2].detach()
