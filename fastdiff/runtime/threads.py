"""How many threads PyTorch gets on a CPU: as many as there are free cores.

More would be slower, not faster: threads that wait at the end of each parallel loop for one that has no core spin.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

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
