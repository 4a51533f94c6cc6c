"""Fixtures of the kernels' benchmarks: the device, the timer, and the data recorded beside each figure.

    make bench-kernels        →  benchmarks/results/kernels.json

Rows of one group compute the same thing at one shape: ours, PyTorch eager, torch.compile, and a peer where there is
one. pytest-benchmark runs their rounds one after the other; every round is a batch of calls between two
synchronisations, replayed by CUDA graphs over inputs that together exceed the L2 cache (see gpu_timing.py).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gpu_timing import batch_of, own_stream

from fastdiff.runtime.machine import Rates, measure_rates


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name the GPU, its driver and the versions that decide the figures."""
    machine_info["torch"] = torch.__version__
    try:
        import triton

        machine_info["triton"] = triton.__version__
    except ImportError:
        machine_info["triton"] = "not installed"
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine_info["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def small(device: torch.device) -> bool:
    """Whether shapes should shrink: on a CPU, where only PyTorch's rows run."""
    return device.type == "cpu"


@pytest.fixture(scope="session")
def rates(device: torch.device) -> Rates:
    """The rates that kernels are compared with: a device copy and a large matrix product."""
    return measure_rates(device)


@pytest.fixture(autouse=True)
def _stream_to_capture(device: torch.device) -> Iterator[None]:
    """Inputs are made where their backward pass can be captured."""
    with own_stream(device):
        yield


@pytest.fixture
def gpu_time(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """gpu_time(fn, inputs, bytes_moved=…, flops=…): times fn over rotated inputs; the rates go beside the seconds."""

    def run(
        fn: Callable[..., Any],
        inputs: Sequence[tuple[Any, ...]],
        bytes_moved: float | None = None,
        flops: float | None = None,
    ) -> None:
        batch = batch_of(fn, inputs, device)
        benchmark.pedantic(batch.run, rounds=15 if device.type == "cuda" else 3, warmup_rounds=1)
        seconds = benchmark.stats.stats.median / batch.count
        info = benchmark.extra_info
        info["microseconds"] = round(seconds * 1e6, 2)
        info["launched"] = batch.launched
        if bytes_moved:
            info["GB/s"] = round(bytes_moved / seconds / 1e9, 1)
            info["share of copy"] = round(bytes_moved / seconds / request.getfixturevalue("rates").copy_bytes, 3)
        if flops:
            info["TFLOP/s"] = round(flops / seconds / 1e12, 2)
            info["share of matmul"] = round(flops / seconds / request.getfixturevalue("rates").matmul_flops, 3)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A table with one line per row: group, name, microseconds, rate, share, and the ratio to the group's first row."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if b.extra_info]
    if not rows:
        return
    terminalreporter.section("kernels")
    ours = {b.group: b.extra_info["microseconds"] for b in rows if b.name.split("[")[1].startswith("ours")}
    for row in sorted(rows, key=lambda b: (b.group or "", b.extra_info["microseconds"])):
        info = row.extra_info
        rate = "  ".join(f"{key} {info[key]}" for key in info if key != "microseconds")
        ratio = info["microseconds"] / ours[row.group] if row.group in ours else float("nan")
        name = row.name.split("[")[1].rstrip("]")
        terminalreporter.write_line(f"{row.group:44} {name:34} {info['microseconds']:10} us  {ratio:5.2f}x  {rate}")
