"""The definitions of the diffusion ops, in plain torch: noising, every loss, the samplers' steps.

Per-image coefficients are rows of [B, columns] float32; x_start is float32 [B, C, H, W] in [-1, 1], or the bytes
[B, H, W, C] of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_COLUMNS = (
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_log_variance_clipped",
    "log_variance",  # the fixed one, or the upper end of the learned range
    "mse_weight",
    "is_first",  # 1 at t = 0
)
"""Columns of diffusion_loss's coefficients."""
STEP_COLUMNS = (
    *("recip", "recipm1", "x", "x_start", "earlier1", "earlier2", "earlier3", "sigma", "low", "high"),
    *("guided_x_start", "guided_x"),
)
"""Columns of sampler_step's coefficients."""


def _wide(coefficient: Tensor) -> Tensor:
    return coefficient[:, None, None, None]


def at_least_float(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def start_map(x_start: Tensor) -> Tensor:
    """x_start as float [B, C, H, W] in [-1, 1]: bytes [B, H, W, C] become a channels-last map."""
    if x_start.dtype != torch.uint8:
        return x_start
    return (x_start.float() / 127.5 - 1).permute(0, 3, 1, 2)


def _mirrored(x: Tensor, flip: Tensor | None) -> Tensor:
    return x if flip is None else torch.where(_wide(flip), x.flip(3), x)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels: int | None = None,
) -> Tensor:
    """x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)  (Ho et al. 2020, eq. 4), [B, channels, H, W].

    coefficients  [B, 2]: sqrt(abar_t), sqrt(1 - abar_t).
    flip          [B] bool: images mirrored left to right before the noise is added.
    channels      more than C: the others are zero.
    """
    x_start = _mirrored(start_map(x_start), flip)
    x_t = _wide(coefficients[:, 0]) * x_start + _wide(coefficients[:, 1]) * noise
    x_t = x_t.to(dtype or x_t.dtype)
    return x_t if channels is None else F.pad(x_t, (0, 0, 0, 0, 0, channels - x_t.shape[1]))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, elementwise; the second may be plain numbers."""
    mean2, logvar2 = (torch.as_tensor(v, dtype=mean1.dtype, device=mean1.device) for v in (mean2, logvar2))
    return 0.5 * (
        logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2).square() * torch.exp(-logvar2)
    )


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's cumulative distribution (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability (nats) of 8-bit x in [-1, 1] under a Gaussian cut into 256 bins (Ho et al. 2020, eq. 13)."""
    centered = x - means
    inv_std = torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_minus = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    inside = (cdf_plus - cdf_minus).clamp(min=1e-12).log()
    low_end = cdf_plus.clamp(min=1e-12).log()
    high_end = (1.0 - cdf_minus).clamp(min=1e-12).log()
    return torch.where(x < -0.999, low_end, torch.where(x > 0.999, high_end, inside))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return x.flatten(1).mean(dim=1)


def vb_terms_bpd(
    x_start: Tensor,
    true_mean: Tensor,
    true_log_variance: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    is_first: Tensor,
) -> Tensor:
    """A term of the variational bound in bits per dimension, [B] (Nichol & Dhariwal 2021, eq. 4-7).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) where is_first [B] is false, -log p(x_0 | x_1) where it is true.
    """
    kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2.0)
    nll = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
    return torch.where(is_first, mean_flat(nll) / math.log(2.0), kl)


