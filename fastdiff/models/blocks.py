"""The parts of the UNet. Weights follow the dtype of what comes in, so one module serves every precision.

Parameter names are improved-diffusion's, which is why norms and convolutions sit in `nn.Sequential`s whose other
places (SiLU, dropout) hold no weights: `group_norm_silu` does those steps in one op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops


class Conv2d(nn.Conv2d):
    """A convolution that runs in the dtype of its input."""

    bias: nn.Parameter  # always there, unlike in torch's own

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, ops.conv_weight(self.weight, x), self.bias.to(x.dtype))

    def packed(self, dtype: torch.dtype) -> Tensor:
        """The weight as `ops.norm_conv3x3` reads it, packed once for each dtype and state of the weight."""
        key = (dtype, self.weight._version, self.weight.data_ptr())
        if getattr(self, "_packed_key", None) != key:
            self._packed_key, self._packed = key, ops.pack_conv3x3(self.weight.detach(), dtype)
        return self._packed

    def without_bias(self, x: Tensor) -> Tensor:
        """For a norm that takes the bias: that saves an addition, and a reduction for its gradient."""
        return self._conv_forward(x, ops.conv_weight(self.weight, x), None)


class InputConv(Conv2d):
    """The first convolution; it also takes maps padded to 8 channels with zeros (see `UNet.input_format`)."""

    def forward(self, x: Tensor) -> Tensor:
        weight, missing = self.weight, x.shape[1] - self.weight.shape[1]
        if missing > 0:
            weight = F.pad(weight, (0, 0, 0, 0, 0, missing))
        elif missing < 0:  # frozen for padded maps
            weight = weight[:, : x.shape[1]]
        return self._conv_forward(x, ops.conv_weight(weight, x), self.bias.to(x.dtype))


class PointwiseConv(nn.Conv1d):
    """A 1x1 convolution over a sequence, [B, L, C_in] → [B, L, C_out], with a Conv1d's weights [C_out, C_in, 1]."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0].to(x.dtype), self.bias.to(x.dtype))

    def without_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0].to(x.dtype))


class Linear(nn.Linear):
    """A linear layer that runs in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    """32 groups (Ho et al. 2020), with what follows a norm in this network: scale and shift, SiLU, dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def of(self, x: Map, skip: Tensor | None = None, silu: bool = True) -> tuple[Tensor, Tensor]:
        """(x as a tensor, norm of cat(x, skip)), both in one go where x is a sum still to be made."""
        if not isinstance(x, Sum):
            return x, self(x, skip=skip, silu=silu)
        y = x.normed(self.weight, self.bias, skip, silu, num_groups=self.num_groups, eps=self.eps)
        return x.value(), y

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        offset: Tensor | None = None,
        silu: bool = True,
        dropout: float = 0.0,
    ) -> Tensor:
        return ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            num_groups=self.num_groups,
            eps=self.eps,
            scale=scale,
            shift=shift,
            skip=skip,
            offset=offset,
            silu=silu,
            dropout=dropout,
        )


