"""Captures work on a GPU as CUDA graphs and replays them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch

from fastdiff.errors import first_line


class GraphRunner:
    """Runs named pieces of work, each captured once as a CUDA graph and replayed from then on.

    All work runs on one side stream, in order with the current stream, and all graphs share one memory pool. A captured
    piece of work must read and write tensors at fixed addresses, and must not wait for the device.

    On a CPU, or with `use` False, `run` only calls the work. A capture can fail, for lack of memory or because of an
    operation that CUDA forbids in it: then `use` True raises the error, and "auto" warns and goes on without graphs.
    """

    def __init__(self, device: torch.device, use: bool | Literal["auto"]) -> None:
        self._stream = torch.cuda.Stream(device) if use and device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None
        self._optional = use == "auto"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    @property
    def enabled(self) -> bool:
        return self._stream is not None

    def run(
        self,
        name: Hashable,
        work: Callable[[], None],
        *,
        warming_up: bool,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Run `work`, or replay the graph captured under `name`.

        warming_up  Run without a graph: in the first calls code is compiled, and cuDNN chooses its kernels. The caller
                    counts, because pieces that share tensors have to be captured in the same round.
        prepare     Called once before the capture, for copies from the host, which a capture can't contain.
        """
        if self._stream is None:
            work()
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if warming_up:
                work()
            elif name in self._graphs or self._captured(name, work, prepare):
                self._graphs[name].replay()
            else:
                work()
        current.wait_stream(self._stream)
        if not warming_up and name not in self._graphs:
            self._stream = None
            self._graphs.clear()

    def clear(self) -> None:
        """Drop all graphs, because tensors have moved."""
        self._graphs.clear()

    def _captured(self, name: Hashable, work: Callable[[], None], prepare: Callable[[], None] | None) -> bool:
        """Capture the work as the graph `name`; returns whether that was possible."""
        if prepare is not None:
            prepare()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which load images or write files, may make CUDA calls during the capture.
        begin = functools.partial(torch.cuda.graph, stream=self._stream, capture_error_mode="thread_local")
        try:
            with begin(graph, pool=self._pool):
                work()
        except RuntimeError as error:
            if not self._optional:
                raise
            # A forbidden operation raises its own error first, and the end of the capture one that names no cause.
            reason = first_line(error.__context__ or error)
            warnings.warn(f"CUDA graphs: going on without them, because a capture failed: {reason}", stacklevel=3)
            self._end(graph, begin)
            return False
        self._graphs[name] = graph
        return True

    def _end(self, graph: torch.cuda.CUDAGraph, begin: Callable[..., AbstractContextManager[Any]]) -> None:
        """Do what PyTorch leaves undone where CUDA itself has ended a capture, because of a forbidden operation.

        Otherwise the allocator would believe for ever that the capture goes on and keep memory back, and the random
        number generators would wait for its end. Both functions of the allocator are private to PyTorch.
        """
        try:
            graph.pool()  # raises an error unless PyTorch has ended the capture
        except RuntimeError:
            device, pool = torch.cuda.current_device(), cast("tuple[int, int]", self._pool)
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
            with begin(torch.cuda.CUDAGraph()):  # frees the generators
                pass
