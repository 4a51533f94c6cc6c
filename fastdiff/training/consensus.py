"""What any rank asks for, all do after the same step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Consensus:
    """Wishes of this rank, given after each step; those of all ranks, known one step later and without waiting.

    The exchange of a step runs beside the next one, over a group of its own on the CPU, so it costs the GPU nothing and
    keeps ranks at most one step apart. A lone process knows at once.
    """

    def __init__(self, world_size: int, wishes: int, timeout: timedelta) -> None:
        self._alone = world_size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=timeout)
        self._flags = torch.zeros(wishes, dtype=torch.uint8)
        self._known = [False] * wishes  # of all ranks, and not yet given out
        self._running: Any = None

    def exchange(self, wishes: Sequence[bool]) -> list[bool]:
        """Give this step's wishes; what any rank wished after the step before (alone: after this one). Collective."""
        if self._alone:
            return list(wishes)
        self._take()
        agreed, self._known = self._known, [False] * len(self._known)
        self._flags = torch.tensor(wishes, dtype=torch.uint8)
        self._running = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def forget(self, *which: int) -> None:
        """Drop wishes given so far: what they were for is being done."""
        self._take()
        for number in which:
            self._known[number] = False

    def _take(self) -> None:
        if self._running is not None:
            self._running.wait()
            self._running = None
            self._known = [known or bool(flag) for known, flag in zip(self._known, self._flags, strict=True)]

    def any(self, wish: bool) -> bool:
        """Whether any rank wishes it now. Collective; waits. The wishes of `exchange` are not touched."""
        if self._alone:
            return wish
        self._take()
        flag = torch.tensor([wish], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def close(self) -> None:
        """Let the last exchange end. Collective."""
        self._take()