def zeroed(module: nn.Module) -> nn.Module:
    """The module with its parameters set to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoids of the timesteps, [B] (whole or fractional) → [B, dim] float32: cosines, then sines, zero if odd."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def _norm_and_conv(layers: nn.Sequential) -> tuple[GroupNorm, Conv2d]:
    norm, conv = layers[0], layers[-1]
    assert isinstance(norm, GroupNorm)
    assert isinstance(conv, Conv2d)
    return norm, conv


def _sums_wait(last: nn.Conv1d | nn.Conv2d, h: Tensor) -> bool:
    """Whether a residual sum is left to the next norm: to its kernel, and unless ZeRO-3 watches what modules return."""
    return ops.uses_kernels(h) and not hasattr(last.weight, "ds_id")


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual, conditioned on the time embedding.

    forward: x [B, C1, H, W], emb_out [B, emb_width] float32 as `emb_layers` makes it of the embedding, skip
    [B, C2, H, W] or None → [B, out_channels, H, W], the sum still to be made. `channels` counts x and skip together.
    """

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, dropout: float, use_scale_shift_norm: bool
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dropout = dropout
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.Identity(), Conv2d(channels, out_channels, 3, padding=1))
        self.emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, self.emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.Identity(),
            nn.Identity(),
            zeroed(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else SkipConv(channels, out_channels)

    def forward(self, x: Map, emb_out: Tensor, skip: Tensor | None = None) -> Map:
        norm, conv = _norm_and_conv(self.in_layers)
        if not self.training and ops.fuses_convolutions(value(x), conv.weight, skip):
            return self._fused(value(x), emb_out, skip)
        x, h = norm.of(x, skip=skip)
        h, bias = conv.without_bias(h), conv.bias
        dropout = self.dropout if self.training else 0.0
        norm, conv = _norm_and_conv(self.out_layers)
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h, scale=scale, shift=shift, offset=bias, dropout=dropout)
        else:
            h = norm(h, offset=emb_out + bias, dropout=dropout)
        residual = self._residual(x, skip)
        return Sum(residual, conv.without_bias(h), conv.bias) if _sums_wait(conv, h) else residual + conv(h)

    def _residual(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return x if isinstance(self.skip_connection, nn.Identity) else self.skip_connection(x, skip)

    def _fused(self, x: Tensor, emb_out: Tensor, skip: Tensor | None) -> Tensor:
        """Without gradients: both norms inside their convolutions, the second from moments that the first one made."""
        norm, conv = _norm_and_conv(self.in_layers)
        h, moments = ops.norm_conv3x3(x, (norm.weight, norm.bias), conv.packed(x.dtype), conv.bias, skip=skip)
        norm, conv = _norm_and_conv(self.out_layers)
        given: dict[str, Tensor] = {"offset": emb_out}
        if self.use_scale_shift_norm:
            given = dict(zip(("scale", "shift"), emb_out.chunk(2, dim=1), strict=True))
        affine, residual = (norm.weight, norm.bias), self._residual(x, skip)
        packed = conv.packed(x.dtype)
        return ops.norm_conv3x3(h, affine, packed, conv.bias, moments=moments, residual=residual, **given)[0]


def project_embedding(blocks: Sequence[ResBlock], emb: Tensor) -> list[Tensor]:
    """Each block's `emb_layers` of the embedding [B, E] float32, as one matrix product over all of them.

    A network has some thirty blocks: on a GPU their products would be as many launches, and twice that backward.
    """
    linears = [cast(Linear, block.emb_layers[1]) for block in blocks]
    if any(hasattr(linear.weight, "ds_id") for linear in linears):  # ZeRO-3 gathers weights module by module
        return [block.emb_layers(emb) for block in blocks]
    weight, bias = embedding_weights(blocks)
    projected = F.linear(F.silu(emb), weight.to(emb.dtype), bias.to(emb.dtype))
    return list(projected.split([block.emb_width for block in blocks], dim=1))


def embedding_weights(blocks: Sequence[ResBlock]) -> tuple[Tensor, Tensor]:
    """Weight and bias of all blocks' embeddings as one product."""
    linears = [cast(Linear, block.emb_layers[1]) for block in blocks]
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


class SkipConv(Conv2d):
    """The 1x1 convolution beside a residual branch, over x and the skip as if they were one map."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return ops.skip_conv1x1(x, skip, self.weight, self.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, around a residual: [B, C, H, W] → the same, the sum still to be made."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj_out = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: Map) -> Map:
        residual, h = self.norm.of(x, silu=False)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, L, C], a view when channels-last
        h, last = ops.attention(self.qkv(h), self.num_heads), cast(PointwiseConv, self.proj_out)
        as_map = lambda h: h.unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
        if _sums_wait(last, h):
            return Sum(residual, as_map(last.without_bias(h)), last.bias)
        return residual + as_map(last(h))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class UpsampleConv(Conv2d):
    """A 3x3 convolution that first enlarges its input by 2."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.upsample_conv(x, self.weight, self.bias)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Sum:
    """a + b + bias of a residual block, [B, C, H, W] channels-last, found by whoever first needs it.

    bias [C] is that of the convolution that made b, which ran without it.
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor) -> None:
        self.parts: tuple[Tensor, Tensor, Tensor] | None = (a, b, bias)
        self.total: Tensor | None = None

    def value(self) -> Tensor:
        """The sum: the norm's, where one came first."""
        if self.parts is not None:
            a, b, bias = self.parts
            self._keep(a + (b + bias.to(b.dtype)[:, None, None]))
        assert self.total is not None
        return self.total

    def _keep(self, total: Tensor) -> None:
        self.total, self.parts = total, None  # the parts' memory can go

    def normed(
        self, weight: Tensor, bias: Tensor, skip: Tensor | None, silu: bool, num_groups: int, eps: float
    ) -> Tensor:
        """group_norm_silu of cat(sum, skip); keeps the sum, which it finds on the way."""
        if self.parts is None:
            return ops.group_norm_silu(self.value(), weight, bias, skip=skip, silu=silu, num_groups=num_groups, eps=eps)
        a, b, b_bias = self.parts
        total, y = ops.add_group_norm_silu(
            a, b, weight, bias, b_bias=b_bias, skip=skip, silu=silu, num_groups=num_groups, eps=eps
        )
        self._keep(total)
        return y


Map: TypeAlias = Tensor | Sum
"""What goes from layer to layer."""


def value(x: Map) -> Tensor:
    """A map's tensor."""
    return x.value() if isinstance(x, Sum) else x