def log_variance(values: Tensor | None, variance: str, low: Tensor, high: Tensor, like: Tensor) -> Tensor:
    """The log variance from the second half of a network's output, or the fixed one; low, high [B, 1, 1, 1]."""
    if variance == "fixed":
        return high.expand_as(like)
    assert values is not None
    if variance == "learned":
        return values
    share = (values + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
    return share * high + (1 - share) * low


def diffusion_loss(
    output: Tensor,
    x_start: Tensor,
    coefficients: Tensor,
    noise: Tensor,
    *,
    epsilon: bool = True,
    variance: str = "fixed",
    kl: bool = False,
    vb_scale: float = 1.0,
    flip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mse, vb), each [B] float32; only loss carries a gradient.

    output        [B, C or 2C, H, W]: a prediction of the noise (epsilon) or of x_0, then the values for the variance.
    coefficients  [B, 10], columns LOSS_COLUMNS.
    variance      "fixed", "range" (a share between the two log variances), "learned" (a log variance).
    kl            loss = vb * vb_scale, the bound in bits per dimension (mse is then 0). Otherwise loss =
                  mse_weight * mse, and with a variance that is learned + vb * vb_scale, in which the mean carries no
                  gradient (Nichol & Dhariwal 2021, eq. 16).
    """
    x_start = _mirrored(start_map(x_start), flip)
    a, s, recip, recipm1, c1, c2, low, high = (_wide(column) for column in coefficients[:, :8].unbind(1))
    output = at_least_float(output)
    output, values = output.chunk(2, dim=1) if variance != "fixed" else (output, None)
    mse = torch.zeros_like(coefficients[:, 0]) if kl else mean_flat(((noise if epsilon else x_start) - output).square())
    vb = torch.zeros_like(mse)
    if kl or variance != "fixed":
        x_t = a * x_start + s * noise
        prediction = output if kl else output.detach()
        pred_xstart = recip * x_t - recipm1 * prediction if epsilon else prediction
        vb = vb_scale * vb_terms_bpd(
            x_start,
            c1 * x_start + c2 * x_t,
            low,
            c1 * pred_xstart + c2 * x_t,
            log_variance(values, variance, low, high, x_t),
            coefficients[:, 9] > 0,
        )
    loss = vb if kl else coefficients[:, 8] * mse + vb
    return loss, mse.detach(), vb.detach()


def sampler_step(
    output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    *,
    gradient: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    epsilon: bool = True,
    clip: bool = True,
    variance: str = "fixed",
) -> tuple[Tensor, Tensor]:
    """(x_next, pred_xstart) from the network's output [B, C or 2C, H, W] at x [B, C, H, W] float32.

    x_next = c_x x + c_0 x_0 + sum of c_i history_i + sigma std noise, where x_0 = recip x - recipm1 output (epsilon) or
    the output, clipped to [-1, 1] with `clip`, and std is 1 ("fixed") or exp(log variance / 2) of the network's.
    coefficients  [B, 12], columns STEP_COLUMNS. history: up to 3 earlier predictions of x_0.
    gradient      [B, C, H, W] of a classifier's log probability by x: adds guided_x_start gradient to x_0 after the
                  clipping, and guided_x std^2 gradient to x_next (Dhariwal & Nichol 2021, algorithms 2 and 1).
    """
    column = dict(zip(STEP_COLUMNS, (_wide(column) for column in coefficients.unbind(1)), strict=True))
    C = x.shape[1]
    output = at_least_float(output)
    output, values = output[:, :C], output[:, C:] if variance != "fixed" else None
    pred_xstart = column["recip"] * x - column["recipm1"] * output if epsilon else output
    if clip:
        pred_xstart = pred_xstart.clamp(-1, 1)
    if gradient is not None:
        pred_xstart = pred_xstart + column["guided_x_start"] * gradient
    x_next = column["x"] * x + column["x_start"] * pred_xstart
    for i, earlier in enumerate(history):
        x_next = x_next + column[f"earlier{i + 1}"] * earlier
    sigma, shift = column["sigma"], column["guided_x"]
    if values is not None:
        values = log_variance(values, variance, column["low"], column["high"], x)
        sigma, shift = sigma * torch.exp(0.5 * values), shift * torch.exp(values)
    if noise is not None:
        x_next = x_next + sigma * noise
    if gradient is not None:
        x_next = x_next + shift * gradient
    return x_next, pred_xstart


def timesteps_at(uniform: Tensor, edges: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [B] int64 and their importance weights [B] float32, for uniform [B] float64 in (0, 1).

    edges       [T] int64: cumulative probabilities of the timesteps, as multiples of the last of them.
    importance  [T] float32: the weight of each timestep.
    """
    target = (uniform.double() * edges[-1]).long()
    t = torch.searchsorted(edges, target, right=True).clamp(max=len(edges) - 1)
    return t, importance[t]


def add_losses_(sums: Tensor, losses: Sequence[Tensor], t: Tensor, weights: Tensor, num_timesteps: int) -> None:
    """Add the weighted losses of a micro-batch to sums by quartile of the timestep, in place.

    sums     [3, 5, 3] float64: kind of loss; quartiles 0 to 3, and all; sum, count, and number of values left out
             because they are not finite.
    losses   one to three kinds, [B] float32 each.
    t        [B] int64 below num_timesteps.
    weights  [B] float32.
    """
    values = (torch.stack([each.detach() for each in losses]) * weights).double()
    finite = values.isfinite()
    counted = torch.stack([values.where(finite, 0.0), finite, ~finite], dim=2)  # [kind, B, 3]
    rows = torch.arange(5, device=t.device)[:, None]
    member = (4 * t // num_timesteps == rows) | (rows == 4)  # [5, B]
    sums[: len(losses)] += (counted[:, None] * member[:, :, None]).sum(dim=2)
