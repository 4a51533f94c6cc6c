"""Builds one variant of a training step or of a drawing, times it, and counts what it launches.

bench_train.py and bench_sampling.py time several variants in turns. A process that times one variant alone does

    processes = start()
    case = Case(load("cifar10_uncond"), 256, "bf16", processes)         # or sampling_variants.DrawCase
    measure(lambda: VARIANTS["ours"](case), case, emit, seconds=4.0)    # VARIANTS of bench_train or bench_sampling

and `emit` is called with each figure as soon as it is known. `measure` consists of `build`, `timed` and `profiled`.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff import ops
from fastdiff.runtime import machine
from fastdiff.runtime.machine import use_free_cores
from fastdiff.runtime.processes import Processes
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.diagnostics.profile import times_of

Step = Callable[[], Any]

LAUNCHES: dict[str, str] = {
    "kernels": r"cu(da)?Launch(Cooperative)?Kernel",
    "graphs": r"cu(da)?GraphLaunch",
    "copies and fills": r"cu(da)?Mem(cpy|set)",
    "waits": r"cuda(Stream|Event)Synchronize",
}
"""Kind of call → regular expression of the beginning of its name in CUDA's runtime or driver."""
_HOST_SAMPLES = 10


class Timed(Protocol):
    """A case as `measure` needs it: its device, and rates that follow from the seconds of a step."""

    @property
    def device(self) -> torch.device: ...

    def rates(self, seconds: float) -> dict[str, float | None]: ...


@dataclass
class Built:
    """A variant that has taken its first steps."""

    step: Step
    start_seconds: float
    """Seconds from the variant's construction to the end of its first step, including compilation and kernel choice."""
    peak_memory: float
    """Bytes that the variant and one step of it take."""


class Timing(NamedTuple):
    """Milliseconds per step."""

    ms: list[float]
    """The mean of each round, which lies between two synchronisations."""
    host_ms: float
    """The time until the host has launched a step on an idle device; the median over some steps. For a step that waits
    for the device itself, and for every step on a CPU, this is the whole time."""


class HostCost(NamedTuple):
    """What one step costs the host of a GPU; None on a CPU, which computes the step itself."""

    host_ms: float | None
    """The time until the host has launched a step on an idle GPU; the median over some steps."""
    launches: dict[str, float] | None
    """Calls of each kind in `LAUNCHES`; None also where the profiler doesn't see them, as in a rehearsal."""


@dataclass(frozen=True)
class Profile:
    """A profiler's findings, per step."""

    wall_ms: float
    """Includes the profiler's own cost, which slows a step bound by the host; `timed` measures the true time."""
    busy_ms: float
    """On a GPU the time in which it ran anything, on a CPU that of all operations."""
    classes: dict[str, float]
    """Milliseconds by class of `fastdiff.training.diagnostics.profile`, the largest first."""
    top: list[tuple[float, float, str]]
    """The costliest GPU kernels, or operations of a CPU: (milliseconds, calls, name)."""
    launches: dict[str, float] | None
    """Calls of each kind in `LAUNCHES`; None where the profiler doesn't see them."""


def start(threads: int = 0) -> Processes:
    """Set up this process as a run does: the kernels, cuDNN's choice, and the cache of compiled code.

    threads  of a CPU; 0 takes the cores that are free, and leaves torch's number with a GPU.
    """
    processes = start_processes()
    if threads:
        torch.set_num_threads(threads)
    elif processes.device.type == "cpu":
        use_free_cores()
    ops.use("auto")
    machine.keep_compiled_code()
    machine.prepare_cudnn()
    return processes


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- building ---


def build(make: Callable[[], Step], device: torch.device) -> Built:
    """Make a variant and take its first steps. Exceptions of the variant are passed on."""
    torch._dynamo.config.recompile_limit = 64  # variants share their code, and each compiles it for itself
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    begin = time.perf_counter()
    step = make()
    step()
    synchronize()
    seconds = time.perf_counter() - begin
    for _ in range(4 if device.type == "cuda" else 1):  # enough to capture CUDA graphs, too
        step()
    return Built(step, seconds, peak_memory(step, device, before))


