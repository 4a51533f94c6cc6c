"""Counts of operations and bytes agree with torch's counter, with each other and with the published networks."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from fastdiff.kernels import reference
from helpers import ROOT
from helpers.tiny import MODEL, SUPER_RES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import ops
from fastdiff.models import BackboneSettings, SuperResSettings, UNetSettings, build_model, cost

CONFIGS = ROOT / "configs"
# Per image: GFLOP of the forward pass, and MB of 16-bit maps through fused ops, forward and with the backward pass.
PUBLISHED = {
    "imagenet64_uncond": (79.5, 243, 681),
    "cifar10_uncond": (16.8, 67, 188),
    "imagenet64_270M": (178.2, 365, 1021),
    "upsample_256": (1120.1, 3101, 8649),
    "lsun_bedroom_lr1e-4": (497.5, 2063, 5754),
}


def published(name: str) -> BackboneSettings:
    model = json.loads((CONFIGS / f"{name}.json").read_text())["model"]
    return (SuperResSettings if "large_size" in model else UNetSettings)(**model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name: str) -> None:
    """The published bytes were counted by hand, with a norm and a convolution on float32 maps as the last layer.

    They have norms that read their maps twice.
    """
    gigaflops, forward, training = PUBLISHED[name]
    half, single = (cost.operations(published(name), element) for element in (cost.HALF, cost.SINGLE))
    ops = [b if b.name.startswith("out.") else a for a, b in zip(half, single, strict=True)]
    assert cost.forward_flops(published(name)) == pytest.approx(gigaflops * 1e9, rel=0.005)
    assert cost.train_flops(published(name)) == pytest.approx(3 * gigaflops * 1e9, rel=0.005)
    maps = sum(op.forward_bytes for op in ops if op.kind == "group norm") / 2
    assert sum(op.forward_bytes for op in ops) + maps == pytest.approx(forward * 1e6, rel=0.01)
    assert sum(op.forward_bytes + op.backward_bytes for op in ops) + 3 * maps == pytest.approx(training * 1e6, rel=0.03)


NETWORKS: dict[str, BackboneSettings] = {
    "tiny": UNetSettings(**MODEL),
    "classes": UNetSettings(**MODEL, class_cond=True, num_classes=3, learn_sigma=True),
    "tall, other heads": UNetSettings(
        **{**MODEL, "image_size": "16x4", "attention_resolutions": "4,2", "num_heads": 2}
    ),
    "gray, added embedding": UNetSettings(**MODEL, in_channels=1, use_scale_shift_norm=False),
    "resampling blocks": UNetSettings(**MODEL, resblock_updown=True, use_new_attention_order=True),
    "three levels": UNetSettings(**{**MODEL, "channel_mult": "1,2,3", "num_res_blocks": 2}),
    "super-resolution": SuperResSettings(**SUPER_RES),
}


def given(settings: BackboneSettings, batch: int, device: str) -> dict[str, Any]:
    inputs = {
        "x": torch.zeros(batch, settings.in_channels, *settings.size_hw, device=device),
        "timesteps": torch.zeros(batch, device=device),
    }
    if settings.class_cond:
        inputs["y"] = torch.zeros(batch, dtype=torch.int64, device=device)
    if isinstance(settings, SuperResSettings):
        inputs["low_res"] = torch.zeros(batch, settings.in_channels, *settings.small_size, device=device)
    return inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_torchs(name: str) -> None:
    """The count equals torch's, which counts every product, here on the meta device."""
    settings = NETWORKS[name]
    model = cost.on_meta(settings)
    with FlopCounterMode(display=False) as counter, ops.using("reference"):
        model(**given(settings, 2, "meta"))
    assert counter.get_total_flops() == 2 * cost.forward_flops(model)


def test_backward_is_twice_forward() -> None:
    """The backward pass costs twice the forward pass, but for the image and the sinusoids, which need no gradient."""
    settings = NETWORKS["tiny"]
    model = cost.on_meta(settings)
    with FlopCounterMode(display=False) as counter, ops.using("reference"):
        model(**given(settings, 1, "meta")).sum().backward()
    listed = {op.name: op for op in cost.operations(model)}
    without = listed["input_blocks.0.0"].flops + listed["time_embed.0"].flops
    assert counter.get_total_flops() == cost.train_flops(model) - without


@pytest.mark.parametrize("recomputes", [False, True])
def test_executed_flops_are_torchs(recomputes: bool) -> None:
    """Upsampling as it is computed here, and with use_checkpoint what the backward pass computes again.

    On a CPU torch doesn't count attention, whose forward pass is computed once or twice and its backward pass once.
    """
    settings = NETWORKS["tiny"].model_copy(update={"use_checkpoint": recomputes})
    model = build_model(settings)
    with FlopCounterMode(display=False) as counter:
        result = model(**given(settings, 1, "cpu"))
        forward = counter.get_total_flops()
        result.sum().backward()
    listed = {op.name: op for op in cost.operations(model)}
    attention = sum(op.run_flops for op in cost.operations(model) if op.kind == "attention")
    assert forward == cost.executed_flops(model) - attention
    without = listed["input_blocks.0.0"].flops + listed["time_embed.0"].flops + (4 if recomputes else 3) * attention
    assert counter.get_total_flops() == cost.executed_flops(model, training=True) - without


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_once(name: str) -> None:
    model = cost.on_meta(NETWORKS[name])
    ops = cost.operations(model)
    assert cost.parameters(ops) == sum(p.numel() for p in model.parameters())
    weighted = [module for _, module in model.named_modules() if list(module.parameters(recurse=False))]
    names = Counter(op.name for op in ops if op.parameters)
    assert len(names) == len(weighted)
    assert set(names.values()) == {1}
    assert {op.kind for op in ops} <= set(cost.KINDS)
    assert ops == cost.operations(NETWORKS[name])


