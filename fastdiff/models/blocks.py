"""The layers and blocks of the UNet.

Weights are cast to the dtype of the input, so one module serves every precision. Parameter names are those of
improved-diffusion: norms and convolutions are therefore in `nn.Sequential`s whose other positions (SiLU, dropout) hold
`nn.Identity`, because `group_norm_silu` computes those steps, too.

Where kernels run, a residual block returns its result as a `Sum` that is not added up yet, and so does a convolution
between blocks, with its bias: the norm that follows adds it up and normalises it in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.ops import NormOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Sum:
    """A sum a + b + bias or a + bias, [B, C, H, W] channels-last, that the first layer that needs it computes.

    bias [C] belongs to the convolution that computed b, or a where there is no b, without it.
    """

    def __init__(self, a: Tensor, b: Tensor | None, bias: Tensor) -> None:
        self.parts: tuple[Tensor, Tensor | None, Tensor] | None = (a, b, bias)
        self.total: Tensor | None = None

    def value(self) -> Tensor:
        """The sum, which is computed here unless a norm has computed it."""
        if self.parts is not None:
            a, b, bias = self.parts
            more = bias.to(a.dtype)[:, None, None]
            self.keep(a + (more if b is None else b + more))
        assert self.total is not None
        return self.total

    def keep(self, total: Tensor) -> None:
        """Store the sum and free its parts."""
        self.total, self.parts = total, None


Resample: TypeAlias = Literal["", "down", "up"]
Map: TypeAlias = Tensor | Sum
"""A feature map, as one layer passes it to the next."""


def value(x: Map) -> Tensor:
    """The map as a tensor."""
    return x.value() if isinstance(x, Sum) else x


def summands(x: Map) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(a, b or None, bias) of a sum that is not computed yet; of any other map (the map, None, None)."""
    return x.parts if isinstance(x, Sum) and x.parts is not None else (value(x), None, None)


class Conv2d(nn.Conv2d):
    """A convolution that runs in the dtype of its input."""

    bias: nn.Parameter  # never None, unlike in torch's class

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """The convolution without its bias, which the next norm adds: this saves a pass, and a backward reduction."""
        return self.convolve(x, None)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, ops.conv_weight(self.weight, x), None if bias is None else bias.to(x.dtype))


class BetweenConv(Conv2d):
    """A convolution between blocks; with kernels its result is a `Sum`, whose bias the next block's norm adds."""

    def forward(self, x: Tensor) -> Map:  # type: ignore[override]
        return Sum(self.without_bias(x), None, self.bias) if _leaves_sum(self, x) else self.convolve(x, self.bias)


class InputConv(BetweenConv):
    """The first convolution. It also accepts maps that are zero-padded to 8 channels (see `Encoder.input_format`)."""

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, missing = self.weight, x.shape[1] - self.weight.shape[1]
        if missing > 0:
            weight = F.pad(weight, (0, 0, 0, 0, 0, missing))
        elif missing < 0:  # frozen for padded maps
            weight = weight[:, : x.shape[1]]
        return self._conv_forward(x, ops.conv_weight(weight, x), None if bias is None else bias.to(x.dtype))


