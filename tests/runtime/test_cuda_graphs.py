"""A GraphRunner makes the right CUDA calls in the right order, on a simulated GPU that records them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastdiff.runtime.cuda_graphs import GraphRunner

GPU = torch.device("cuda")


class Stream:
    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name = calls, name

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, calls: list[str], number: int) -> None:
        self.calls, self.name = calls, f"graph {number}"

    def pool(self) -> str:
        if self.calls[-1] != "captured":
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return "the pool"

    def replay(self) -> None:
        self.calls.append(f"replay {self.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that are made, in order."""
    made: list[str] = []
    graphs: list[Graph] = []

    def new_graph() -> Graph:
        graphs.append(Graph(made, len(graphs)))
        return graphs[-1]

    @contextmanager
    def stream(side: Stream) -> Iterator[None]:
        made.append(f"on {side.name}")
        yield
        made.append("back")

    @contextmanager
    def capture(graph: Graph, *, pool: Any = None, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        made.append(f"capture {graph.name}, {pool}, {stream.name}, {capture_error_mode}")
        yield
        made.append("captured")

    current = Stream(made, "main")
    for name, value in {
        "Stream": lambda device: Stream(made, "side"),
        "current_stream": lambda: current,
        "stream": stream,
        "CUDAGraph": new_graph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        call = lambda device, pool, name=name: made.append(f"{name} {device} {pool}")
        monkeypatch.setattr(torch._C, name, call, raising=False)
    return made


def on_side(*made: str) -> list[str]:
    return ["side waits for main", "on side", *made, "back", "main waits for side"]


def test_captured_once_and_replayed(calls: list[str]) -> None:
    runner = GraphRunner(GPU, True)

    def run(name: str, warming_up: bool = False, prepare: bool = False) -> list[str]:
        calls.clear()
        given = {"prepare": lambda: calls.append("prepare")} if prepare else {}
        runner.run(name, lambda: calls.append(name), warming_up=warming_up, **given)
        return list(calls)

    for _ in range(2):
        assert run("first", warming_up=True, prepare=True) == on_side("first")
    captured = ["capture graph 0, pool, side, thread_local", "first", "captured", "replay graph 0"]
    assert run("first", prepare=True) == on_side("prepare", *captured)
    assert run("first", prepare=True) == on_side("replay graph 0")
    captured = ["capture graph 1, pool, side, thread_local", "more", "captured", "replay graph 1"]
    assert run("more") == on_side(*captured)
    assert run("first") == on_side("replay graph 0")
    runner.clear()
    assert run("more")[2] == "capture graph 2, pool, side, thread_local"


@pytest.mark.parametrize(("device", "use"), [("cuda", False), ("cpu", True), ("cpu", "auto")])
def test_without_graphs(calls: list[str], device: str, use: Any) -> None:
    runner = GraphRunner(torch.device(device), use)
    assert not runner.enabled
    for warming_up in (True, False):
        runner.run("first", lambda: calls.append("first"), warming_up=warming_up)
    assert calls == ["first", "first"]


def refused(calls: list[str], refuse: list[bool]) -> Any:
    """Return work that fails within a capture while `refuse` says so."""

    def work() -> None:
        calls.append("work")
        if refuse[0] and "capture graph" in calls[-2:][0]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    return work


def test_capture_that_fails(calls: list[str]) -> None:
    """With "auto" the work is done without a graph, now and later, and what CUDA has left open is ended."""
    refuse = [False]
    runner, work = GraphRunner(GPU, "auto"), refused(calls, refuse)
    runner.run("first", work, warming_up=False)
    assert runner.enabled
    calls.clear()
    refuse[0] = True
    with pytest.warns(UserWarning, match=r"CUDA graphs: going on without them, .*: CUDA out of memory\.$"):
        runner.run("more", work, warming_up=False)
    ended = ["_cuda_endAllocateToPool 0 pool", "_cuda_releasePool 0 pool"]
    ended += ["capture graph 2, None, side, thread_local", "captured"]
    assert calls == on_side("capture graph 1, pool, side, thread_local", "work", *ended, "work")
    assert not runner.enabled
    calls.clear()
    runner.run("first", work, warming_up=False)
    assert calls == ["work"]


def test_capture_that_names_no_cause(calls: list[str]) -> None:
    """The warning has the error that came before the one of the capture's end, and can do without a message."""

    def work() -> None:
        if calls[-1].startswith("capture graph"):
            try:
                raise ValueError("an item was asked for")
            except ValueError:
                raise RuntimeError from None

    with pytest.warns(UserWarning, match=r"a capture failed: ValueError: an item was asked for$"):
        GraphRunner(GPU, "auto").run("first", work, warming_up=False)


def test_capture_that_must_not_fail(calls: list[str]) -> None:
    runner = GraphRunner(GPU, True)
    with pytest.raises(torch.OutOfMemoryError):
        runner.run("first", refused(calls, [True]), warming_up=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operation_that_a_capture_forbids_gpu() -> None:
    """After a capture that CUDA itself has ended random numbers can be drawn, and all memory can be freed."""
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    _draw_with_a_wait()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved


def _draw_with_a_wait() -> None:
    x, runner = torch.zeros(1 << 24, device="cuda"), GraphRunner(GPU, "auto")

    def work() -> None:
        x.copy_(torch.rand_like(x))
        x.sum().item()

    runner.run("first", work, warming_up=True)
    with pytest.warns(UserWarning, match="going on without them"):
        runner.run("first", work, warming_up=False)
    assert not runner.enabled
    before = x.clone()
    runner.run("first", work, warming_up=False)
    assert not torch.equal(x, before)
