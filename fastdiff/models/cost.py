"""Calculates the cost of a network: floating-point operations and minimal memory traffic of every layer.

`operations` walks a network's modules (on the meta device if it is given settings, so nothing is allocated) and returns
one record per operation. The fields, per image:

flops           FLOPs of the products (2 * multiplications) in the forward pass, for the network as improved-diffusion
                defines it: an upsampling convolution is a 3x3 one on the enlarged map. Backward takes twice as many.
run_flops       FLOPs as computed here: upsampling is one transposed convolution with 4/9 of the operations
                (`kernels/convolutions.py`).
forward_bytes, backward_bytes
                bytes read and written by fused ops on 16-bit maps, x in, y out:

                convolution      forward x + y               backward x + 2 dy + dx (dx and dw each read dy)
                group norm       forward x + y               backward x + dy + dx (second reads come from a cache)
                last layer       forward 2 x + 2 products of its taps + y, where the norm's share is x
                                 backward 2 x + dx + dy + 3 patches of dy, where the norm's share is x + dx
                                 (`kernels/output_layer.py`; with an fp32 body, a group norm and a convolution)
                attention        forward qkv + y             backward qkv + y + dy + dqkv, no scores in memory
                residual         forward x, read where the last convolution writes its y
                                 backward dx, read where the first norm writes its own
                skip             forward 0, never concatenated; backward dx, likewise
                resampling       of a residual block that halves maps, forward and backward: both of its maps, large and
                                 small; of one that doubles them: its input alone, since the convolution enlarges
                noising          forward 1 byte in, x_t out  backward 0
                loss             forward y, 1 byte, dy       backward 0, as forward computes the gradient
                embedding        0: vectors
weight_bytes    bytes per batch of weights read, forward and backward, and gradients written, in the maps' dtype.

Not counted: recomputation under use_checkpoint, the enlargement of small images, metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from fastdiff.models.blocks import (
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNorm,
    InputConv,
    Linear,
    PointwiseConv,
    ResBlock,
    Upsample,
)
from fastdiff.models.settings import BackboneSettings
from fastdiff.models.unet import UNet, build_model

Kind = Literal[
    "conv3x3",
    "conv1x1",
    "downsample conv",
    "upsample conv",
    "input conv",
    "output conv",
    "attention",
    "group norm",
    "residual",
    "skip",
    "resampling",
    "embedding",
    "noising",
    "loss",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

UPSAMPLE_SHARE = 4 / 9
"""Ratio of the operations of the transposed 4x4 convolution to those of the 3x3 one on the enlarged map."""
HALF, SINGLE = 2, 4  # bytes per element
TAPS, PATCH = 9, 64
"""Products per pixel and output channel of the last layer's op, and numbers per pixel in its patches, in two parts."""

# Kernel launches in a batch's forward and backward pass; the backward of a convolution has one for dx and one for dw.
_LAUNCHES: dict[Kind, tuple[int, int]] = {
    "attention": (1, 2),
    "group norm": (2, 3),
    "residual": (0, 0),
    "skip": (0, 0),
    "resampling": (2, 2),
    "noising": (1, 0),
    "loss": (1, 0),
}
_CONVOLUTION_LAUNCHES = (1, 2)
_LAST_LAUNCHES = (3, 5)
"""Those of the last convolution with a 16-bit body: its weights, products and their sum; backward its patches, and
three reductions and a copy by PyTorch. The sums and dx are counted as the norm's."""

_RECOMPUTED: tuple[Kind, ...] = ("conv3x3", "conv1x1", "attention")
_LAST = (".out_layers.3", ".proj_out")
"""The ends of the names of a block's last product, whose result no backward pass needs."""


@dataclass(frozen=True)
class Operation:
    """The cost of one operation for one image. The module's docstring defines the fields."""

    name: str
    """The module's name, e.g. input_blocks.1.0.in_layers.2."""
    kind: Kind
    shape: tuple[int, ...]
    """(C_in, C_out, H, W) of a convolution's result; (C, H, W) of a map; (heads, L, D); (in, out) of a vector."""
    flops: float = 0.0
    run_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    parameters: int = 0
    """Weights and biases of the module."""
    element: int = HALF
    """Bytes of one number of its maps."""

    @property
    def launches(self) -> tuple[int, int]:
        """Launches forward and backward, for a batch of any size."""
        if self.kind == "output conv" and self.element == HALF:
            return _LAST_LAUNCHES
        return _LAUNCHES.get(self.kind, _CONVOLUTION_LAUNCHES)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Bytes per batch: (weights read in forward, weights read and gradients written in backward)."""
        return self.element * self.parameters, 2 * self.element * self.parameters


def optimiser_bytes(averages: int = 1, half_copy: bool = True) -> int:
    """Memory traffic of one AdamW update in bytes per parameter (see `kernels/adamw_ema.py`).

    It reads the gradient for its norm (4 bytes), reads weight, gradient and two moments and writes all but the gradient
    (28), in float32, and reads and writes each average (8). A weight with a 16-bit copy has a 16-bit gradient, which is
    read twice, and the copy is written: 2 bytes less.
    """
    return 32 + 8 * averages - (2 if half_copy else 0)


def on_meta(settings: BackboneSettings) -> UNet:
    """The network on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return build_model(settings)


