"""Where the time of training steps goes: a trace for Perfetto (ui.perfetto.dev), and a table by class of work."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff.models import BackboneSettings
from fastdiff.models import cost as work
from fastdiff.models.unet import DTYPES
from fastdiff.runtime.machine import device_name, find, measure_rates
from fastdiff.training.device_step import WARM_UP
from fastdiff.training.diagnostics.roofline import Machine, predict
from fastdiff.training.settings import TrainSettings

SETTLING = WARM_UP + 2
"""Steps before the profile: compilation, choice of kernels, capture of graphs."""

CLASSES: dict[str, str] = {
    "communication": r"nccl|gloo|c10d|allreduce|all_reduce|allgather|reduce_scatter|broadcast",
    "optimiser": r"adamw|Optimizer\.|multi_tensor|foreach|^_squares$|^_sum$|update_ema|lerp|clip_grad|total_norm",
    "attention": r"flash|fmha|sdpa|attention|softmax|^_(forward|backward)_(short|long|whole)$|^_delta$",
    "norms": r"group_?norm|RowwiseMoments|FusedParams|InternalGradients|GammaBeta"
    r"|^_slab_|^_backward_sums$|^_apply(_backward)?$|^_(sum_)?moments$|^_finalize_|^_parameter_gradients$",
    "convolutions": r"conv(?!ert)|cudnn|implicit_gemm|wgrad|dgrad|fprop|upsample|mkldnn_reorder",
    "matrix products": r"addmm|\bmm\b|::mm|bmm|linear|gemm|nvjet|cutlass|matmul",
    "noising and loss": r"q_sample|diffusion_loss|^_combine$|sampler_step|image_(noise|uniform)|philox|searchsorted",
    "copies": r"memcpy|memset|copy_kernel|CatArray|aten::copy_|aten::_to_copy|aten::to$|aten::clone|aten::contiguous",
}
"""Class → what the names of its operations or GPU kernels hold; the first that matches counts. Our own Triton kernels
have the names of their functions in `kernels/`."""
POINTWISE, REDUCTIONS = "pointwise", "reductions"
GENERAL: dict[str, str] = {
    REDUCTIONS: r"reduce_kernel|aten::(sum|mean|var|std|amax|amin|all|any)$",
    POINTWISE: r"elementwise|aten::(add|sub|mul|div|neg|exp|log|sqrt|rsqrt|square|pow|clamp|where|fill|zero|silu)_?$",
}
"""The same for operations that may belong to anything: these count where no name around them says more."""
OTHER, GAPS, WAIT = "other", "launch gaps", "input wait"
_INDUCTOR = re.compile(r"triton_(poi|for|red|per|spl)_")
"""Kernels that Inductor generates. The rest of a name lists the operations it was fused from, a convolution where it
only adds that one's bias."""
_INDUCTOR_CLASSES = {"poi": POINTWISE, "for": POINTWISE, "red": REDUCTIONS, "per": REDUCTIONS, "spl": REDUCTIONS}


def _compiled(classes: dict[str, str]) -> list[tuple[str, re.Pattern[str]]]:
    return [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in classes.items()]


_PATTERNS = (_compiled(CLASSES), _compiled(GENERAL))


def classify(names: Sequence[str]) -> str:
    """The class of an operation, by its own name or else by those around it, innermost first."""
    if generated := _INDUCTOR.match(names[0]):
        return _INDUCTOR_CLASSES[generated[1]]
    for patterns in _PATTERNS:
        for name in names:
            for kind, pattern in patterns:
                if pattern.search(name):
                    return kind
    return OTHER


def floor_of(settings: BackboneSettings, train: TrainSettings, batch: int, device: torch.device) -> dict[str, float]:
    """The least milliseconds of each class in a step of `batch` images, by known or measured rates."""
    name = device_name(device)
    known = find(name) if train.precision != "fp32" else None
    if known:
        machine = Machine(name, known.matmul_flops, known.copy_bytes, known.peak_flops)
    else:
        rates = measure_rates(device, dtype=torch.float32 if device.type == "cpu" else DTYPES[train.precision])
        machine = Machine(name, rates.matmul_flops, rates.copy_bytes, None)
    element = work.SINGLE if train.precision == "fp32" or device.type == "cpu" else work.HALF
    updated = work.optimiser_bytes(len(train.ema_rate), half_copy=False)
    ops = work.operations(settings, element)
    predicted = predict(ops, batch, machine, launch_us=0.0, optimiser_bytes=updated)
    return {name: share.ms for name, share in predicted.shares.items() if share.ms}


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds per step of `batch` images. On a GPU `classes` are times of its kernels, and the gaps are when it
    ran none; on a CPU they are the operations' own times, and the gaps what Python took between them."""

    steps: int
    batch: int
    step_ms: float
    classes: dict[str, float]
    floor: dict[str, float]
    """The least they could take, by `fastdiff.training.diagnostics.roofline`."""
    device: str

    def rows(self) -> list[str]:
        """A table for people, largest first."""
        ordered = sorted(self.classes.items(), key=lambda item: -item[1])
        lines = [f"{'':18}{'ms/step':>10}{'share':>8}{'floor':>10}"]
        for name, ms in ordered:
            if ms:
                least = f"{self.floor[name]:10.2f}" if name in self.floor else f"{'-':>10}"
                lines.append(f"{name:18}{ms:10.2f}{ms / self.step_ms:8.1%}{least}")
        rate = 1e3 * self.batch / self.step_ms
        whole = f"{'step':18}{self.step_ms:10.2f}{1:8.1%}{sum(self.floor.values()):10.2f}"
        return [*lines, f"{whole}   {rate:.4g} images/s, {self.steps} steps on {self.device}"]


