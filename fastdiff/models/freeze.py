"""Preparing a network for inference: weights are cast and laid out once instead of at every evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.blocks import Conv2d, InputConv, PointwiseConv, UpsampleConv, embedding_weights
from fastdiff.models.unet import UNet


@torch.no_grad()
def freeze(model: UNet) -> UNet:
    """Cast and lay out the weights for `model.dtype`, in place; the outputs stay the same to the last bit.

    Convolutions' weights become channels-last in the body's dtype, those of upsampling 4x4 taps, the first one's padded
    to 8 channels if `input_format` says so, and the blocks' embedding layers one matrix. Norms, the time embedding and
    the last layer stay float32. Afterwards the state_dict does not fit checkpoints, and the ops' mode "reference" can't
    run the network.
    """
    model.eval().requires_grad_(False)
    padded = model.input_format
    for name, module in model.named_modules():
        dtype = torch.float32 if name.startswith("out.") else model.dtype
        if isinstance(module, UpsampleConv):
            _replace(module, ops.upsample_taps(module.weight), dtype)
        elif isinstance(module, InputConv) and padded:
            missing = padded[1] - module.weight.shape[1]
            _replace(module, nn.functional.pad(module.weight, (0, 0, 0, 0, 0, missing)), dtype)
        elif isinstance(module, (Conv2d, PointwiseConv)):
            _replace(module, module.weight, dtype)
    model.projection = embedding_weights(model.res_blocks)
    return model


def _replace(module: nn.Conv1d | nn.Conv2d, weight: Tensor, dtype: torch.dtype) -> None:
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    module.weight = nn.Parameter(weight.to(dtype, memory_format=layout), requires_grad=False)
