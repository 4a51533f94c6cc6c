"""The classifier of noised images of "Diffusion Models Beat GANs on Image Synthesis" (https://arxiv.org/abs/2105.05233).

It is the half of a UNet, whose maps one of four heads turns into logits. Parameter names are guided-diffusion's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.blocks import Conv2d, GroupNorm, Linear, Map, PointwiseConv, QKVConv, value, zeroed
from fastdiff.models.classifier_settings import HEAD_CHANNELS, ClassifierSettings, NetworkSettings
from fastdiff.models.encoder import Encoder
from fastdiff.models.unet import UNet, build_model

_HIDDEN = 2048  # units of the hidden layer of the spatial heads


class AttentionPool(nn.Module):
    """Self-attention over a map's pixels and their mean, for the query of the mean (CLIP: Radford et al. 2021).

    forward: map [B, C, H, W] → [B, out_features]. tokens = 1 + H * W.
    """

    def __init__(self, channels: int, tokens: int, out_features: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens) / channels**0.5)
        self.qkv_proj = QKVConv(channels, channels // HEAD_CHANNELS, grouped=True)
        self.c_proj = PointwiseConv(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # [B, L, C]
        tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], 1) + self.positional_embedding.t().to(x.dtype)
        return self.c_proj(ops.attention(self.qkv_proj(tokens), self.qkv_proj.num_heads)[:, 0])


class _Mean(torch.autograd.Function):
    """The mean of a map over its pixels, [B, C, H, W] → [B, C] float32, whose gradient is laid out as the map is.

    That of torch's mean is expanded, which a convolution or a norm would copy, in 16 bits even in another layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, ctx.layout = x.shape, x.dtype, ops.map_layout(x)
        return x.mean((2, 3), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        share = (grad / ctx.shape[2:].numel()).to(ctx.dtype)
        return share[:, :, None, None].expand(ctx.shape).contiguous(memory_format=ctx.layout)


def _mean(x: Tensor) -> Tensor:
    return _Mean.apply(x)  # type: ignore[no-untyped-call]


class _MeanPool(nn.Module):
    """`_Mean` as a map, [B, C, H, W] → [B, C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return _mean(x)[:, :, None, None]


class _VectorNorm(GroupNorm):
    """A group norm and SiLU of vectors, [B, C] → [B, C]."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, :, None, None]).flatten(1)


class Classifier(Encoder):
    """Classifies noised images.

    forward: x [B, in_channels, H, W] float32, timesteps [B] int64 or float32 → logits [B, num_classes] float32. The
    head computes in float32, whatever the dtype of the body.
    """

    def __init__(self, settings: ClassifierSettings) -> None:
        super().__init__(settings.backbone)
        self.settings = settings
        self.out = nn.Sequential(*_head(settings, self.backbone.level_channels[-1], sum(self.input_widths)))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.body(x, self.project(self.embed(timesteps, None)))

    def body(self, x: Tensor, projected: Sequence[Tensor]) -> Tensor:
        """The network after `project`, whose result is an argument so that samplers can compute it in advance."""
        return self.head(self.run_stages([*self.input_blocks, self.middle_block], self.start_map(x), iter(projected)))

    def head(self, maps: Sequence[Map]) -> Tensor:
        """The logits, from the outputs of the input blocks and the middle block."""
        if self.settings.classifier_pool in ("attention", "adaptive"):
            return self.out(value(maps[-1]).float()).flatten(1)
        return self.out(torch.cat([_mean(value(h)) for h in maps], 1))


def _head(settings: ClassifierSettings, channels: int, widths: int) -> list[nn.Module]:
    """The layers that compute logits from the last map of `channels`, or from the means of all maps before the middle
    block, which have `widths` channels together, and of the last."""
    classes = settings.num_classes
    if settings.classifier_pool == "attention":
        H, W = (side >> len(settings.backbone.level_mult) - 1 for side in settings.size_hw)
        return [GroupNorm(channels), nn.Identity(), AttentionPool(channels, 1 + H * W, classes)]
    if settings.classifier_pool == "adaptive":
        return [GroupNorm(channels), nn.Identity(), _MeanPool(), zeroed(Conv2d(channels, classes, 1))]
    between = [nn.ReLU()] if settings.classifier_pool == "spatial" else [_VectorNorm(_HIDDEN), nn.Identity()]
    return [Linear(widths + channels, _HIDDEN), *between, Linear(_HIDDEN, classes)]


def build_classifier(settings: ClassifierSettings) -> Classifier:
    """Build the classifier that the settings describe."""
    return Classifier(settings)


def build_network(settings: NetworkSettings) -> UNet | Classifier:
    """Build the network that the settings describe, of either kind."""
    return Classifier(settings) if isinstance(settings, ClassifierSettings) else build_model(settings)
