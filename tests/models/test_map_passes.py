"""How often a residual block moves a map to or from memory, counted over its operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdiff.kernels import launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import ops
from fastdiff.models.blocks import BetweenConv, Conv2d, ResBlock, Sum

B, C, SIDE = 2, 192, 64
MAP = B * C * SIDE * SIDE


class Passes(TorchDispatchMode):
    """Add up the elements of maps that operations read and write, in maps of C channels."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    @property
    def maps(self) -> float:
        return self.elements / MAP

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **kwargs or {})
        if op.is_view or op.name() in ("aten::_unsafe_view", "aten::detach", "aten::empty_strided"):
            return made
        given, results = (sum(map(_elements, tree_leaves(each))) for each in (args, made))
        self.elements += given + results
        if op.name() == "aten::convolution":
            self.elements += 2 * _elements(made) if args[2] is not None else 0  # PyTorch adds the bias afterwards
        elif op.name() == "aten::convolution_backward":
            self.elements += _elements(args[0])  # the gradient is read for the input's and for the weight's
            self.elements += _elements(args[0]) if args[-1][2] else 0  # and for the bias's
        elif op.name() == "aten::addmm":  # PyTorch copies what is added, and the product adds to the copy
            self.elements += 2 * _elements(args[0])
        elif op.name() == "fastdiff::norm_and_shortcut":
            total, skip, shortcut = made[0], args[3], made[3]
            self.elements += _elements(total) + _elements(skip)  # the products read what the norm has read
            self.elements += 2 * _elements(shortcut) if skip is not None else 0  # the second adds in place
        elif op.name() == "fastdiff::norm_and_shortcut_backward":
            dshortcut, x, skip = args[2], args[3], args[5]
            self.elements += 3 * _elements(dshortcut) + _elements(x) + _elements(skip)  # four products read them
            self.elements += 2 * (_elements(x) + _elements(skip))  # two gradients, written and read by the norm
        return made


def _elements(x: Any) -> int:
    """Elements of a map or of its rows; 0 of anything smaller."""
    return x.numel() if isinstance(x, Tensor) and x.numel() >= MAP // 2 and x.dim() != 3 else 0


def passes(channels: int, skip_channels: int, first: BetweenConv | None = None) -> float:
    """Return the passes of a block in the middle of a network: its input is a waiting sum, and so is its result.

    With `first` the input is that convolution's result, and its passes count, too.
    """
    with torch.device("meta"):
        block = ResBlock(channels + skip_channels, 768, C, 0.0, True).to(torch.bfloat16)
        make = lambda C: torch.empty(B, SIDE, SIDE, C, dtype=torch.bfloat16).permute(0, 3, 1, 2).requires_grad_()
        a, b, upstream, emb = make(channels), make(channels), make(C).detach(), torch.empty(B, 2 * C)
        skip = make(skip_channels) if skip_channels else None
        bias = torch.zeros(channels, requires_grad=True)
    with Passes() as counted, ops.using("triton", anywhere=True), launch.record():
        made = block(first(a) if first else Sum(a, b, bias), emb.requires_grad_(), skip)
        leaves = [a, *(first.parameters() if first else (b, bias)), *([skip] if skip is not None else [])]
        leaves += block.parameters()
        torch.autograd.grad(
            made.parts, leaves, [upstream, upstream, torch.empty_like(made.parts[2])], allow_unused=True
        )
    return counted.maps


def test_a_block() -> None:
    """Forward: the sum and its norm 4, a convolution 2, a norm 2, a convolution 2. Backward: 4, 3, 4, 4."""
    assert passes(C, 0) == 25


def test_a_convolution_before_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: the convolution 2, and the norm reads one map less. Backward: the convolution 4, its bias none.

    If the convolution adds its bias, that takes 2 passes and its gradient 1. The norm then writes no sum, but its
    gradient and that of the residual are added by 3 passes instead of 1.
    """
    with torch.device("meta"):
        first = BetweenConv(C, C, 3, padding=1).to(torch.bfloat16)
    assert passes(C, 0, first) == 25 + 2 - 1 + 4
    monkeypatch.setattr(BetweenConv, "forward", Conv2d.forward)
    assert passes(C, 0, first) == 25 + 2 - 2 + 4 + 3 + 2


def test_a_block_with_a_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two maps enter. Forward: 6, products 5, then 3, 2, 2. Backward: 4, 3, 6, products 8, and the norm 8."""
    assert passes(C, C) == 47
    monkeypatch.setattr(ops, "fuses_shortcut", lambda x, skip: False)
    assert passes(C, C) == 52
