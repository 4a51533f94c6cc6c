"""Finds the first operation that makes a non-finite value in a run that diverges. Slow.

Every operation of the network, of the loss and of their backward pass is checked as it runs. Compiled code and CUDA
graphs would hide operations and must be off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOSS = "the loss"
_UNWRITTEN = ("empty", "new_empty", "resize", "set_")
"""Operations, by the beginnings of their names, whose results may be uninitialised memory."""


class NonFinite(Exception):
    """An operation made or was given a non-finite value; the message names it, its module and its inputs."""


class _Where:
    """Finds the module of the current operation by hooks; in the backward pass, that of its forward operation.

    An operation of the backward pass belongs to a node of autograd's graph, and its sequence number tells when in the
    forward pass it was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.weights = {id(parameter): name for name, parameter in model.named_parameters()}
        self.root = model
        self.stack: list[str] = []
        self.in_loss = False
        self.made_by: dict[int, str] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        if module is self.root and not self.stack:
            self.made_by.clear()
        self.stack.append(self.names[module])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        self.in_loss = not self.stack

    def place(self) -> tuple[str, str] | None:
        """(module, pass) of the current operation; None if it belongs neither to the network nor to the loss."""
        node = torch._C._current_autograd_node()
        if node is not None:
            self.in_loss = False
        if self.stack:
            name = self.stack[-1] or "the network"
            if node is None:
                self.made_by[torch._C._autograd._get_sequence_nr() - 1] = name
            return name, "forward pass"
        if node is not None:
            name = self.made_by.get(node._sequence_nr(), "")
            return (name, "backward pass") if name else None
        if not self.in_loss:
            return None
        self.made_by[torch._C._autograd._get_sequence_nr() - 1] = LOSS
        return LOSS, "forward pass"


class _Watch(TorchDispatchMode):
    """Raises NonFinite at the first operation with a result that is not finite."""

    def __init__(self, where: _Where, model: Any) -> None:
        super().__init__()
        self.where, self.model = where, model

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = self.where.place()
        if place is None or not self._matters(func, place, args, kwargs):
            return func(*args, **kwargs)
        given = list(_floats((args, kwargs)))
        # Inputs that the operation overwrites must be checked beforehand.
        before = self._report(given) if func._schema.is_mutable else None
        result = func(*args, **kwargs)
        made = [tensor for tensor in _floats(result) if not _finite(tensor)]
        if made:
            finite, described = before or self._report(given)
            raise NonFinite(_sentence(func, place, finite, described, made[0]))
        return result

    def _matters(self, func: Any, place: tuple[str, str], args: Any, kwargs: Any) -> bool:
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(_UNWRITTEN) or func.namespace in ("c10d", "_c10d_functional"):
            return False
        if place[1] == "backward pass" and self.model.dtype == torch.float16:
            return False  # overflows are expected while the loss scale is searched for
        numbers = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float))
        return all(map(math.isfinite, numbers))  # a non-finite number is given on purpose, such as for a mask

    def _report(self, tensors: list[Tensor]) -> tuple[bool, list[str]]:
        """Whether all tensors are finite, and a description of each."""
        described = [f"{self.where.weights.get(id(tensor), '')} {_describe(tensor)}".strip() for tensor in tensors]
        return all(map(_finite, tensors)), described


def _floats(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() and not leaf.is_meta:
            yield leaf


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _describe(tensor: Tensor) -> str:
    """Dtype, shape, range and non-finite values: "float32 [2, 8] from -1 to 3, 1 nan and 2 inf of 16"."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    finite = tensor[tensor.isfinite()]
    if finite.numel():
        head += f" from {float(finite.min()):.4g} to {float(finite.max()):.4g}"
    counts = {"nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}
    bad = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{head}, {bad} of {tensor.numel()}" if bad else head


def _sentence(func: Any, place: tuple[str, str], finite: bool, given: list[str], made: Tensor) -> str:
    name = func._schema.name.replace("::", ".")
    head = f"in the {place[1]} {name} in {place[0]} "
    of = "; ".join(given) or "no input"
    if finite:
        return f"{head}is the first operation to make a non-finite value: {_describe(made)}, of {of}"
    return f"{head}is the first operation to be given a non-finite value, by the weights or the images: {of}"


@contextmanager
def detect_anomaly(model: nn.Module) -> Iterator[None]:
    """Within the block the first operation of a step that makes a non-finite value raises NonFinite.

    model is the uncompiled network itself, also where DeepSpeed's engine runs it. The backward pass of an fp16 network
    is not checked: its overflows are how the loss scale is found.
    """
    where = _Where(model)
    with ExitStack() as hooks:
        for module in model.modules():
            for handle in (
                module.register_forward_pre_hook(where.enter),
                module.register_forward_hook(where.leave, always_call=True),
            ):
                hooks.callback(handle.remove)
        hooks.enter_context(_Watch(where, model))
        yield
