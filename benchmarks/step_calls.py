"""Records the operations of a training step on tensors without memory, and makes arguments with memory to time them."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
from fastdiff.kernels import launch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastdiff import ops
from fastdiff.config.sections import Config
from fastdiff.precompile import Call, Recorder
from fastdiff.training.step_plan import forward_and_backward


def realised(call: Call, seed: int, device: torch.device) -> tuple[Any, ...]:
    """A call's arguments with memory: normal random numbers, or small integers; maps [B, C, H, W] are channels-last."""
    generator = torch.Generator(device).manual_seed(seed)
    return tree_map_only(Tensor, lambda x: _realised(x, generator, device), call.args)


def _realised(x: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    if x.dim() == 4:
        B, C, H, W = x.shape
        made = torch.empty(B, H, W, C, dtype=x.dtype, device=device).permute(0, 3, 1, 2)
    else:
        sizes = [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]  # expanded
        made = torch.empty_strided(sizes, x.stride(), dtype=x.dtype, device=device)
    if x.dtype.is_floating_point:
        made.normal_(generator=generator)
    else:
        made.random_(0, 64, generator=generator)
    return made.expand(x.shape)


def training_calls(config: Config, batch: int, precision: torch.dtype, names: str) -> list[Call]:
    """The calls of ops matching `names` in a step of `batch` images with all kernels, forward and backward.

    The step is recorded in eager code, but its norms add up gradients as in compiled code (`ops.eager_sums`). A block's
    first norm and its shortcut are two calls here, so that each can be timed.
    """
    apart = mock.patch.object(ops, "fuses_shortcut", return_value=False)
    with apart, warnings.catch_warnings(), Recorder(names) as recorder, ops.using("triton", anywhere=True):
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        with launch.record():  # some kernels are launched without an op
            forward_and_backward(config.model, config.diffusion, batch, precision)
    return list(recorder.calls.values())
