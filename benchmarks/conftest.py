"""What the benchmarks of kernels share: where they run, how they are timed, what is written beside each figure.

    make bench-kernels        →  benchmarks/results/kernels_<device>.json

Rows of one group compute the same thing at one shape: ours, PyTorch eager, torch.compile, and a peer where there is
one. pytest-benchmark runs their rounds one after the other; inputs are rotated so that together they exceed the L2
cache, and every round is a batch of launches between two synchronisations.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

L2_BYTES = 64 << 20  # more than any GPU's L2 of today but Blackwell's larger part
LAUNCHES = 20


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
def copy_rate(device: torch.device) -> float:
    """Bytes per second of a device copy, read and write counted: what memory-bound kernels are measured by."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source, target = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    seconds = _seconds(lambda: target.copy_(source), device, launches=10)
    return 2 * size / seconds


@pytest.fixture(scope="session")
def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device, launches=10)


def _seconds(fn: Callable[[], Any], device: torch.device, launches: int) -> float:
    import time

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(4):
        synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            fn()
        synchronize()
        best = min(best, (time.perf_counter() - start) / launches)
    return best


def rotated(make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Inputs make(0), make(1), … until their tensors exceed the L2 cache together (at most 16, at least 2)."""
    made, total = [], 0
    while len(made) < 2 or (total < L2_BYTES and len(made) < 16):
        made.append(make(len(made)))
        total += sum(x.nbytes for x in made[-1] if isinstance(x, torch.Tensor))
        if made[-1] and not any(isinstance(x, torch.Tensor) and x.is_cuda for x in made[-1]):
            break  # on a CPU one is enough
    return made


@pytest.fixture
def gpu_time(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """gpu_time(fn, inputs, bytes_moved=…, flops=…): times fn over rotated inputs; the rates go beside the seconds."""

    def run(
        fn: Callable[..., Any],
        inputs: Sequence[tuple[Any, ...]],
        bytes_moved: float | None = None,
        flops: float | None = None,
    ) -> None:
        launches = LAUNCHES if device.type == "cuda" else 1

        def batch() -> None:
            for i in range(launches):
                fn(*inputs[i % len(inputs)])
            if device.type == "cuda":
                torch.cuda.synchronize()

        batch()  # compiling and choosing kernels, off the clock
        benchmark.pedantic(batch, rounds=15 if device.type == "cuda" else 3, warmup_rounds=1)
        seconds = benchmark.stats.stats.median / launches
        info = benchmark.extra_info
        info["microseconds"] = round(seconds * 1e6, 2)
        if bytes_moved:
            info["GB/s"] = round(bytes_moved / seconds / 1e9, 1)
            info["share of copy"] = round(bytes_moved / seconds / request.getfixturevalue("copy_rate"), 3)
        if flops:
            info["TFLOP/s"] = round(flops / seconds / 1e12, 2)
            info["share of matmul"] = round(flops / seconds / request.getfixturevalue("matmul_rate"), 3)

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
