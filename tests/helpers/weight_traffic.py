"""Counts the bytes that a training step moves for weights and their gradients, beside its products."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"}


class WeightTraffic(TorchDispatchMode):
    """Follows the weights of linear layers and convolutions from the parameters to the products, and back to `.grad`.

    What products themselves read and write is not counted: every implementation does.

    eager  name of each operation in between → bytes that it reads and writes
    fused  bytes if every chain of such operations were one pass, as a compiler can make it: its first read, its last
           write
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.eager: Counter[str] = Counter()
        self.fused = 0
        self._storages: dict[int, Any] = {}  # keeps them alive, so that no other storage gets the same key
        self._made: set[int] = set()  # by the operations that are counted
        self._read: set[tuple[int, int]] = set()
        self.products = 0
        for parameter in model.parameters():
            if parameter.dim() > 1:
                self._follow(parameter)

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return storage._cdata

    def _followed(self, values: Any) -> list[Tensor]:
        found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [leaf for leaf in found if leaf.untyped_storage()._cdata in self._storages]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name, given = func.name().split(".")[0], self._followed((args, kwargs))
        if name in PRODUCTS:
            self.products += 1
            for tensor in given:
                self._end(tensor)
            if name == "aten::convolution_backward" and made[1] is not None:
                self._follow(made[1])
            elif name != "aten::convolution" and not given:  # a product of two maps is the gradient of a weight
                self._follow(made)
        elif given and func.namespace == "aten" and not func.is_view and "embedding" not in name:
            results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
            self.eager[name] += sum(tensor.nbytes for tensor in [*given, *results])
            for tensor in given:
                if tensor.untyped_storage()._cdata not in self._made:
                    self.fused += tensor.nbytes
            for tensor in results:
                self._made.add(self._follow(tensor))
        return made

    def _end(self, tensor: Tensor) -> None:
        """A chain ends in a product, or as a gradient: its result is written, once."""
        key = tensor.untyped_storage()._cdata
        if key in self._made:
            self._made.discard(key)
            self.fused += tensor.untyped_storage().nbytes()

    def finish(self, model: nn.Module) -> None:
        """Count the gradients that operations have made, after a backward pass."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._end(parameter.grad)
