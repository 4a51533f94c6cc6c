"""Times a function that takes microseconds on a GPU, by a CUDA graph of many calls, which excludes Python's time.

A call of a custom op takes about 100 us of the host's time, longer than most kernels run. So the calls are captured
once and replayed. They go over several sets of inputs that together exceed the L2 cache, and keep their results until
the last of them, so that neither what is read nor what is written stays in the cache from one pass to the next. A
function that can't be captured is launched from Python call by call, and its figure says so. On a CPU every function
is.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

L2_BYTES = 64 << 20  # more than any GPU's L2 of today but Blackwell's larger part
MAX_SETS = 16
LAUNCHES = 20
"""Calls in a graph, or in a batch of plain launches on a GPU, at least."""
_BATCH_SECONDS = 4e-3  # of replays between two synchronisations, which cost tens of microseconds

Function = Callable[..., Any]
Inputs = Sequence[tuple[Any, ...]]


def rotated(make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Inputs make(0), make(1), … until their tensors exceed the L2 cache together: 2 to MAX_SETS sets; 1 on a CPU."""
    made = [make(0)]
    tensors = _tensors(made[0])
    if tensors and not any(x.is_cuda for x in tensors):
        return made
    total = sum(x.nbytes for x in tensors)
    while len(made) < 2 or (total < L2_BYTES and len(made) < MAX_SETS):
        made.append(make(len(made)))
        total += sum(x.nbytes for x in _tensors(made[-1]))
    return made


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: torch keeps freed memory for the stream that it belonged to


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be captured. Inputs with an autograd graph must be made in it to time their backward pass:
    autograd runs each operation's backward in the stream of its forward, and the default stream can't be captured."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_stream(device)):
        yield
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Batch:
    """Calls to be timed together: `run` makes `count` calls and waits for the device."""

    run: Callable[[], None]
    count: int
    launched: str
    """How: "graph", "plain", or "plain: " and the reason why no graph could be captured."""


@dataclass(frozen=True)
class Figure:
    """Microseconds of one call: the median of the rounds, and their quartiles."""

    microseconds: float
    low: float
    high: float
    launched: str
    """As in `Batch`."""


def batch_of(fn: Function, inputs: Inputs, device: torch.device) -> Batch:
    """Prepare calls fn(*inputs[0]), fn(*inputs[1]), … after some untimed ones, which compile and choose kernels."""
    passes = math.ceil(LAUNCHES / len(inputs)) if device.type == "cuda" else 1
    for _ in range(3 if device.type == "cuda" else 1):
        _one_pass(fn, inputs)
    _synchronize(device)
    if device.type != "cuda":
        return Batch(lambda: _one_pass(fn, inputs), len(inputs), "plain")
    try:
        replay, launched = _capture(fn, inputs, passes), "graph"
    except Exception as error:  # CUDA refuses an operation, or the function a value
        _synchronize(device)
        first = next(iter(str(error).splitlines()), type(error).__name__)
        replay, launched = lambda: _passes(fn, inputs, passes), f"plain: {first}"
    replay()
    _synchronize(device)
    begin = time.perf_counter()
    replay()
    _synchronize(device)
    replays = max(1, math.ceil(_BATCH_SECONDS / (time.perf_counter() - begin)))

    def run() -> None:
        for _ in range(replays):
            replay()
        _synchronize(device)

    return Batch(run, replays * passes * len(inputs), launched)


def figure_of(batch: Batch, rounds: int = 15) -> Figure:
    """Time a prepared batch `rounds` times."""
    times = []
    batch.run()
    for _ in range(rounds):
        begin = time.perf_counter()
        batch.run()
        times.append(1e6 * (time.perf_counter() - begin) / batch.count)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if rounds > 1 else times * 3
    return Figure(middle, low, high, batch.launched)


def time_calls(fn: Function, inputs: Inputs, device: torch.device, rounds: int = 15) -> Figure:
    """Prepare calls as `batch_of` does, and time them."""
    return figure_of(batch_of(fn, inputs, device), rounds)


def _one_pass(fn: Function, inputs: Inputs) -> None:
    results = [fn(*given) for given in inputs]  # all kept until the last is made
    del results


def _passes(fn: Function, inputs: Inputs, passes: int) -> None:
    for _ in range(passes):
        _one_pass(fn, inputs)


def _capture(fn: Function, inputs: Inputs, passes: int) -> Callable[[], None]:
    """Capture the calls in the current stream, or where that is the default stream in one of the graph's own."""
    current = torch.cuda.current_stream()
    stream = None if current == torch.cuda.default_stream() else current
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _passes(fn, inputs, passes)
    return graph.replay


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
