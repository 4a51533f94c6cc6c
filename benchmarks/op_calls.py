"""Which operations a training step calls with which shapes, and how often: recorded on tensors without memory."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from fastdiff.kernels.reference import CounterNoise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdiff import ops
from fastdiff.config import Config
from fastdiff.diffusion import create_diffusion
from fastdiff.models import SuperResSettings
from fastdiff.models.work import on_meta


@dataclass
class Call:
    """Calls of one operation with arguments of the same shapes."""

    op: str
    """As torch.ops has it: "aten::convolution", "fastdiff::group_norm_silu"."""
    args: tuple[Any, ...]
    """Its tensors are on the meta device."""
    count: int = 0

    def function(self) -> Any:
        namespace, name = self.op.split("::")
        return getattr(getattr(torch.ops, namespace), name)

    def results(self) -> Any:
        """What it returns, on the meta device."""
        return self.function()(*self.args)

    def realised(self, seed: int, device: torch.device) -> tuple[Any, ...]:
        """Arguments with memory: normal random numbers, or small whole ones; maps of four dimensions channels-last."""
        generator = torch.Generator(device).manual_seed(seed)
        return tree_map_only(Tensor, lambda x: _realised(x, generator, device), self.args)


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


class Recorder(TorchDispatchMode):
    """Counts the calls of operations whose names match a regular expression from their beginning on."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names = re.compile(names)
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if self.names.match(name):
            key = f"{name} {signature(args)}"
            if key not in self.calls:
                self.calls[key] = Call(name, tree_map_only(Tensor, Tensor.detach, args))
            self.calls[key].count += 1
        return func(*args, **(kwargs or {}))


def signature(value: Any) -> str:
    """Shapes, dtypes and strides of tensors, and all else as it is."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(signature, value)) + ")"
    return repr(value)


def training_calls(config: Config, batch: int, precision: torch.dtype, names: str) -> list[Call]:
    """The calls of a whole step of `batch` images, forward and backward, as it runs eagerly with all our kernels."""
    meta = torch.device("meta")
    model = on_meta(config.model).train().set_precision(precision)
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    C, (H, W) = config.model.in_channels, config.model.size_hw
    index = torch.empty(batch, dtype=torch.int64, device=meta)
    kwargs: dict[str, Any] = {"y": index} if config.model.class_cond else {}
    if isinstance(config.model, SuperResSettings):
        kwargs["low_res"] = torch.empty(batch, C, *config.model.small_size, device=meta)
    images = torch.empty(batch, H, W, C, dtype=torch.uint8, device=meta)
    with warnings.catch_warnings(), Recorder(names) as recorder, ops.using("triton", anywhere=True):
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        noise = CounterNoise(0, index, (C, H, W))
        diffusion.training_losses(model, images, index, kwargs, noise)["loss"].mean().backward()
    return list(recorder.calls.values())