def operations(network: BackboneSettings | UNet, element: int = HALF) -> list[Operation]:
    """The operations of one evaluation of the network and its training loss for one image, in order of execution.

    element  Bytes per number in the maps of the body: 2 with bf16 and fp16, 4 with fp32.
    """
    model = network if isinstance(network, UNet) else on_meta(network)
    return list(_Walk(model, element).run())


def forward_flops(network: BackboneSettings | UNet) -> float:
    """FLOPs of one evaluation for one image, for the network as improved-diffusion defines it."""
    return sum(op.flops for op in operations(network))


def train_flops(network: BackboneSettings | UNet) -> float:
    """FLOPs of one image's forward and backward pass: three times those of the forward pass."""
    return 3 * forward_flops(network)


def executed_flops(network: BackboneSettings | UNet, training: bool = False) -> float:
    """FLOPs computed here for one image: of one evaluation, or with `training` of the forward and backward pass.

    They differ from the network's by upsampling and by use_checkpoint, with which residual and attention blocks compute
    all but their last product again. The scores that flash attention computes again are not counted.
    """
    settings = network.settings if isinstance(network, UNet) else network
    ops = operations(network)
    once = sum(op.run_flops for op in ops)
    if not training:
        return once
    again = 0.0
    if settings.use_checkpoint is True:
        again = sum(op.run_flops for op in ops if op.kind in _RECOMPUTED and not op.name.endswith(_LAST))
    return 3 * once + again


def parameters(ops: Sequence[Operation]) -> int:
    """The number of parameters of the network."""
    return sum(op.parameters for op in ops)


def saved_bytes(ops: Sequence[Operation]) -> float:
    """Bytes of the maps that the forward pass keeps for the backward pass, per image, without use_checkpoint.

    Each map is counted where it is read: as input of a norm, a convolution or attention (whose result is counted, too).
    The 1x1 convolution in a shortcut reads the norm's input, which is already counted.
    """
    total = 0.0
    for op in ops:
        if op.kind == "group norm":
            total += op.element * _volume(op.shape)
        elif op.kind == "attention":
            total += op.element * 4 * _volume(op.shape)
        elif (
            op.kind == "conv3x3"
            or (op.kind == "output conv" and op.element == SINGLE)  # else the norm's result exists in registers only
            or (op.kind == "conv1x1" and "skip_connection" not in op.name)
        ):
            c_in, _, height, width = op.shape
            total += op.element * c_in * height * width
        elif op.kind == "upsample conv":
            c_in, _, height, width = op.shape
            total += op.element * c_in * height * width / 4
    return total


