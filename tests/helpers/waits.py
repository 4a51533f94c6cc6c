"""Finds operations that would make the host wait for a GPU; this works on a CPU, where nothing waits."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::unique")
"""Prefixes of operations that read numbers from the device, or whose result size depends on values."""
COPIES = (torch.tensor, torch.as_tensor)
"""Functions that make a tensor from host numbers: on a GPU they copy from unpinned memory."""


class Waits(ExitStack):
    """A context that counts in `seen`, by name, calls that would wait for a GPU or fail in a CUDA graph."""

    def __enter__(self) -> Waits:
        self.seen: Counter[str] = Counter()
        self.enter_context(_Reads(self.seen))
        self.enter_context(_Copies(self.seen))
        return self


class _Reads(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0].startswith(READS):
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in COPIES and not isinstance(args[0], torch.Tensor):
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))