class PointwiseConv(nn.Conv1d):
    """A 1x1 convolution over a sequence, [B, L, C_in] → [B, L, C_out], with a Conv1d's weights [C_out, C_in, 1]."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1).to(x.dtype), self.bias.to(x.dtype))

    def without_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1).to(x.dtype))


class QKVConv(PointwiseConv):
    """The projection of attention, [B, L, C] → [B, L, 3C], whose result has queries, keys and values head by head.

    With `grouped` its parameters have the queries of all heads first, then all keys, then all values, and are reordered
    where they are used: this moves 3 C^2 numbers, not maps.
    """

    def __init__(self, channels: int, num_heads: int, grouped: bool) -> None:
        super().__init__(channels, 3 * channels)
        self.num_heads, self.grouped = num_heads, grouped

    def parameters_by_head(self) -> tuple[Tensor, Tensor]:
        """The weight [3C, C] and the bias [3C], with their rows in the order of the result."""
        return self._by_head(self.weight.flatten(1)), self._by_head(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters_by_head()
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @torch.no_grad()
    def store_by_head(self) -> None:
        """Reorder the parameters themselves, for inference."""
        weight, bias = self.parameters_by_head()
        self.weight.data, self.bias.data = weight[..., None].clone(), bias.clone()
        self.grouped = False

    def _by_head(self, rows: Tensor) -> Tensor:
        if not self.grouped:
            return rows
        return rows.unflatten(0, (3, self.num_heads, -1)).transpose(0, 1).flatten(0, 2)


class Linear(nn.Linear):
    """A linear layer that runs in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    """A norm of 32 groups (Ho et al. 2020), then scale and shift, SiLU and dropout (see `NormOptions`)."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)  # as the ops' defaults

    def forward(self, x: Tensor, **options: Unpack[NormOptions]) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, **options)

    def of(self, x: Map, **options: Unpack[NormOptions]) -> tuple[Tensor, Tensor]:
        """(x as a tensor, norm of cat(x, skip)). One op computes both if x is a `Sum` without its total."""
        if not isinstance(x, Sum) or x.parts is None:
            total = value(x)
            return total, self(total, **options)
        a, b, b_bias = x.parts
        total, y = ops.add_group_norm_silu(a, b, self.weight, self.bias, b_bias=b_bias, **options)
        x.keep(total)
        return total, y


class OutputLayer(nn.Sequential):
    """The network's last norm, SiLU and 3x3 convolution in float32: [B, C, H, W] → [B, out_channels, H, W] float32.

    Where kernels run, one op computes it from a 16-bit map, with factors of 15 bits of mantissa, and adds up a residual
    sum before.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(GroupNorm(channels), nn.Identity(), zeroed(Conv2d(channels, out_channels, 3, padding=1)))

    def forward(self, x: Map) -> Tensor:
        norm, conv = _norm_and_conv(self)
        a, b, b_bias = summands(x)
        if b is None:
            a, b_bias = value(x), None
        if hasattr(conv.weight, "ds_id") or not ops.has_output_layer(a, conv.out_channels):  # ZeRO-3 gathers by module
            return conv(norm(value(x).float()))
        return ops.output_layer(a, norm.weight, norm.bias, conv.weight, conv.bias, second=b, second_bias=b_bias)