def test_shapes_are_those_of_the_maps() -> None:
    """The shapes are those that hooks see for every convolution that runs as a module."""
    settings = NETWORKS["super-resolution"]
    model = build_model(settings)
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, made: seen.__setitem__(name, tuple(made.shape[1:]))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(**given(settings, 1, "cpu"))
    convolutions = [op for op in cost.operations(model) if op.name in seen]
    assert {op.kind for op in convolutions} >= {"input conv", "output conv", "upsample conv", "downsample conv"}
    assert len(convolutions) == len(seen)
    assert {op.name: op.shape[1:] for op in convolutions} == seen


def test_formulae_of_one_block() -> None:
    """The numbers of the middle block, with 64 channels on a 4x4 map, are computed by hand."""
    ops = {(op.name, op.kind): op for op in cost.operations(NETWORKS["tiny"])}
    volume = 2 * 64 * 16  # bytes of the map
    conv = ops["middle_block.0.in_layers.2", "conv3x3"]
    assert conv.shape == (64, 64, 4, 4)
    assert conv.flops == conv.run_flops == 2 * 9 * 64 * 64 * 16
    assert (conv.forward_bytes, conv.backward_bytes) == (2 * volume, 4 * volume)
    assert conv.weight_bytes == (2 * (9 * 64 * 64 + 64), 4 * (9 * 64 * 64 + 64))
    norm = ops["middle_block.0.in_layers.0", "group norm"]
    assert (norm.forward_bytes, norm.backward_bytes) == (2 * volume, 3 * volume)
    attention = ops["middle_block.1", "attention"]
    assert attention.shape == (4, 16, 16)
    assert attention.flops == 4 * 16 * 16 * 64
    assert (attention.forward_bytes, attention.backward_bytes) == (4 * volume, 8 * volume)
    assert ops["middle_block.0", "residual"].forward_bytes == volume
    up = ops["output_blocks.1.2.conv", "upsample conv"]
    assert up.shape == (64, 64, 8, 8)
    assert up.flops == 2 * 9 * 64 * 64 * 64
    assert up.run_flops == pytest.approx(2 * 16 / 4 * 64 * 64 * 64)  # each output pixel sees 4 of the 16 taps
    assert (up.forward_bytes, up.backward_bytes) == (5 * volume, (1 + 2 * 4 + 1) * volume)
    assert ops["input_blocks.0.0", "input conv"].backward_bytes == 2 * (3 + 2 * 32) * 64  # no gradient of an image


def test_saved_bytes_against_autograd() -> None:
    """Autograd saves all that is counted; unfused ops also save concatenated and enlarged maps."""
    settings = NETWORKS["tiny"]
    model = build_model(settings)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.dim() >= 3:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        mock.patch.object(ops, "upsample_conv", reference.upsample_conv),
        mock.patch.object(ops, "_channels_last", True),  # in eager code on contiguous maps PyTorch keeps more
    ):
        model(**given(settings, 1, "cpu"))
    counted = cost.saved_bytes(cost.operations(model, cost.SINGLE))  # the body is float32 here
    assert counted <= sum(kept.values()) < 1.6 * counted


def test_last_layer() -> None:
    """In a 16-bit network one op computes it, which keeps its input alone; the numbers are computed by hand."""
    half, single = (cost.operations(NETWORKS["tiny"], element) for element in (cost.HALF, cost.SINGLE))
    pixels, out = 64, 3
    x, y = 2 * 32 * pixels, 4 * out * pixels  # bytes of the map and of the result
    norm, conv = half[-3:-1]
    assert (norm.name, conv.name) == ("out.0", "out.2")
    assert (norm.forward_bytes, norm.backward_bytes) == (x, 2 * x)
    assert conv.forward_bytes == x + 2 * 9 * y + y
    assert conv.backward_bytes == x + y + 3 * 256 * pixels
    assert tuple(map(sum, zip(norm.launches, conv.launches, strict=True))) == (5, 8)
    assert cost.saved_bytes([norm, conv]) == x
    norm, conv = single[-3:-1]
    assert (norm.forward_bytes, norm.backward_bytes) == (4 * x, 6 * x)
    assert (conv.forward_bytes, conv.backward_bytes) == (2 * x + y, 4 * x + 2 * y)
    assert cost.saved_bytes([norm, conv]) == 4 * x


def test_float32_maps_are_twice_as_large() -> None:
    """Maps are twice as large except for the image and in the loss, which are always float32, and in the last layer."""
    half, single = (cost.operations(NETWORKS["tiny"], element) for element in (cost.HALF, cost.SINGLE))
    for a, b in zip(half, single, strict=True):
        if a.name.startswith("out."):
            continue
        factor = 1 if a.kind in ("loss", "embedding") else 2
        assert b.backward_bytes == factor * a.backward_bytes, a.name
        assert b.weight_bytes == tuple(factor * x for x in a.weight_bytes), a.name
        assert b.flops == a.flops


def test_bytes_of_the_optimiser() -> None:
    assert cost.optimiser_bytes() == 38
    assert cost.optimiser_bytes(averages=2, half_copy=False) == 48
