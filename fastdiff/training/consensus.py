"""Lets all ranks act on a request of any rank after the same step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Consensus:
    """Collects requests of this rank after each step and returns those of all ranks one step later, without waiting.

    The all-reduce of a step runs beside the next step, over a CPU group of its own: it costs the GPU nothing and keeps
    ranks at most one step apart. A lone process gets its requests back at once.
    """

    def __init__(self, world_size: int, requests: int, timeout: timedelta) -> None:
        self._alone = world_size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=timeout)
        self._flags = torch.zeros(requests, dtype=torch.uint8)
        self._known = [False] * requests  # of all ranks, not yet returned
        self._running: Any = None

    def exchange(self, requests: Sequence[bool]) -> list[bool]:
        """Send this step's requests; returns what any rank requested after the step before. Collective."""
        if self._alone:
            return list(requests)
        self._finish()
        agreed, self._known = self._known, [False] * len(self._known)
        self._flags = torch.tensor(requests, dtype=torch.uint8)
        self._running = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def forget(self, *which: int) -> None:
        """Drop requests sent so far that are being served. Collective."""
        self._finish()
        for number in which:
            self._known[number] = False

    def any(self, request: bool) -> bool:
        """Whether any rank requests it now; waits, and leaves the requests of `exchange` alone. Collective."""
        if self._alone:
            return request
        self._finish()
        flag = torch.tensor([request], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def close(self) -> None:
        """Wait for the last exchange. Collective."""
        self._finish()

    def _finish(self) -> None:
        if self._running is not None:
            self._running.wait()
            self._running = None
            self._known = [known or bool(flag) for known, flag in zip(self._known, self._flags, strict=True)]