def zeroed(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that its residual branch initially adds nothing. Returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoidal embedding, timesteps [B] (whole or fractional) → [B, dim] float32.

    Columns are cosines, then sines, then a zero if dim is odd.
    """
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


def _bias_for_norm(conv: Conv2d, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """(convolution of h, its bias if the norm that follows is to add it, in the same pass over memory)."""
    if ops.map_layout(h) is torch.contiguous_format:  # PyTorch's norm would need a pass for it, the convolution doesn't
        return conv(h), None  # which leaves no sum there
    return conv.without_bias(h), conv.bias


def _leaves_sum(last: nn.Conv1d | nn.Conv2d, h: Tensor) -> bool:
    """Whether the next norm computes the residual sum; not under ZeRO-3, whose hooks need tensors from modules."""
    return ops.uses_kernels(h) and not hasattr(last.weight, "ds_id")


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, conditioned on the time embedding.

    forward: x [B, C1, H, W], emb_out [B, emb_width] float32 (the result of `emb_layers`), skip [B, C2, H, W] or None,
    seed [1] int64 of the dropout or None → [B, out_channels, H, W]; with kernels, a `Sum`. `channels` = C1 + C2.
    With `resample` "down" or "up" the result has half or twice H and W: the map is averaged over 2x2 pixels, or each
    pixel repeated, before the first convolution and in the shortcut. Such a block takes no skip.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: Resample = "",
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dropout = dropout
        self.resample = resample
        conv = UpsampleConv if resample == "up" else Conv2d
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.Identity(), conv(channels, out_channels, 3, padding=1))
        self.emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, self.emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.Identity(),
            nn.Identity(),
            zeroed(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else SkipConv(channels, out_channels)

    def forward(self, x: Map, emb_out: Tensor, skip: Tensor | None = None, seed: Tensor | None = None) -> Map:
        _, conv = _norm_and_conv(self.in_layers)
        x, h, residual = self._first_norm(x, skip)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # the convolution enlarges h
        h, bias = _bias_for_norm(conv, h)
        dropout: NormOptions = {"dropout": self.dropout if self.training else 0.0, "seed": seed}
        norm, conv = _norm_and_conv(self.out_layers)
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h, scale=scale, shift=shift, offset=bias, **dropout)
        else:
            h = norm(h, offset=emb_out if bias is None else emb_out + bias, **dropout)
        shortcut = self.skip_connection
        if residual is not None:
            return Sum(residual, conv.without_bias(h), conv.bias + cast(SkipConv, shortcut).bias)
        residual = x if isinstance(shortcut, nn.Identity) else shortcut(x, skip)
        return Sum(residual, conv.without_bias(h), conv.bias) if _leaves_sum(conv, h) else residual + conv(h)

    def _first_norm(self, x: Map, skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x as a tensor, its norm, the shortcut without its bias where one op computes all three)."""
        norm, shortcut = _norm_and_conv(self.in_layers)[0], self.skip_connection
        a, b, b_bias = summands(x)
        if not isinstance(shortcut, SkipConv) or not _leaves_sum(shortcut, a) or not ops.fuses_shortcut(a, skip):
            return *norm.of(x, skip=skip), None
        weight = shortcut.weight.flatten(1)
        total, h, made = ops.norm_and_shortcut(a, norm.weight, norm.bias, weight, b=b, b_bias=b_bias, skip=skip)
        if isinstance(x, Sum):
            x.keep(total)
        return total, h, made


def project_embedding(blocks: Sequence[ResBlock], emb: Tensor) -> list[Tensor]:
    """The `emb_layers` of all blocks applied to the embedding [B, E] float32, as a single matrix product.

    A network has about thirty blocks. On a GPU, separate products would be one launch each, and two in backward.
    """
    linears = [cast(Linear, block.emb_layers[1]) for block in blocks]
    if any(hasattr(linear.weight, "ds_id") for linear in linears):  # ZeRO-3 gathers weights module by module
        return [block.emb_layers(emb) for block in blocks]
    weight, bias = embedding_weights(blocks)
    projected = F.linear(F.silu(emb), weight.to(emb.dtype), bias.to(emb.dtype))
    return list(projected.split([block.emb_width for block in blocks], dim=1))


def embedding_weights(blocks: Sequence[ResBlock]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the single product that computes the embeddings of all blocks."""
    linears = [cast(Linear, block.emb_layers[1]) for block in blocks]
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


class SkipConv(Conv2d):
    """The 1x1 convolution of cat(x, skip) in the shortcut of a residual block."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return ops.skip_conv1x1(x, skip, self.weight, self.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with a residual connection, [B, C, H, W] → the same; with kernels, a `Sum`.

    grouped: the order of the projection's parameters (see `QKVConv`).
    """

    def __init__(self, channels: int, num_heads: int, grouped: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.qkv = QKVConv(channels, num_heads, grouped)
        self.proj_out = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: Map) -> Map:
        residual, h = self.norm.of(x, silu=False)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, L, C], a view when channels-last
        qkv, last = self.qkv, cast(PointwiseConv, self.proj_out)
        by_module = hasattr(qkv.weight, "ds_id")  # ZeRO-3 gathers a module's weights when the module is called
        if by_module or not ops.has_self_attention(h, len(qkv.weight), self.num_heads):
            h = ops.attention(qkv(h), self.num_heads)
        else:
            h = ops.self_attention(h, *qkv.parameters_by_head(), self.num_heads)
        as_map = lambda h: h.unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
        if _leaves_sum(last, h):
            return Sum(residual, as_map(last.without_bias(h)), last.bias)
        return residual + as_map(last(h))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = BetweenConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Map:
        return self.op(x)


class UpsampleConv(BetweenConv):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, in one op."""

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.upsample_conv(x, self.weight, bias)


class Upsample(nn.Module):
    """An `UpsampleConv` under improved-diffusion's parameter name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Map:
        return self.conv(x)
