"""The weights of a network in training as its products read them, apart from the float32 weights that are stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastdiff.models.blocks import Conv2d, InputConv, Linear, PointwiseConv, UpsampleConv, embedding_weights
from fastdiff.models.encoder import Encoder


@torch.no_grad()
def arrange_weights(model: Encoder) -> list[nn.Parameter]:
    """Convert the body's weights in place to its dtype and its maps' layout; returns the float32 master weights.

    A forward pass then casts and copies none of them, and gradients come back in the same dtype and layout. The master
    weights are in the order of `model.parameters()`, in the same memory layout. A parameter that stays float32 is its
    own master: biases, norms, embeddings, the first and the last convolution, and upsampling convolutions, whose 4x4
    taps are summed in float32 before they are rounded.

    The embedding layers of all blocks become views of one matrix, `model.projection`, as do their gradients. Whoever
    drops gradients must drop those of the projection, too.
    """
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        body = isinstance(module, (Conv2d, PointwiseConv)) and not name.startswith("out.")
        if not body or isinstance(module, (InputConv, UpsampleConv)):
            continue
        master = module.weight
        if master.dim() == 4:
            master.data = master.data.contiguous(memory_format=torch.channels_last)
        if model.dtype != master.dtype:
            module.weight = nn.Parameter(master.to(model.dtype))
            masters[module.weight] = master
    if model.projection is None:
        model.projection = _joined(model)
    return [masters.get(parameter, parameter) for parameter in model.parameters()]


def _joined(model: Encoder) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of `Encoder.project`, in which the blocks' parameters and their gradients become views."""
    layers = [cast(Linear, block.emb_layers[1]) for block in model.res_blocks]
    weight, bias = (nn.Parameter(tensor) for tensor in embedding_weights(model.res_blocks))
    _tie(weight, [layer.weight for layer in layers])
    _tie(bias, [layer.bias for layer in layers])
    return weight, bias


def _tie(joined: nn.Parameter, parts: Sequence[Tensor]) -> None:
    """Make parameters views of their rows of `joined`, and their gradients of its gradient after a backward pass."""
    rows = [len(part) for part in parts]
    for part, view in zip(parts, joined.detach().split(rows), strict=True):
        part.data = view

    def share_gradient(joined: Tensor) -> None:
        assert joined.grad is not None
        for part, view in zip(parts, joined.grad.split(rows), strict=True):
            part.grad = view

    joined.register_post_accumulate_grad_hook(share_gradient)