def _volume(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Walk:
    """Walks a network's modules in order of execution, with the size and width of the current map."""

    def __init__(self, model: UNet, element: int) -> None:
        self.model, self.settings, self.element = model, model.settings, element
        self.names = {module: name for name, module in model.named_modules()}
        self.size = self.settings.size_hw

    def run(self) -> Iterator[Operation]:
        channels, pixels = self.settings.in_channels, _volume(self.size)
        seen = self.settings.network_in_channels  # x_t, and the small image if there is one
        shown = (seen, *self.size)
        yield Operation("q_sample", "noising", shown, forward_bytes=(channels + self.element * seen) * pixels)
        for module in self.model.time_embed:
            if isinstance(module, Linear):
                yield self._linear(module)
        if self.settings.class_cond:
            table = self.model.label_emb.weight
            yield Operation("label_emb", "embedding", tuple(table.shape), parameters=table.numel(), element=SINGLE)
        widths = []
        for stage in self.model.input_blocks:
            yield from self._layers(stage, 0)
            widths.append(self.width)
        yield from self._layers(self.model.middle_block, 0)
        for stage in self.model.output_blocks:
            yield from self._layers(stage, widths.pop())
        norm, _, conv = self.model.out
        last = self._norm(norm, self.width), self._conv(conv, "output conv")
        yield from last if self.element == SINGLE else self._one_op(*last)
        made = self.settings.out_channels
        yield Operation("loss", "loss", (made, *self.size), forward_bytes=(2 * SINGLE * made + channels) * pixels)

    def _layers(self, stage: nn.Module, skip: int) -> Iterator[Operation]:
        """The operations of a stage; `skip` is the number of channels that its first block gets as a skip."""
        for layer in stage.children():
            if isinstance(layer, InputConv):
                yield self._conv(layer, "input conv")
            elif isinstance(layer, ResBlock):
                yield from self._res_block(layer, skip)
                skip = 0
            elif isinstance(layer, AttentionBlock):
                yield from self._attention(layer)
            elif isinstance(layer, Downsample):
                yield self._conv(layer.op, "downsample conv")
            elif isinstance(layer, Upsample):
                yield self._conv(layer.conv, "upsample conv")
            else:
                raise TypeError(f"the cost of a {type(layer).__name__} is not known")

    def _res_block(self, block: ResBlock, skip: int) -> Iterator[Operation]:
        name = self.names[block]
        channels = self.width + skip
        if skip:
            yield Operation(name, "skip", (skip, *self.size), backward_bytes=self.element * skip * _volume(self.size))
        if not isinstance(block.skip_connection, nn.Identity):
            assert isinstance(block.skip_connection, Conv2d)
            yield self._conv(block.skip_connection, "conv1x1", advance=False)
        norm, _, first = block.in_layers
        yield self._norm(norm, channels)
        if block.resample:
            yield self._resampling(block, channels)
        yield self._conv(first, "upsample conv" if block.resample == "up" else "conv3x3")
        yield self._linear(block.emb_layers[1])
        norm, last = block.out_layers[0], block.out_layers[-1]
        yield self._norm(norm, self.width)
        yield self._conv(last, "conv3x3")
        yield self._residual(name, self.width, channels)

    def _resampling(self, block: ResBlock, channels: int) -> Operation:
        """The averaging of a block's map and of its norm, whose size becomes the current one, or the enlargement of
        its map."""
        shape, volume = (channels, *self.size), self.element * channels * _volume(self.size)
        traffic = 5 * volume if block.resample == "up" else 2.5 * volume
        if block.resample == "down":
            self.size = (self.size[0] // 2, self.size[1] // 2)
        return Operation(
            self.names[block],
            "resampling",
            shape,
            forward_bytes=traffic,
            backward_bytes=traffic,
            element=self.element,
        )

    def _attention(self, block: AttentionBlock) -> Iterator[Operation]:
        channels, length, name = self.width, _volume(self.size), self.names[block]
        yield self._norm(block.norm, channels)
        yield self._convolution(block.qkv, "conv1x1", self.size)
        yield Operation(
            name,
            "attention",
            (block.num_heads, length, channels // block.num_heads),
            flops=4.0 * length * length * channels,  # queries by keys, then weights by values
            run_flops=4.0 * length * length * channels,
            forward_bytes=self.element * 4 * channels * length,
            backward_bytes=self.element * 8 * channels * length,
            element=self.element,
        )
        yield self._convolution(block.proj_out, "conv1x1", self.size)
        yield self._residual(name, channels, channels)

    def _residual(self, name: str, made: int, given: int) -> Operation:
        channel = self.element * _volume(self.size)
        shape = (made, *self.size)
        return Operation(name, "residual", shape, forward_bytes=channel * made, backward_bytes=channel * given)

    def _one_op(self, norm: Operation, conv: Operation) -> Iterator[Operation]:
        """The last norm and convolution where one op computes them (`kernels/output_layer.py`)."""
        x, y = self.element * _volume(norm.shape), SINGLE * _volume(conv.shape[1:])
        products, patches = TAPS * y, 2 * self.element * PATCH * _volume(self.size)
        yield replace(norm, forward_bytes=x, backward_bytes=2 * x)
        yield replace(conv, forward_bytes=x + 2 * products + y, backward_bytes=x + y + 3 * patches)

    def _norm(self, norm: nn.Module, channels: int) -> Operation:
        assert isinstance(norm, GroupNorm)
        assert norm.num_channels == channels, (self.names[norm], norm.num_channels, channels)
        volume = self.element * channels * _volume(self.size)
        return Operation(
            self.names[norm],
            "group norm",
            (channels, *self.size),
            forward_bytes=2 * volume,
            backward_bytes=3 * volume,
            parameters=_parameters(norm),
            element=self.element,
        )

    def _conv(self, conv: nn.Module, kind: Kind, advance: bool = True) -> Operation:
        """The cost of a 2-D convolution; with `advance` its result becomes the current map."""
        height, width = self.size
        sizes = {"upsample conv": (2 * height, 2 * width), "downsample conv": ((height + 1) // 2, (width + 1) // 2)}
        size = sizes.get(kind, self.size)
        operation = self._convolution(conv, kind, size)
        if advance:
            self.size, self.width = size, operation.shape[1]
        return operation

    def _convolution(self, conv: nn.Module, kind: Kind, size: tuple[int, int]) -> Operation:
        """The cost of a convolution from the current map to one of the given size."""
        assert isinstance(conv, (Conv2d, PointwiseConv))
        c_in, c_out, taps = conv.in_channels, conv.out_channels, _volume(conv.kernel_size)
        products = 2.0 * taps * c_in * c_out * _volume(size)
        run_products = products * (UPSAMPLE_SHARE if kind == "upsample conv" else 1)
        x, y = self.element * c_in * _volume(self.size), self.element * c_out * _volume(size)
        backward = x + 2 * y + (0 if kind == "input conv" else x)  # an image needs no gradient
        name, shape = self.names[conv], (c_in, c_out, *size)
        return Operation(name, kind, shape, products, run_products, x + y, backward, _parameters(conv), self.element)

    def _linear(self, linear: nn.Module) -> Operation:
        assert isinstance(linear, Linear)
        products = 2.0 * linear.in_features * linear.out_features
        shape = (linear.in_features, linear.out_features)
        return Operation(
            self.names[linear], "embedding", shape, products, products, parameters=_parameters(linear), element=SINGLE
        )
