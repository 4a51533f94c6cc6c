"""Lets the norm's backward kernel add up two gradients of its input, which saves a pass over memory in compiled code.

A map that is read by the next block and as a skip gets a gradient from each. Autograd adds the two, and
`group_norm_silu_backward` would read their sum. `SumsInNorms` finds such sums in a graph and gives the op the summands.
`EagerSums` does the same without a graph, so that launches recorded in eager code are those of compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

BACKWARD = "fastdiff::group_norm_silu_backward"
_DY, _DTOTAL, _DTOTAL_MORE = 0, 1, 2  # places among the op's arguments


class SumsInNorms(CustomGraphPass):
    """A pass over Inductor's graphs, for its option post_grad_custom_pre_pass."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if _name(node.target) != BACKWARD or node.args[_DTOTAL_MORE] is not None:
                continue
            total = node.args[_DTOTAL]
            if not isinstance(total, fx.Node) or not _is_sum(total.target, total.args, total.kwargs):
                continue
            only_here = len(total.users) == 1 and total is not node.args[_DY]
            if only_here and _alike(*(each.meta["val"] for each in total.args)):  # type: ignore[union-attr]
                node.args = (*node.args[:_DTOTAL], *total.args, *node.args[_DTOTAL_MORE + 1 :])
                graph.erase_node(total)

    def uuid(self) -> Any:
        """The version of this pass, by which compiled code is kept."""
        return get_hash_for_files((__file__,))


class EagerSums(TorchDispatchMode):
    """Within this context, `SumsInNorms` applies to operations as they run; sums are computed all the same.

    A sum's readers that run after the norm's backward pass are not seen. A network has none: whatever else reads the
    sum is part of what the norm's dy is computed from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summands = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        total = args[_DTOTAL] if _name(op) == BACKWARD and args[_DTOTAL_MORE] is None else None
        if total in self.summands and total is not args[_DY]:
            args = (*args[:_DTOTAL], *self.summands[total], *args[_DTOTAL_MORE + 1 :])
        for each in args:
            if isinstance(each, Tensor):  # compiled code computes a sum that has another reader
                self.summands.pop(each, None)
        made = op(*args, **kwargs or {})
        if _is_sum(op, args, kwargs) and _alike(*args):
            self.summands[made] = args
        return made


def _name(op: Any) -> str:
    return op.name() if isinstance(op, torch._ops.OpOverload) else ""


def _is_sum(op: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    return op is torch.ops.aten.add.Tensor and not kwargs and all(isinstance(each, (Tensor, fx.Node)) for each in args)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether both are channels-last maps of one shape and dtype, none of them expanded or converted by their sum."""
    maps = all(each.dim() == 4 and each.is_contiguous(memory_format=torch.channels_last) for each in (a, b))
    return maps and a.shape == b.shape and a.dtype == b.dtype
