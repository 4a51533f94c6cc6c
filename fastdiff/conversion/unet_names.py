"""Renames the weights of our UNet to those of diffusers' UNet2DModel and back, bit for bit.

Both networks have the same layers in the same order. Only the projection of attention differs: ours is one convolution
whose rows are queries, keys and values head by head, or of all heads (use_new_attention_order), theirs are three.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.settings import BackboneSettings

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")


class Layer(NamedTuple):
    """The names of a layer in both networks, and the number of heads of an attention block."""

    ours: str
    theirs: str
    kind: Literal["plain", "res_block", "attention"] = "plain"
    heads: int = 0


def layers(settings: BackboneSettings) -> Iterator[Layer]:
    """Yield all layers of the network in order of execution."""
    yield Layer("time_embed.0", "time_embedding.linear_1")
    yield Layer("time_embed.2", "time_embedding.linear_2")
    if settings.class_cond:
        yield Layer("label_emb", "class_embedding")
    yield Layer("input_blocks.0.0", "conv_in")
    last, index = len(settings.level_channels) - 1, 1
    for level in range(last + 1):
        for i in range(settings.num_res_blocks):
            yield from _block(settings, f"input_blocks.{index}", f"down_blocks.{level}", i, level)
            index += 1
        if level < last:
            yield from _resampling(settings, f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", "op")
            index += 1
    yield Layer("middle_block.0", "mid_block.resnets.0", "res_block")
    yield Layer("middle_block.1", "mid_block.attentions.0", "attention", heads_of(settings, last))
    yield Layer("middle_block.2", "mid_block.resnets.1", "res_block")
    for index in range((last + 1) * (settings.num_res_blocks + 1)):
        up, i = divmod(index, settings.num_res_blocks + 1)
        level = last - up
        block = f"output_blocks.{index}"
        yield from _block(settings, block, f"up_blocks.{up}", i, level)
        if level and i == settings.num_res_blocks:
            place = 2 if level in settings.attending_levels else 1
            yield from _resampling(settings, f"{block}.{place}", f"up_blocks.{up}.upsamplers.0", "conv")
    yield Layer("out.0", "conv_norm_out")
    yield Layer("out.2", "conv_out")


def _block(settings: BackboneSettings, ours: str, theirs: str, i: int, level: int) -> Iterator[Layer]:
    yield Layer(f"{ours}.0", f"{theirs}.resnets.{i}", "res_block")
    if level in settings.attending_levels:
        yield Layer(f"{ours}.1", f"{theirs}.attentions.{i}", "attention", heads_of(settings, level))


def _resampling(settings: BackboneSettings, ours: str, theirs: str, convolution: str) -> Iterator[Layer]:
    yield (
        Layer(ours, theirs, "res_block")
        if settings.resblock_updown
        else Layer(f"{ours}.{convolution}", f"{theirs}.conv")
    )


def heads_of(settings: BackboneSettings, level: int) -> int:
    """Attention heads of a block of this level, where both ways have as many."""
    if settings.num_head_channels == -1:
        return settings.num_heads
    return settings.level_channels[level] // settings.num_head_channels


def _pairs(settings: BackboneSettings) -> Iterator[tuple[str, str]]:
    """Yield our and their names of all tensors that are the same in both, but for axes of length 1."""
    for layer in layers(settings):
        inner = {"res_block": _RES_BLOCK, "attention": _ATTENTION, "plain": {"": ""}}[layer.kind]
        for ours, theirs in inner.items():
            for what in ("weight",) if layer.ours == "label_emb" else ("weight", "bias"):
                names = (layer.ours, ours, what), (layer.theirs, theirs, what)
                first, second = (".".join(filter(None, name)) for name in names)
                yield first, second


def _rows(layer: Layer, count: int, settings: BackboneSettings) -> Tensor:
    """The rows [count] of our projection in the order queries, keys, values, each head by head."""
    rows = torch.arange(count)
    if settings.use_new_attention_order:
        return rows
    return rows.view(layer.heads, 3, -1).transpose(0, 1).flatten()


def to_diffusers(state: dict[str, Tensor], settings: BackboneSettings) -> dict[str, Tensor]:
    """The weights of UNet2DModel for those of our network with these settings, bit for bit."""
    found = {theirs: state[ours] for ours, theirs in _pairs(settings) if ours in state}
    for layer in layers(settings):
        if layer.kind == "attention":
            found[f"{layer.theirs}.to_out.0.weight"] = state[f"{layer.ours}.proj_out.weight"].flatten(1)
            for what in ("weight", "bias"):
                qkv = state[f"{layer.ours}.qkv.{what}"]
                qkv = (qkv.flatten(1) if what == "weight" else qkv)[_rows(layer, len(qkv), settings)]
                found |= {f"{layer.theirs}.{name}.{what}": part for name, part in zip(_QKV, qkv.chunk(3), strict=True)}
    return found


def from_diffusers(state: dict[str, Tensor], settings: BackboneSettings) -> OrderedDict[str, Tensor]:
    """Our weights for those of UNet2DModel, bit for bit. Raises UserError for a name that is missing or not known."""
    rest = dict(state)
    try:
        found = OrderedDict(
            (ours, rest.pop(theirs))
            for ours, theirs in _pairs(settings)
            if theirs in rest or ".skip_connection." not in ours
        )
        for layer in layers(settings):
            if layer.kind == "attention":
                found[f"{layer.ours}.proj_out.weight"] = found[f"{layer.ours}.proj_out.weight"][..., None]
                for what in ("weight", "bias"):
                    parts = torch.cat([rest.pop(f"{layer.theirs}.{name}.{what}") for name in _QKV])
                    qkv = torch.empty_like(parts)
                    qkv[_rows(layer, len(parts), settings)] = parts
                    found[f"{layer.ours}.qkv.{what}"] = qkv[..., None] if what == "weight" else qkv
    except KeyError as error:
        raise UserError(f"it has no {error.args[0]}") from None
    except (RuntimeError, IndexError):
        raise UserError("its tensors have other shapes than its configuration says") from None
    if rest:
        raise UserError(f"it has {min(rest)}, which our network doesn't have")
    return found
