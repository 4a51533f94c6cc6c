"""Captures work on a GPU as CUDA graphs and replays them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class GraphRunner:
    """Runs named pieces of work, each captured once as a CUDA graph and replayed from then on.

    All work runs on one side stream, in order with the current stream, and all graphs share one memory pool. A captured
    piece of work must read and write tensors at fixed addresses, and must not wait for the device. With `enabled` False
    `run` only calls the work.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._stream = torch.cuda.Stream(device) if enabled else None
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
            else:
                if name not in self._graphs:
                    self._graphs[name] = self._capture(work, prepare)
                self._graphs[name].replay()
        current.wait_stream(self._stream)

    def clear(self) -> None:
        """Drop all graphs, because tensors have moved."""
        self._graphs.clear()

    def _capture(self, work: Callable[[], None], prepare: Callable[[], None] | None) -> torch.cuda.CUDAGraph:
        if prepare is not None:
            prepare()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # thread_local: other threads, which load images or write files, may make CUDA calls during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph
