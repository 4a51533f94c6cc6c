"""One step of a sampler: from the network's output to the next x and the next network input, in one pass.

    x_0      = clip(recip * x - recipm1 * output), or clip(output) of a network that predicts x_0
    x_0     += guided_x_start * gradient                   of a classifier's log probability, if one guides
    x_next   = c_x * x + c_0 * x_0 + c_1 * h_1 + c_2 * h_2 + c_3 * h_3 + sigma * noise + guided_x * gradient

DDPM, DDIM(eta) and the linear multistep updates of DPM-Solver++ and UniPC are choices of the coefficients; h_i are
earlier predictions of x_0.

Shapes   output [B, C or 2C, H, W] channels-last; x, h_i, gradient [B, C, H, W] float32; coefficients [B, 12] float32
         with the columns recip, recipm1, c_x, c_0, c_1, c_2, c_3, sigma, low, high, guided_x_start, guided_x. Of a
         network that predicts the variance, as a share of its log between low and high ("range") or as its log itself
         ("learned"), sigma multiplies its root, and guided_x multiplies it.
         → x_next, x_0 [B, C, H, W] float32, and the next input [B, 8, H, W] in the compute dtype, channels-last.
Traffic  output, x, h_i, gradient once; results once; noise once if given, else computed here from counters.
Source   Ho et al. 2020, algorithm 2; Song et al. 2020 (DDIM), eq. 12; Lu et al. 2022 (DPM-Solver++); Zhao et al. 2023;
         Dhariwal & Nichol 2021, algorithms 1 and 2 (the gradient).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import Work, channels_last, empty_map, kernel_op, launcher
from fastdiff.kernels.noise import UNALIGNED
from fastdiff.kernels.pixels import (
    QUADS,
    check_coefficients,
    load_noise,
    noise_args,
    noise_strides,
    store_padded,
    strides,
)
from fastdiff.kernels.reference import CounterNoise
from torch import Tensor

COLUMNS = 12
MAX_HISTORY = 3
VARIANCES = ("fixed", "range", "learned")
MAX_CHANNELS = 4


@triton.jit
def _one_channel(
    out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, p_coef, next_ptr, pred_ptr,
    seed, i_b, i_c: tl.constexpr, o_p, m, HW, x_channel, x_pixel, n_channel, n_pixel,
    C: tl.constexpr, OUT: tl.constexpr, EPSILON: tl.constexpr, CLIP: tl.constexpr, VARIANCE: tl.constexpr,
    NOISY: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores x_next and x_0 of one channel and returns x_next [Q, 4]; zeros beyond C."""
    if i_c >= C:
        return tl.zeros((Q, 4), tl.float32)
    else:
        p_out = out_ptr + (i_b * HW + o_p) * OUT + i_c
        o_x = i_b * HW * C + i_c * x_channel + o_p * x_pixel
        o_next = (i_b * HW + o_p) * C + i_c
        b_x = tl.load(x_ptr + o_x, mask=m, other=0.0)
        b_pred = tl.load(p_out, mask=m, other=0.0).to(tl.float32)
        if EPSILON:
            b_pred = tl.load(p_coef) * b_x - tl.load(p_coef + 1) * b_pred
        if CLIP:  # nan stays nan, as torch.clamp has it
            b_pred = tl.clamp(b_pred, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        if grad_ptr is not None:
            b_grad = tl.load(grad_ptr + o_next, mask=m, other=0.0)
            b_pred += tl.load(p_coef + 10) * b_grad
        b_next = tl.load(p_coef + 2) * b_x + tl.load(p_coef + 3) * b_pred
        if h1_ptr is not None:
            b_next += tl.load(p_coef + 4) * tl.load(h1_ptr + o_next, mask=m, other=0.0)
        if h2_ptr is not None:
            b_next += tl.load(p_coef + 5) * tl.load(h2_ptr + o_next, mask=m, other=0.0)
        if h3_ptr is not None:
            b_next += tl.load(p_coef + 6) * tl.load(h3_ptr + o_next, mask=m, other=0.0)
        if VARIANCE != 0:
            b_lv = tl.load(p_out + C, mask=m, other=0.0).to(tl.float32)
            if VARIANCE == 1:
                b_share = (b_lv + 1.0) / 2.0
                b_lv = b_share * tl.load(p_coef + 9) + (1.0 - b_share) * tl.load(p_coef + 8)
        if NOISY:
            b_noise = load_noise(
                noise_ptr, index_ptr, draw_ptr, seed, i_b, i_c, o_p, m, C, HW, n_channel, n_pixel, Q, ALIGNED
            )
            b_sigma = tl.load(p_coef + 7)
            if VARIANCE != 0:
                b_next += b_sigma * tl.exp(0.5 * b_lv) * b_noise
            else:
                b_next += b_sigma * b_noise
        if grad_ptr is not None:
            b_pull = tl.load(p_coef + 11)
            if VARIANCE != 0:
                b_next += b_pull * tl.exp(b_lv) * b_grad
            else:
                b_next += b_pull * b_grad
        tl.store(next_ptr + o_next, b_next, mask=m)
        tl.store(pred_ptr + o_next, b_pred, mask=m)
        return b_next


@triton.jit(do_not_specialize=UNALIGNED)
def _sampler_step(
    out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, coef_ptr, next_ptr, pred_ptr,
    input_ptr, seed, HW, x_channel, x_pixel, n_channel, n_pixel, coef_stride,
    C: tl.constexpr, OUT: tl.constexpr, PAD: tl.constexpr, EPSILON: tl.constexpr, CLIP: tl.constexpr,
    VARIANCE: tl.constexpr, NOISY: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_p = (tl.program_id(1) * Q + tl.arange(0, Q))[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = o_p < HW
    p_coef = coef_ptr + i_b * coef_stride
    v0 = _one_channel(out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, p_coef,
                      next_ptr, pred_ptr, seed, i_b, 0, o_p, m, HW, x_channel, x_pixel, n_channel, n_pixel,
                      C, OUT, EPSILON, CLIP, VARIANCE, NOISY, Q, ALIGNED)  # fmt: skip
    v1 = _one_channel(out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, p_coef,
                      next_ptr, pred_ptr, seed, i_b, 1, o_p, m, HW, x_channel, x_pixel, n_channel, n_pixel,
                      C, OUT, EPSILON, CLIP, VARIANCE, NOISY, Q, ALIGNED)  # fmt: skip
    v2 = _one_channel(out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, p_coef,
                      next_ptr, pred_ptr, seed, i_b, 2, o_p, m, HW, x_channel, x_pixel, n_channel, n_pixel,
                      C, OUT, EPSILON, CLIP, VARIANCE, NOISY, Q, ALIGNED)  # fmt: skip
    v3 = _one_channel(out_ptr, x_ptr, grad_ptr, h1_ptr, h2_ptr, h3_ptr, noise_ptr, index_ptr, draw_ptr, p_coef,
                      next_ptr, pred_ptr, seed, i_b, 3, o_p, m, HW, x_channel, x_pixel, n_channel, n_pixel,
                      C, OUT, EPSILON, CLIP, VARIANCE, NOISY, Q, ALIGNED)  # fmt: skip
    if input_ptr is not None:
        store_padded(input_ptr, i_b, o_p, m, HW, v0, v1, v2, v3, PAD)


WORK = {"_sampler_step": lambda launch: Work(elements=launch.grid[0] * launch.named()["C"] * launch.named()["HW"])}


@kernel_op("sampler_step")
def _op(
    output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    gradient: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seed: int,
    index: Tensor | None,
    draw: Tensor | None,
    epsilon: bool,
    clip: bool,
    variance: str,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    output = channels_last(output, "sampler_step", "output")
    earlier = [channels_last(h, "sampler_step", "an earlier prediction") for h in history]
    gradient = gradient if gradient is None else channels_last(gradient, "sampler_step", "gradient")
    x_next, pred, network_input = _empty(x, input_dtype)
    if not x.numel():
        return x_next, pred, network_input
    x, x_channel, x_pixel = strides(x)
    noise, n_channel, n_pixel = noise_strides(noise)
    run = launcher(
        _sampler_step,
        (B, triton.cdiv(H * W, 4 * QUADS)),
        *(seed, H * W, x_channel, x_pixel, n_channel, n_pixel, coefficients.stride(0)),
        C=C,
        OUT=output.shape[1],
        PAD=8,
        EPSILON=epsilon,
        CLIP=clip,
        VARIANCE=VARIANCES.index(variance),
        NOISY=noise is not None or index is not None,
        Q=QUADS,
        ALIGNED=H * W % 4 == 0,
    )
    absent = [None] * (MAX_HISTORY - len(earlier))
    written = (x_next, pred, None if input_dtype is None else network_input)
    run(output, x, gradient, *earlier, *absent, noise, index, draw, coefficients, *written)
    return x_next, pred, network_input


def _empty(x: Tensor, input_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    network_input = x.new_empty(0) if input_dtype is None else empty_map(B, 8, H, W, x, input_dtype)
    return empty_map(B, C, H, W, x), empty_map(B, C, H, W, x), network_input


@_op.register_fake
def _(output, x, *others):
    return _empty(x, input_dtype=others[-1])


_op.register_no_derivative()


def sampler_step(
    output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | CounterNoise | None,
    *,
    gradient: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    epsilon: bool = True,
    clip: bool = True,
    variance: str = "fixed",
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x_next, x_0, next network input [B, 8, H, W] in input_dtype or None); see the head of the file.

    noise     [B, C, H, W] float32, or its counters, or None for a step without.
    gradient  [B, C, H, W] float32 of a classifier's log probability by x, or None.
    variance  the meaning of the second half of output: none ("fixed"; it may be absent), a share between the log
              variances low and high ("range"), or the log variance itself ("learned").
    Raises ValueError for shapes and dtypes that don't fit; a channels-first output is copied, with a warning.
    """
    if x.dim() != 4 or x.dtype != torch.float32:
        raise ValueError(f"sampler_step needs x [B, C, H, W] float32; got {tuple(x.shape)} {x.dtype}: use .float()")
    B, C, H, W = x.shape
    if C > MAX_CHANNELS:
        raise ValueError(f"sampler_step takes at most {MAX_CHANNELS} channels; got {C}: use the reference")
    if variance not in VARIANCES:
        raise ValueError(f"sampler_step knows variance {', '.join(VARIANCES)}; got {variance!r}")
    widths = (C, 2 * C) if variance == "fixed" else (2 * C,)
    if output.dim() != 4 or output.shape[1] not in widths or (output.shape[0], *output.shape[2:]) != (B, H, W):
        raise ValueError(
            f"sampler_step needs output {(B, widths[-1], H, W)} for x {tuple(x.shape)} and variance {variance}; got "
            f"{tuple(output.shape)}: learn_sigma of the model and variance must agree"
        )
    if len(history) > MAX_HISTORY or any(h.shape != x.shape or h.dtype != torch.float32 for h in history):
        raise ValueError(f"sampler_step takes up to {MAX_HISTORY} earlier predictions {tuple(x.shape)} float32")
    if gradient is not None and (gradient.shape != x.shape or gradient.dtype != torch.float32):
        raise ValueError(
            f"sampler_step needs gradient {tuple(x.shape)} float32; got {tuple(gradient.shape)} {gradient.dtype}"
        )
    check_coefficients(coefficients, B, COLUMNS, "sampler_step")
    given, seed, index, draw = noise_args(noise, x.shape, "sampler_step")
    x_next, pred, network_input = _op(
        output, x, coefficients, gradient, list(history), given, seed, index, draw, epsilon, clip, variance, input_dtype
    )
    return x_next, pred, None if input_dtype is None else network_input
