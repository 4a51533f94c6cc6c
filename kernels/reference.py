"""The definition of every op, in plain torch: what a faster implementation must reproduce, and what runs without one.

B batch, C channels, H, W pixels, L = H * W, N heads, D head size, T diffusion steps. Maps are [B, C, H, W] in any
memory format; channels-last is kept where it is given.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """dropout(silu(group_norm(cat(x, skip)) * (1 + scale) + shift)), in float32, returned in x's dtype.

    x, skip       [B, C1, H, W], [B, C2, H, W]; the norm sees C = C1 + C2 channels.
    weight, bias  [C].  scale, shift [B, C], the adaptive norm of Nichol & Dhariwal 2021, appendix A.
    dropout       probability that an element is zeroed (the rest grows by 1 / (1 - p)); 0 switches it off.
    """
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    h = F.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
    if silu:
        h = F.silu(h)
    if dropout > 0:
        h = F.dropout(h, dropout)
    return h.to(x.dtype)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention over packed heads: [B, L, 3C] → [B, L, C].

    The last axis is [head][q, k, v][channel]. q and k are each scaled by D^-1/4, which keeps fp16 products in range;
    the softmax is float32.
    """
    B, L, width = qkv.shape
    D = width // (3 * num_heads)
    q, k, v = qkv.view(B, L, num_heads, 3, D).permute(3, 0, 2, 1, 4).unbind(0)  # [B, N, L, D] each
    weight = (q * D**-0.25) @ (k * D**-0.25).transpose(-1, -2)
    weight = weight.float().softmax(dim=-1).to(v.dtype)
    return (weight @ v).transpose(1, 2).reshape(B, L, width // 3)


def skip_conv1x1(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of cat(x, skip): [B, C1, H, W], [B, C2, H, W] → [B, C_out, H, W]; weight [C_out, C1+C2, 1, 1]."""
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    return F.conv2d(x, weight, bias)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution: [B, C, H, W] → [B, C_out, 2H, 2W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


# Noise from a counter: philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words for each 128-bit counter (c0, c1, c2, c3), as int64 tensors in [0, 2^32)."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B  # wraps past 2^63; the low 64 bits are the product's all the same
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _counters(index: Tensor, draw: int, words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counters of `words` philox calls for each image: (call, draw, index low, index high), broadcast to [B, words]."""
    call = torch.arange(words, device=index.device)[None, :]
    index = index.long()[:, None]
    shape = (index.shape[0], words)
    return (
        call.expand(shape),
        torch.full_like(call, draw).expand(shape),
        (index & _MASK).expand(shape),
        ((index >> 32) & _MASK).expand(shape),
    )


def image_noise(seed: int, index: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise [B, *shape] that depends on (seed, index[b], draw) alone.

    index  [B] int64, which image of the job or of the training stream.
    draw   which of the image's noises: a sampling step, say.
    Element 4k..4k+3 of an image (in C, H, W order) come from one philox call by the Box-Muller transform.
    """
    count = math.prod(shape)
    words = philox(seed, *_counters(index, draw, -(-count // 4)))
    u = [(word.double() + 0.5) * 2.0**-32 for word in words]  # in (0, 1), so that the log is finite
    radius = [(-2 * u[i].log()).sqrt() for i in (0, 2)]
    angle = [2 * math.pi * u[i] for i in (1, 3)]
    normal = torch.stack(
        [
            radius[0] * angle[0].cos(),
            radius[0] * angle[0].sin(),
            radius[1] * angle[1].cos(),
            radius[1] * angle[1].sin(),
        ],
        dim=-1,
    )
    return normal.float().flatten(1)[:, :count].reshape(-1, *shape)


def image_uniform(seed: int, index: Tensor, draw: int) -> Tensor:
    """One uniform float64 in (0, 1) per image, [B], that depends on (seed, index[b], draw) alone."""
    word = philox(seed, *_counters(index, draw, 1))[0]
    return (word[:, 0].double() + 0.5) * 2.0**-32


# Diffusion maths. Coefficients are [B] float32, one per image; `_wide` lays them over [B, C, H, W].


def _wide(coefficient: Tensor) -> Tensor:
    return coefficient[:, None, None, None]


def q_sample(
    x_start: Tensor, noise: Tensor, sqrt_alphas_cumprod: Tensor, sqrt_one_minus_alphas_cumprod: Tensor
) -> Tensor:
    """x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)  (Ho et al. 2020, eq. 4). Coefficients [B]."""
    return _wide(sqrt_alphas_cumprod) * x_start + _wide(sqrt_one_minus_alphas_cumprod) * noise


def update_ema(averages: list[Tensor], sources: list[Tensor], rate: float) -> None:
    """average = rate * average + (1 - rate) * source, in place, for every pair (float32)."""
    torch._foreach_mul_(averages, rate)
    torch._foreach_add_(averages, sources, alpha=1 - rate)


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


def ddpm_step(mean: Tensor, log_variance: Tensor, noise: Tensor, not_first: Tensor) -> Tensor:
    """x_{t-1} = mean + not_first * exp(log_variance / 2) * noise. not_first [B] float is 0 at t = 0."""
    return mean + _wide(not_first) * torch.exp(0.5 * log_variance) * noise


def ddim_step(
    x: Tensor,
    pred_xstart: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    alphas_cumprod_prev: Tensor,
    sqrt_recip_alphas_cumprod: Tensor,
    sqrt_recipm1_alphas_cumprod: Tensor,
    not_first: Tensor,
    eta: float,
) -> Tensor:
    """x_{t-1} from x_t and the predicted x_0 (Song et al. 2020, DDIM, eq. 12 and 16). Coefficients [B]."""
    eps = (_wide(sqrt_recip_alphas_cumprod) * x - pred_xstart) / _wide(sqrt_recipm1_alphas_cumprod)
    a_t, a_prev = _wide(alphas_cumprod), _wide(alphas_cumprod_prev)
    sigma = eta * torch.sqrt((1 - a_prev) / (1 - a_t)) * torch.sqrt(1 - a_t / a_prev)
    mean = pred_xstart * torch.sqrt(a_prev) + torch.sqrt(1 - a_prev - sigma**2) * eps
    return mean + _wide(not_first) * sigma * noise
