"""Short calls are timed by the right number of calls, also if no graph can be captured."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_on_a_cpu() -> None:
    """On a CPU all inputs are used, in plain calls, and the figure is per call."""
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(float(x))
        time.sleep(0.001)
        return x

    inputs = [(torch.tensor(float(i)),) for i in range(3)]
    figure = gpu_timing.time_calls(call, inputs, CPU, rounds=2)
    assert set(seen) == {0.0, 1.0, 2.0}
    assert len(seen) == 3 * (1 + 1 + 2)
    assert 1e3 <= figure.low <= figure.microseconds <= figure.high
    assert figure.launched == "plain"


class Graph:
    """A graph on a simulated GPU, which records what is captured and replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        time.sleep(0.001)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    """The only graph of a simulated GPU."""
    made = Graph()
    for name in ("synchronize", "current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    return made


def test_a_function_that_cannot_be_captured_is_called(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    calls: list[None] = []
    batch = gpu_timing.batch_of(lambda: calls.append(None), [(), ()], CUDA)
    assert batch.launched == "plain: operation not permitted when stream is capturing"
    before = len(calls)
    batch.run()
    assert len(calls) - before == batch.count >= gpu_timing.LAUNCHES


def test_a_captured_function_is_only_replayed(graph: Graph) -> None:
    """A graph has at least LAUNCHES calls, and is replayed often enough to fill a batch."""
    calls: list[None] = []
    batch = gpu_timing.batch_of(lambda: calls.append(None), [()] * 3, CUDA)
    assert batch.launched == "graph"
    assert len(calls) == 3 * 3 + 21, "three passes before the capture, and seven in it"
    before = graph.replays
    batch.run()
    assert len(calls) == 3 * 3 + 21, "nothing is launched from Python"
    assert (graph.replays - before) * 21 == batch.count


def test_results_are_kept_for_a_pass() -> None:
    """Otherwise every call would write to the same memory, which is in the cache."""
    places = []

    def call(x: Tensor) -> Tensor:
        y = x + 1
        places.append(y.data_ptr())
        return y

    gpu_timing.time_calls(call, [(torch.zeros(1000),)] * 4, CPU, rounds=1)
    assert [len(set(places[i : i + 4])) for i in range(0, len(places), 4)] == [4, 4, 4]


def test_rotated() -> None:
    """A CPU needs one set of inputs; tensors in dicts and tuples are found."""
    assert len(gpu_timing.rotated(lambda i: ({"skip": (torch.zeros(10), None)},))) == 1
    assert len(gpu_timing.rotated(lambda i: (1, "a"))) == gpu_timing.MAX_SETS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_gpu() -> None:
    """Forward and backward are captured; a function that reads a number on the host is timed by plain calls."""
    with gpu_timing.own_stream(CUDA):
        make = lambda i: (torch.randn(1 << 20, device="cuda", requires_grad=True),)
        inputs = gpu_timing.rotated(make)
        assert len(inputs) == gpu_timing.L2_BYTES // (4 << 20)
        assert gpu_timing.time_calls(torch.sin, inputs, CUDA).launched == "graph"
        waiting = gpu_timing.time_calls(lambda x: x.sum().item(), inputs, CUDA)
        assert waiting.launched.startswith("plain: ")
        outputs = [(x.sin(), x) for (x,) in inputs]
        backward = lambda y, x: torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert gpu_timing.time_calls(backward, outputs, CUDA).launched == "graph"
