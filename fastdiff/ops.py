"""The ops that models and diffusion call, and the one place that chooses how each is computed.

Each name here has its definition, shapes and sources in `kernels/reference.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import group_norm_silu_eager, reference
from fastdiff.kernels.reference import (
    ddim_step,
    ddpm_step,
    discretized_gaussian_log_likelihood,
    image_noise,
    image_uniform,
    mean_flat,
    normal_kl,
    q_sample,
    skip_conv1x1,
    update_ema,
    upsample_conv,
    vb_terms_bpd,
)

__all__ = [
    "attention",
    "ddim_step",
    "ddpm_step",
    "discretized_gaussian_log_likelihood",
    "group_norm_silu",
    "image_noise",
    "image_uniform",
    "mean_flat",
    "normal_kl",
    "q_sample",
    "skip_conv1x1",
    "update_ema",
    "upsample_conv",
    "vb_terms_bpd",
]


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
    """Group norm and what follows it, [B, C, H, W] → the same; see `reference.group_norm_silu`.

    On a CPU in eager mode the version with fewer passes; torch.compile fuses the definition itself.
    """
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    chosen = group_norm_silu_eager.group_norm_silu if eager else reference.group_norm_silu
    return chosen(
        x,
        weight,
        bias,
        num_groups=num_groups,
        eps=eps,
        scale=scale,
        shift=shift,
        skip=skip,
        silu=silu,
        dropout=dropout,
    )


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention over packed heads, [B, L, 3C] → [B, L, C]; see `reference.attention`.

    torch's fused attention where it keeps float32 softmax and never stores the score matrix.
    """
    B, L, width = qkv.shape
    D = width // (3 * num_heads)
    if D > 256 and qkv.is_cuda:  # beyond what the fused kernels take
        return reference.attention(qkv, num_heads)
    q, k, v = qkv.view(B, L, num_heads, 3, D).permute(3, 0, 2, 1, 4).unbind(0)  # [B, N, L, D] each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, width // 3)