class StepProfiler:
    """Watches `steps` steps of a run once it has settled; `advance` after each step returns the result once.

    batch is this process's share, floor what `floor_of` says. Writes trace.json.gz, profile.json and profile.txt into
    the folder.
    """

    def __init__(self, steps: int, folder: Path, batch: int, device: torch.device, floor: dict[str, float]) -> None:
        self.steps, self.folder, self.batch, self.device, self.floor = steps, folder, batch, device, floor
        self._seen = 0
        self._profile: Any = None
        self._start = self._waited = 0.0

    def advance(self, data_wait: float) -> Breakdown | None:
        """After a step; data_wait is how long the run has waited for images so far, in seconds."""
        self._seen += 1
        if self._seen == SETTLING:
            self._begin(data_wait)
        elif self._seen == SETTLING + self.steps:
            return self._end(data_wait)
        return None

    def _begin(self, data_wait: float) -> None:
        cuda = self.device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self._synchronize()
        self._profile.start()
        self._start, self._waited = time.perf_counter(), data_wait

    def _end(self, data_wait: float) -> Breakdown:
        self._synchronize()
        seconds = time.perf_counter() - self._start
        self._profile.stop()
        found = times_of(self._profile, self.device)
        waited = data_wait - self._waited
        times = {**found.classes, WAIT: waited, GAPS: max(0.0, seconds - found.busy - waited)}
        per_step = {name: 1e3 * each / self.steps for name, each in times.items()}
        name = device_name(self.device)
        result = Breakdown(self.steps, self.batch, 1e3 * seconds / self.steps, per_step, self.floor, name)
        self._write(result)
        self._profile = None
        return result

    def _write(self, result: Breakdown) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        (self.folder / "profile.json").write_text(json.dumps(vars(result), indent=2) + "\n")
        (self.folder / "profile.txt").write_text("\n".join(result.rows()) + "\n")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Times:
    """Where the time of everything that a torch profiler recorded went, in seconds."""

    classes: dict[str, float]
    """Sums by class; where kernels run beside each other, more than `busy` together."""
    kernels: dict[str, tuple[float, int]]
    """Name → (seconds, launches) of each GPU kernel or CPU operation, the costliest first."""
    busy: float
    """How long the GPU ran anything at all; on a CPU the operations' own times together."""


def times_of(watched: profile, device: torch.device) -> Times:
    """What a stopped profiler saw: of the GPU's kernels on a GPU, which it must have been told to record, else of the
    operations."""
    found = list(_kernels(watched) if device.type == "cuda" else _operations(watched))
    classes: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, int]] = {}
    for names, start, end in found:
        seconds = (end - start) / 1e9
        classes[classify(names)] += seconds
        before, launches = kernels.get(names[0], (0.0, 0))
        kernels[names[0]] = before + seconds, launches + 1
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1][0]))
    spans = [(start, end) for _, start, end in found]
    busy = union(spans) / 1e9 if device.type == "cuda" else sum(classes.values())
    return Times(dict(classes), ordered, busy)


def _operations(watched: Any) -> Iterator[tuple[list[str], float, float]]:
    """(its name and those around it, 0, nanoseconds it took itself) of each; backward runs in a thread of its own."""
    for event in watched.events():
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        yield names, 0.0, 1e3 * event.self_cpu_time_total


def _kernels(watched: Any) -> Iterator[tuple[list[str], float, float]]:
    """(its name, start, end in nanoseconds) of each kernel, copy and fill on the GPU.

    Annotations (`record_function`, `ProfilerStep`) are left out: the profiler repeats them on the GPU's side, and they
    span kernels that are counted themselves.
    """
    for event in watched.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            yield [event.name()], event.start_ns(), event.start_ns() + event.duration_ns()


def union(spans: Sequence[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if start > reached:
            total += end - start
            reached = end
        elif end > reached:
            total += end - reached
            reached = end
    return total
