"""Records which operations a computation calls, with which arguments, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass
class Call:
    """Calls of one operation with arguments of the same shapes."""

    op: str
    """As torch.ops has it: "aten::convolution", "fastdiff::group_norm_silu"."""
    args: tuple[Any, ...]
    """Its tensors share memory with those of the computation, and have none on the meta device."""
    count: int = 0

    def function(self) -> Any:
        namespace, name = self.op.split("::")
        return getattr(getattr(torch.ops, namespace), name)

    def results(self) -> Any:
        """What it returns, computed anew."""
        return self.function()(*self.args)


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
    """A string of every tensor's dtype, shape, strides and offset, and the repr of everything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.storage_offset()}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(signature, value)) + ")"
    return repr(value)
