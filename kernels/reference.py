"""The definition of every op, in plain torch: what a faster implementation must reproduce, and what runs without one.

B batch, C channels, H, W pixels, L = H * W, N heads, D head size, T diffusion steps. Maps are [B, C, H, W] in any
memory format; channels-last is kept where it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    offset: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """dropout(silu(group_norm(cat(x, skip) + offset) * (1 + scale) + shift)), in float32, returned in x's dtype.

    x, skip       [B, C1, H, W], [B, C2, H, W]; the norm sees C = C1 + C2 channels.
    weight, bias  [C].  scale, shift [B, C], the adaptive norm of Nichol & Dhariwal 2021, appendix A.
    offset        [B, C] or [C], added before the norm: the bias of the convolution that made x, say.
    dropout       probability that an element is zeroed (the rest grows by 1 / (1 - p)); 0 switches it off.
    """
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    h = x.float() if x.dtype != torch.float64 else x
    if offset is not None:
        h = h + offset.view(-1, x.shape[1], 1, 1)
    h = F.group_norm(h, num_groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
    if silu:
        h = F.silu(h)
    if dropout > 0:
        h = F.dropout(h, dropout)
    return h.to(x.dtype)


def residual_sum(a: Tensor, b: Tensor | None, b_bias: Tensor | None = None) -> Tensor:
    """a + b + b_bias, [B, C, H, W] twice and [C], in float32, rounded once to a's dtype; b or b_bias may be None."""
    if b_bias is not None:
        wide = torch.promote_types(a.dtype, torch.float32)
        bias = b_bias.to(wide)[:, None, None]
        b = bias if b is None else b.to(wide) + bias
    assert b is not None
    return (a + b).to(a.dtype)


def add_group_norm_silu(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, *, b_bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm that follows it: (total, group_norm_silu(total, …)).

    a, b    [B, C1, H, W], of one dtype, which is also that of total and of the norm's result.
    b_bias  [C1], the bias that the convolution which made b left out. total = a + b + b_bias. Without b it is the bias
            that the convolution which made a left out.
    The rest is `group_norm_silu`'s, with total as x.
    """
    total = residual_sum(a, b, b_bias)
    return total, group_norm_silu(total, weight, bias, **options)


def output_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    *,
    second: Tensor | None = None,
    second_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The network's last layer in float32: 3x3 convolution of silu(group_norm(x + second + second_bias)).

    x, second    [B, C, H, W] in any dtype, to which their sum is rounded; second_bias [C].
    weight, bias [C], of the norm, which has 32 groups. conv_weight [O, C, 3, 3], conv_bias [O].
    Returns [B, O, H, W] float32 (float64 for float64).
    """
    if second is not None:
        x = residual_sum(x, second, second_bias)
    y = group_norm_silu(x.to(torch.promote_types(x.dtype, torch.float32)), weight, bias, eps=eps)
    return F.conv2d(y, conv_weight.to(y.dtype), conv_bias.to(y.dtype), padding=1)


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
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))


def norm_and_shortcut(
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    *,
    b: Tensor | None = None,
    b_bias: Tensor | None = None,
    skip: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What enters a residual block whose shortcut is a 1x1 convolution: (x, its norm with SiLU, the shortcut).

    x is a, or with b or b_bias the sum of `add_group_norm_silu`. conv_weight [C_out, C1 + C2]; the convolution of
    cat(x, skip) has no bias. The options are num_groups and eps.
    """
    x = a if b is None and b_bias is None else residual_sum(a, b, b_bias)
    seen = x if skip is None else torch.cat([x, skip], dim=1)
    y = group_norm_silu(x, weight, bias, skip=skip, **options)
    return x, y, F.conv2d(seen, conv_weight.to(seen.dtype)[:, :, None, None])


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution: [B, C, H, W] → [B, C_out, 2H, 2W]."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)


# Noise from a counter: philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words for each 128-bit counter (c0, c1, c2, c3), as int64 tensors in [0, 2^32)."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B  # wraps past 2^63; the low 64 bits are the product's all the same
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _counters(index: Tensor, draw: int | Tensor, words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counters of `words` philox calls for each image: (call, draw, index low, index high), broadcast to [B, words]."""
    call = torch.arange(words, device=index.device)[None, :]
    if not isinstance(draw, Tensor):  # filled in on the device: a copy from the host would be refused in a CUDA graph
        draw = torch.full((1,), draw, device=index.device)
    index = index.long()[:, None]
    shape = (index.shape[0], words)
    return (
        call.expand(shape),
        (draw & _MASK).view(-1, 1).expand(shape),
        (index & _MASK).expand(shape),
        ((index >> 32) & _MASK).expand(shape),
    )


def image_noise(seed: int, index: Tensor, draw: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise [B, *shape] that depends on (seed, index[b], draw) alone.

    index  [B] int64, number of the image in the job, or its position in training.
    draw   number of the noise among those of its image, such as the sampling step; one for all, or [B] int64.
    Elements 4k .. 4k + 3 of an image (in C, H, W order) come from one philox call by the Box-Muller transform.
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
    return normal.float().flatten(1)[:, :count].reshape(-1, *shape).contiguous()


@dataclass(frozen=True, eq=False)
class CounterNoise:
    """The arguments of `image_noise` in place of its result [B, *shape]: ops compute the noise where they use it.

    index [B] int64; draw [B] int64, or None for the first.
    """

    seed: int
    index: Tensor
    shape: tuple[int, ...]
    draw: Tensor | None = None


def image_uniform(seed: int, index: Tensor, draw: int) -> Tensor:
    """One uniform float64 in (0, 1) per image, [B], that depends on (seed, index[b], draw) alone."""
    word = philox(seed, *_counters(index, draw, 1))[0]
    return (word[:, 0].double() + 0.5) * 2.0**-32


def update_ema(averages: list[Tensor], sources: list[Tensor], rate: float) -> None:
    """average = rate * average + (1 - rate) * source, in place, for every pair (float32)."""
    # The average moves towards the source: rounded, rate and 1 - rate don't add up to 1, and it would drift by 2e-4.
    torch._foreach_lerp_(averages, sources, 1 - rate)


def grad_scale_and_overflow(
    squared_norm: Tensor, loss_scale: Tensor | float = 1.0, max_norm: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(grad_scale, found_inf) for adamw_ema_, from squared_norm of gradients that still carry the loss scale.

    max_norm  greatest norm of the gradients without the scale; 0: no limit.
    """
    norm = squared_norm.sqrt() / loss_scale
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return clip / loss_scale, (~torch.isfinite(squared_norm)).float()