def peak_memory(step: Step, device: torch.device, before: int) -> float:
    """The most bytes alive in a step, less the `before` bytes that were there before its variant.

    On a CPU, only those that the step itself allocates. What CUDA graphs keep for their replays counts as alive.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        kept = bytes_kept_by_graphs(torch.cuda.memory_snapshot())
        return torch.cuda.max_memory_allocated(device) + kept - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


def bytes_kept_by_graphs(segments: list[dict[str, Any]]) -> int:
    """Bytes of `torch.cuda.memory_snapshot()` that belong to CUDA graphs' private pools and to no tensor alive."""
    private = [s for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in private)


# --- timing ---


@contextmanager
def few_objects_to_collect() -> Iterator[None]:
    """Keep Python's garbage collection from visiting all objects of the compilation, which takes tenths of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds_of(step: Step, count: int = 1) -> float:
    """Seconds per step over `count` steps, from one synchronisation to the next."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - begin) / count


def timed(step: Step, seconds: float, rounds: int = 3) -> Timing:
    """Time a built variant over about `seconds` seconds, in `rounds` rounds of as many steps each."""
    with few_objects_to_collect():
        once = seconds_of(step)
        count = max(1, round(seconds / rounds / once))
        times = [1e3 * seconds_of(step, count) for _ in range(rounds)]
        host = host_ms(step, max(2, min(_HOST_SAMPLES, round(seconds / 5 / once))))
    return Timing(times, host)


def host_ms(step: Step, samples: int = _HOST_SAMPLES) -> float:
    """Milliseconds until the host has launched a step on an idle device; the median of some steps."""
    hosts = []
    for _ in range(samples):
        synchronize()
        begin = time.perf_counter()
        step()
        hosts.append(1e3 * (time.perf_counter() - begin))
    synchronize()
    return statistics.median(hosts)


def host_cost(step: Step, device: torch.device) -> HostCost:
    """Measure what a built variant's step costs the host."""
    if device.type != "cuda":
        return HostCost(None, None)
    with few_objects_to_collect():
        taken = host_ms(step)
    return HostCost(taken, launches_of(step))


def launches_of(step: Step, steps: int = 2) -> dict[str, float] | None:
    """Calls of each kind in `LAUNCHES` that the host makes in one step; None where the profiler doesn't see them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        seconds_of(step, steps)
    return _launches(watched, steps)


def _launches(watched: profile, steps: int) -> dict[str, float] | None:
    events = watched.profiler.kineto_results.events()
    found = count_launches([e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CPU])
    return {kind: count / steps for kind, count in found.items()} if found["kernels"] or found["graphs"] else None


# --- profiles ---


def count_launches(names: list[str]) -> dict[str, int]:
    """The number of calls of CUDA's runtime and driver of each kind in `LAUNCHES`."""
    return {kind: sum(1 for name in names if re.match(pattern, name)) for kind, pattern in LAUNCHES.items()}


def profiled(step: Step, device: torch.device, steps: int = 3, top: int = 40) -> Profile:
    """Profile `steps` steps of a built variant; `top` is the number of kernels that are listed."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as watched:
        wall = steps * seconds_of(step, steps)
    found = times_of(watched, device)
    return Profile(
        wall_ms=1e3 * wall / steps,
        busy_ms=1e3 * found.busy / steps,
        classes={name: 1e3 * value / steps for name, value in sorted(found.classes.items(), key=lambda i: -i[1])},
        top=[(1e3 * value / steps, n / steps, name) for name, (value, n) in list(found.kernels.items())[:top]],
        launches=_launches(watched, steps) if cuda else None,
    )


def measure(
    make: Callable[[], Step],
    case: Timed,
    emit: Callable[..., None],
    seconds: float = 4.0,
    rounds: int = 3,
    profile_steps: int = 0,
) -> None:
    """Build a variant, time it and, with `profile_steps`, profile it. Raises what the variant raises.

    emit is called with keyword arguments, first start_seconds and peak_memory_gb, then ms (of each round), host_ms and
    the case's rates, last the fields of `Profile`: as soon as each is known.
    """
    built = build(make, case.device)
    emit(start_seconds=built.start_seconds, peak_memory_gb=built.peak_memory / 1e9)
    timing = timed(built.step, seconds, rounds)
    emit(ms=timing.ms, host_ms=timing.host_ms, **case.rates(statistics.median(timing.ms) / 1e3))
    if profile_steps:
        emit(**vars(profiled(built.step, case.device, profile_steps)))
