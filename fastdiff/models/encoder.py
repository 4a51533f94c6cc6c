"""The half of a UNet that the diffusion network and the classifier share: its input blocks and its middle block."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff import ops
from fastdiff.models.blocks import (
    AttentionBlock,
    Downsample,
    InputConv,
    Linear,
    Map,
    Resample,
    ResBlock,
    project_embedding,
    summands,
    timestep_embedding,
    value,
)
from fastdiff.models.settings import BackboneSettings

if TYPE_CHECKING:
    from typing_extensions import Self


class Stage(nn.Sequential):
    """Layers between two skip connections. The first residual block gets the skip.

    Each gets the next of emb_outs and of seeds.
    """

    def forward(  # type: ignore[override]
        self,
        x: Map,
        emb_outs: Iterator[Tensor],
        seeds: Iterator[Tensor | None],
        skip: Map | None = None,
        use_checkpoint: bool = False,
    ) -> Map:
        for layer in self:
            if isinstance(layer, ResBlock):
                inputs = next(emb_outs), None if skip is None else value(skip), next(seeds)
                x = _recomputed(layer, x, *inputs) if use_checkpoint else layer(x, *inputs)
                skip = None
            elif isinstance(layer, AttentionBlock):
                x = _recomputed(layer, x) if use_checkpoint else layer(x)
            else:
                x = layer(value(x))
        return x


def res_blocks(modules: Iterable[nn.Module]) -> list[ResBlock]:
    """All residual blocks in these modules, in order."""
    return [each for module in modules for each in module.modules() if isinstance(each, ResBlock)]


def _recomputed(layer: nn.Module, x: Map, *inputs: Tensor | None) -> Tensor:
    """layer(x, …), whose activations are recomputed in the backward pass instead of stored."""
    return checkpoint(lambda *given: value(layer(*given)), value(x), *inputs, use_reentrant=False)


class Encoder(nn.Module):
    """The embedding, the input blocks and the middle block of a network with the settings `backbone`.

    `dtype` is the dtype of the body; the time embedding and the statistics of the norms are always float32.
    """

    def __init__(self, backbone: BackboneSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.dtype = torch.float32
        self.projection: tuple[Tensor, Tensor] | None = None  # weight and bias of `project`, once joined
        width, channels = backbone.num_channels, backbone.level_channels
        emb = 4 * width
        self.time_embed = nn.Sequential(Linear(width, emb), nn.SiLU(), Linear(emb, emb))
        if backbone.class_cond:
            self.label_emb = nn.Embedding(backbone.num_labels, emb)

        c = backbone.stem_channels
        self.input_blocks = nn.ModuleList([Stage(InputConv(backbone.network_in_channels, c, 3, padding=1))])
        self.input_widths = [c]  # channels of the maps that the input blocks return
        for level, c_level in enumerate(channels):
            for _ in range(backbone.num_res_blocks):
                layers: list[nn.Module] = [self.res_block(c, c_level)]
                c = c_level
                if level in backbone.attending_levels:
                    layers.append(self.attention(c, backbone.num_heads))
                self.input_blocks.append(Stage(*layers))
                self.input_widths.append(c)
            if level < len(channels) - 1:
                halving = self.res_block(c, c, "down") if backbone.resblock_updown else Downsample(c)
                self.input_blocks.append(Stage(halving))
                self.input_widths.append(c)

        self.middle_block = Stage(self.res_block(c, c), self.attention(c, backbone.num_heads), self.res_block(c, c))

    def res_block(self, c_in: int, c_out: int, resample: Resample = "") -> ResBlock:
        """A new residual block for this network."""
        backbone = self.backbone
        return ResBlock(
            c_in, 4 * backbone.num_channels, c_out, backbone.dropout, backbone.use_scale_shift_norm, resample
        )

    def attention(self, c: int, heads: int) -> AttentionBlock:
        """A new attention block for this network; num_head_channels takes precedence over `heads`."""
        backbone = self.backbone
        heads = heads if backbone.num_head_channels == -1 else c // backbone.num_head_channels
        return AttentionBlock(c, heads, backbone.use_new_attention_order)

    @property
    def input_format(self) -> tuple[torch.dtype, int] | None:
        """(dtype, 8) if x may be a map of that dtype, zero-padded to 8 channels; else None."""
        first = self.input_blocks[0][0].weight  # type: ignore[index, union-attr]
        padded = self.backbone.network_in_channels == self.backbone.in_channels <= 4 and ops.uses_kernels(first)
        return (self.dtype, 8) if padded else None

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """The embedding of the timesteps, [B, 4 * num_channels] float32."""
        return self.time_embed(timestep_embedding(timesteps, self.backbone.num_channels))

    def embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """The embedding of timesteps and labels that conditions all blocks, [B, 4 * num_channels] float32."""
        emb = self.embed_time(timesteps)
        if (y is not None) != self.backbone.class_cond:
            raise ValueError("labels y must be given exactly when the model is class-conditional")
        return emb if y is None else emb + self.label_emb(y).float()

    @property
    def res_blocks(self) -> list[ResBlock]:
        """The residual blocks in order of execution."""
        return res_blocks([self])

    def project(self, emb: Tensor) -> list[Tensor]:
        """The projections of an embedding for all residual blocks, [B, emb_width of the block] float32 each."""
        if self.projection is not None:
            weight, bias = self.projection
            projected = F.linear(F.silu(emb), weight, bias)
            return list(projected.split([block.emb_width for block in self.res_blocks], dim=1))
        return project_embedding(self.res_blocks, emb)

    def start_map(self, x: Tensor) -> Tensor:
        """The input of the first layer, [B, network_in_channels, H, W] in the body's dtype and `ops.map_layout`."""
        layout = ops.map_layout(x)
        h = x.to(self.dtype).contiguous(memory_format=layout)
        if x.shape[1] == 1 and layout is torch.channels_last:
            # With one channel both layouts match, and without these strides torch assumes NCHW.
            h = h.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
        return h

    def run_stages(
        self, stages: Iterable[nn.Module], h: Map, emb_outs: Iterator[Tensor], skips: Sequence[Map] = ()
    ) -> list[Map]:
        """Outputs of consecutive blocks, given the projections of the embedding for them.

        Only output blocks take skips; the first of them takes the last skip.
        """
        use_checkpoint = self.backbone.use_checkpoint is True and torch.is_grad_enabled()
        outputs: list[Map] = []
        stages = list(stages)
        seeds: Iterator[Tensor | None] = itertools.repeat(None)
        if self.training and self.backbone.dropout:
            seeds = iter(ops.dropout_seeds(summands(h)[0], len(res_blocks(stages))))
        for i, stage in enumerate(stages):
            h = stage(h, emb_outs, seeds, skips[-1 - i] if skips else None, use_checkpoint)
            outputs.append(h)
        return outputs

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Compute the body in `dtype` (float32, bfloat16 or float16); weights are cast where they are used."""
        self.dtype = dtype
        return self
