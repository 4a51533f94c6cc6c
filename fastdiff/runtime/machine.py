"""What a GPU can do: datasheets, what is typically reached of them, and what this machine reaches.

Peaks are dense bf16 with float32 accumulation, and bandwidth is the memory's, both from NVIDIA's datasheets. The rates
of an H200 are those of an 8192 x 8192 matrix product (788 TFLOP/s) and of a device copy, read and write counted
(4.3 TB/s); the other GPUs' are the same shares of their datasheets, an assumption until `measure_rates` replaces it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

MATMUL_SHARE = 788 / 989
"""Of the datasheet's FLOP/s that a large matrix product reaches, on an H200."""
COPY_SHARE = 4.3 / 4.8
"""Of the datasheet's bandwidth that a device copy reaches, on an H200."""


@dataclass(frozen=True)
class Gpu:
    """A datasheet and two rates; FLOP/s, bytes/s and bytes."""

    name: str
    peak_flops: float
    bandwidth: float
    memory: float
    matmul_flops: float
    copy_bytes: float
    names: str
    """Regular expression of what torch.cuda.get_device_name() calls it."""


def _gpu(name: str, teraflops: float, terabytes: float, gigabytes: float, names: str) -> Gpu:
    peak, bandwidth = teraflops * 1e12, terabytes * 1e12
    return Gpu(name, peak, bandwidth, gigabytes * 1e9, peak * MATMUL_SHARE, bandwidth * COPY_SHARE, names)


# PCIe and NVL boards of the same chips are slower, and GB200 is faster: none of them is meant.
GPUS: dict[str, Gpu] = {
    "H200": _gpu("H200", 989, 4.8, 141, r"H200(?! NVL)"),
    "H100": _gpu("H100 SXM", 989, 3.35, 80, r"H100 (SXM|80GB HBM3)|H100$"),
    "A100": _gpu("A100 80GB SXM", 312, 2.039, 80, r"A100-SXM4-80GB|A100 (80GB )?SXM|A100$"),
    "B200": _gpu("B200", 2250, 8.0, 180, r"(?<!G)B200"),
}


def find(name: str) -> Gpu | None:
    """The GPU that torch.cuda.get_device_name() calls `name` ("NVIDIA H100 80GB HBM3"); None if the table lacks it."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.names, name.strip())), None)


def device_name(device: torch.device) -> str:
    """The GPU's, or the CPU's model ("AMD EPYC 9655P 96-Core Processor") where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


_SIZE = {True: 8192, False: 1024}  # on a GPU, on a CPU
_COPY_SIZE = {True: 1 << 30, False: 1 << 26}


@dataclass(frozen=True)
class Rates:
    """What one device reached: FLOP/s of a matrix product, and bytes/s of a copy, read and write counted."""

    matmul_flops: float
    copy_bytes: float


def measure_rates(
    device: torch.device, *, dtype: torch.dtype | None = None, size: int = 0, copy_size: int = 0, repeats: int = 5
) -> Rates:
    """The best of `repeats` rounds of each.

    dtype      of the matrix product; by default bf16 on a GPU and float32 on a CPU.
    size       of the square matrices; by default 8192 on a GPU and 1024 on a CPU.
    copy_size  bytes copied; by default 1 GiB on a GPU and 64 MiB on a CPU, more than caches hold.
    """
    cuda = device.type == "cuda"
    matmul = _matmul_rate(device, dtype or (torch.bfloat16 if cuda else torch.float32), size or _SIZE[cuda], repeats)
    source = torch.zeros(copy_size or _COPY_SIZE[cuda], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Rates(matmul, 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, repeats))


def _matmul_rate(device: torch.device, dtype: torch.dtype, n: int, repeats: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=product), device, repeats)


def _best_seconds(fn: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of one call. A round on a GPU is 10 calls between two synchronisations, so that launching them doesn't count."""
    calls = 10 if device.type == "cuda" else 1

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    fn()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of this machine or the part of it that a container grants."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = next(int(words[1]) for words in lines if words[0] == "file")  # cached files give way
        return min(free, limit - used + cached)
    except (OSError, ValueError, StopIteration):  # no container, or one without a limit
        return free


_INTERVAL = 0.25
"""Seconds over which the machine is watched."""


def use_free_cores(before: int | None = None) -> int:
    """Set torch's threads to the free cores, unless OMP_NUM_THREADS says how many; returns their number.

    before is how many a run had that goes on: as many again, where there are so many cores, for sums over another
    number of threads differ in their last bits.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        again = before is not None and 0 < before <= max(1, _allowed() // _fellows())
        torch.set_num_threads(before if before is not None and again else free_cores())
    return torch.get_num_threads()


def free_cores() -> int:
    """Cores that this process may use and that nobody else is busy on, at least 1.

    Of several processes on this machine each takes its share of the cores, and looks at no one's load: its fellows'
    would be in it.
    """
    cores, fellows = _allowed(), _fellows()
    if fellows > 1:
        return max(1, cores // fellows)
    idle = _idle()
    return max(1, cores if idle is None else min(cores, math.floor(idle + 0.5)))


def _fellows() -> int:
    """Processes of this run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _allowed() -> int:
    """Cores by the scheduler's mask and the container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def _idle() -> float | None:
    """Cores that were idle for a moment just now; None where the system doesn't tell."""
    before = _idle_seconds()
    start = time.perf_counter()
    time.sleep(_INTERVAL)
    after = _idle_seconds()
    if before is None or after is None:
        return None
    return (after - before) / (time.perf_counter() - start)


def _idle_seconds() -> float | None:
    """Idle time of all cores since the machine started, waiting for disks included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
