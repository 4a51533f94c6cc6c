"""Rows of kernel_figures.py: one call timed, its rates, and sums over the calls of a step."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_timing import Figure, rotated, time_calls
from fastdiff.errors import shortened
from fastdiff.precompile import Call
from fastdiff.runtime.machine import Rates

Row = dict[str, Any]
Emit = Callable[[Row], None]


class OutOfTime(Exception):
    """The section's seconds are used up."""


@dataclasses.dataclass
class Bench:
    """The device of the figures and the destination of their rows."""

    device: torch.device
    rates: Rates
    emit: Emit
    rounds: int = 15
    most: int = 0
    """The number of shapes of each kind that are timed, the costliest ones; 0 for all."""
    compiled: int = 6
    """The number of norms' shapes, forward and backward, on which torch.compile is timed, which takes seconds each."""
    until: float = float("inf")
    """The time.monotonic() after which no row begins."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def runs_kernels(self) -> bool:
        return self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

    def row(
        self,
        label: Row,
        make: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]],
        moved: float = 0,
        flops: float = 0,
        **more: Any,
    ) -> Figure | None:
        """Emit one row. make(i) → (function, the i-th set of arguments). An exception gives a row without figures."""
        if time.monotonic() > self.until:
            raise OutOfTime
        try:
            function, first_given = make(0)
            inputs = rotated(lambda i: make(i)[1] if i else first_given)
            figure = time_calls(function, inputs, self.device, self.rounds)
        except Exception as error:  # an error of one kernel costs its row only
            self.leave_out(label, error)
            return None
        self.emit({**label, **self._figures(figure, moved, flops), **more})
        return figure

    def leave_out(self, label: Row, error: Exception) -> None:
        """Emit a row without figures, with the reason."""
        first = next(iter(str(error).splitlines()), "")
        self.emit({**label, "left_out": shortened(f"{type(error).__name__}: {first}", 300)})

    def _figures(self, figure: Figure, moved: float, flops: float) -> Row:
        seconds = figure.microseconds / 1e6
        row: Row = {
            "microseconds": round(figure.microseconds, 2),
            "quartiles": [round(figure.low, 2), round(figure.high, 2)],
            "launched": figure.launched,
        }
        if moved:
            rate = moved / seconds
            share = rate / self.rates.copy_bytes
            row |= {"bytes": moved, "GB/s": round(rate / 1e9, 1), "share of copy": round(share, 3)}
        if flops:
            rate = flops / seconds
            share = rate / self.rates.matmul_flops
            row |= {"flops": flops, "TFLOP/s": round(rate / 1e12, 2), "share of matmul": round(share, 3)}
        return row

    def costliest(
        self, calls: Sequence[tuple[str, Call]], cost: Callable[[Call], float]
    ) -> Iterator[tuple[str, Call, int]]:
        """Yield (direction, call, its rank in its direction), the costliest in a step first; at most `most` of each."""
        ranks: Counter[str] = Counter()
        for direction, call in sorted(calls, key=lambda given: -cost(given[1]) * given[1].count):
            if not self.most or ranks[direction] < self.most:
                yield direction, call, ranks[direction]
                ranks[direction] += 1


class Sums:
    """Milliseconds per step of each direction and way, and how many of a step's calls they cover."""

    def __init__(self, calls: Sequence[tuple[str, Call]]) -> None:
        self.ms: dict[tuple[str, str], float] = defaultdict(float)
        self.covered: Counter[tuple[str, str]] = Counter()
        self.all: Counter[str] = Counter()
        for direction, call in calls:
            self.all[direction] += call.count

    def add(self, direction: str, way: str, figure: Figure | None, count: int) -> None:
        if figure is not None:
            self.ms[direction, way] += figure.microseconds * count / 1e3
            self.covered[direction, way] += count

    def emit(self, emit: Emit, label: Row) -> None:
        for (direction, way), ms in self.ms.items():
            covered = {"calls": self.covered[direction, way], "of": self.all[direction]}
            emit({**label, "direction": direction, "way": way, "ms_per_step": round(ms, 3), **covered})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def map_bytes(call: Call) -> int:
    """Bytes of all maps [B, C, H, W] among the arguments and results of a call: the least that it must move."""
    return sum(x.nbytes for x in tree_leaves((call.args, call.results())) if isinstance(x, Tensor) and x.dim() == 4)
