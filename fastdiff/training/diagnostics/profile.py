"""Profiles training steps, and predicts the least time of a step by a roofline.

`StepProfiler` writes a trace for Perfetto (ui.perfetto.dev) and a table of the time by class of operation, beside the
least time. That is what `predict` computes from the FLOPs and bytes of the operations and the rates of the machine.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff.models import cost
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings
from fastdiff.models.unet import DTYPES
from fastdiff.runtime.files import write_json, write_text
from fastdiff.runtime.machine import Gpu, Rates, device_name, find, measure_rates
from fastdiff.training.device_step import WARM_UP
from fastdiff.training.settings import TrainSettings

SETTLING = WARM_UP + 2
"""Steps before the profile, which compile code, choose kernels and capture graphs."""
CLASSES: dict[str, str] = {
    "communication": r"nccl|gloo|c10d|allreduce|all_reduce|allgather|reduce_scatter|broadcast",
    "optimiser": r"adamw|Optimizer\.|multi_tensor|foreach|^_squares$|^_sum$|update_ema|lerp|clip_grad|total_norm",
    "attention": r"flash|fmha|sdpa|attention|softmax|^_(forward|backward)_(short|long|whole)$|^_delta$",
    "norms": r"group_?norm|RowwiseMoments|FusedParams|InternalGradients|GammaBeta"
    r"|^_norm_(forward|backward)$|^_parameter_gradients$|^_output_",
    "convolutions": r"conv(?!ert)|cudnn|implicit_gemm|wgrad|dgrad|fprop|upsample|mkldnn_reorder",
    "matrix products": r"addmm|\bmm\b|::mm|bmm|linear|gemm|nvjet|cutlass|matmul",
    "noising and loss": r"q_sample|diffusion_loss|^_combine$|sampler_step|image_(noise|uniform)|philox|searchsorted"
    r"|^_timesteps_at$|^_add_losses$",
    "copies": r"memcpy|memset|copy_kernel|CatArray|aten::copy_|aten::_to_copy|aten::to$|aten::clone|aten::contiguous",
}
"""Class → pattern in the names of its operations or GPU kernels; the first match counts. Our own Triton kernels are
named after their functions in `kernels/`."""
POINTWISE, REDUCTIONS = "pointwise", "reductions"
GENERAL: dict[str, str] = {
    REDUCTIONS: r"reduce_kernel|aten::(sum|mean|var|std|amax|amin|all|any)$",
    POINTWISE: r"elementwise|aten::(add|sub|mul|div|neg|exp|log|sqrt|rsqrt|square|pow|clamp|where|fill|zero|silu)_?$",
}
"""The same for operations that may belong to any class: these count if no enclosing operation matches CLASSES."""
OTHER, GAPS, WAIT = "other", "launch gaps", "input wait"
_INDUCTOR = re.compile(r"triton_(poi|for|red|per|spl)_")
"""Kernels that Inductor generates. The rest of the name lists the fused operations: a convolution, for example, where
only its bias is added."""
_INDUCTOR_CLASSES = {"poi": POINTWISE, "for": POINTWISE, "red": REDUCTIONS, "per": REDUCTIONS, "spl": REDUCTIONS}
_PATTERNS = [
    [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in classes.items()] for classes in (CLASSES, GENERAL)
]
_KINDS = {
    "convolutions": ("conv3x3", "downsample conv", "upsample conv", "input conv", "output conv"),
    "matrix products": ("conv1x1", "embedding"),
    "norms": ("group norm",),
    "attention": ("attention",),
    "noising and loss": ("noising", "loss"),
    POINTWISE: ("residual", "skip", "resampling"),
}
CLASS_OF: dict[str, str] = {kind: name for name, kinds in _KINDS.items() for kind in kinds}
"""Kind of a `cost.Operation` → its class."""
FLOOR_CLASSES = (*_KINDS, "optimiser", GAPS)
"""The classes that are predicted: all but communication, reductions, copies, the input wait and others."""


# --- profiling ---


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds per step of `batch` images.

    On a GPU `classes` are times of kernels, and the gaps are times without one. On a CPU they are the operations' own
    times, and the gaps are Python's time between them.
    """

    steps: int
    batch: int
    step_ms: float
    classes: dict[str, float]
    floor: dict[str, float]
    """The least milliseconds of each class, as `floor_of` predicts it."""
    device: str

    def rows(self) -> list[str]:
        """The lines of a table, largest class first."""
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
    """Profiles `steps` steps of a run after its first SETTLING ones, and writes the result into a folder.

    batch  images of this process per step
    floor  result of `floor_of`
    The files are trace.json.gz, profile.json and profile.txt.
    """

    def __init__(self, steps: int, folder: Path, batch: int, device: torch.device, floor: dict[str, float]) -> None:
        self.steps, self.folder, self.batch, self.device, self.floor = steps, folder, batch, device, floor
        self._seen = 0
        self._profile: Any = None
        self._start = self._waited = 0.0

    @property
    def finished(self) -> bool:
        """Whether all steps have been profiled."""
        return self._seen >= SETTLING + self.steps

    def advance(self, data_wait: float) -> Breakdown | None:
        """Count a step; returns the breakdown after the last profiled one, else None.

        data_wait  seconds that the run has waited for images so far
        """
        self._seen += 1
        if self._seen == SETTLING:
            self._begin(data_wait)
        elif self._seen == SETTLING + self.steps:
            return self._end(data_wait)
        return None

    def close(self) -> None:
        """Stop a profile that is still open, because a process that ends with one crashes."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _begin(self, data_wait: float) -> None:
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profile = profile(activities=activities, acc_events=True)  # one cycle; without it torch warns
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
        write_json(self.folder / "profile.json", vars(result))
        write_text(self.folder / "profile.txt", "\n".join(result.rows()) + "\n")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- what the profiler recorded ---


@dataclass(frozen=True)
class Times:
    """Seconds of everything that a torch profiler recorded."""

    classes: dict[str, float]
    """Sum of each class; together more than `busy` where kernels ran at the same time."""
    kernels: dict[str, tuple[float, int]]
    """Name → (seconds, launches) of each GPU kernel or CPU operation, the costliest first."""
    busy: float
    """Time in which the GPU ran anything; on a CPU the sum of the operations' own times."""


def classify(names: Sequence[str]) -> str:
    """The class of an operation, by its own name or else by those of the enclosing ones, innermost first."""
    if generated := _INDUCTOR.match(names[0]):
        return _INDUCTOR_CLASSES[generated[1]]
    for patterns in _PATTERNS:
        for name in names:
            for kind, pattern in patterns:
                if pattern.search(name):
                    return kind
    return OTHER


def times_of(watched: profile, device: torch.device) -> Times:
    """Times that a stopped profiler recorded: of the kernels on a GPU, else of the operations."""
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
    """([its name and those of enclosing operations], 0, own nanoseconds) of each operation."""
    for event in watched.events():
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        yield names, 0.0, 1e3 * event.self_cpu_time_total


def _kernels(watched: Any) -> Iterator[tuple[list[str], float, float]]:
    """([its name], start, end in nanoseconds) of each kernel, copy and fill on the GPU.

    Annotations (`record_function`, `ProfilerStep`), which the profiler repeats for the GPU, are left out: they span
    kernels that are counted themselves.
    """
    for event in watched.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            yield [event.name()], event.start_ns(), event.start_ns() + event.duration_ns()


def union(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# --- the roofline ---


@dataclass(frozen=True)
class Share:
    """One class of operations: FLOPs (as run) and bytes per image, and milliseconds per step."""

    run_flops: float
    bytes: float
    ms: float


def predict(
    ops: Sequence[cost.Operation],
    batch: int,
    rates: Rates | Gpu,
    *,
    convolution_efficiency: float = 1.0,
    copy_efficiency: float = 1.0,
    launch_us: float = 2.0,
    optimiser_bytes: int = 38,
) -> dict[str, Share]:
    """Predict each class of a step over `batch` images: forward, backward and one update.

    launch_us        microseconds between two kernels
    optimiser_bytes  bytes that the update moves per weight
    """
    products, copies = rates.matmul_flops * convolution_efficiency, rates.copy_bytes * copy_efficiency
    totals = {name: [0.0, 0.0, 0.0] for name in FLOOR_CLASSES}
    launches = 1
    for op in ops:
        total = totals[CLASS_OF[op.kind]]
        passes = zip((1, 2), (op.forward_bytes, op.backward_bytes), op.weight_bytes, op.launches, strict=True)
        for times, moved, weights, kernels in passes:
            flops = times * op.run_flops * batch
            moved = moved * batch + weights
            for i, value in enumerate((flops, moved, max(flops / products, moved / copies))):
                total[i] += value
            launches += kernels
    updated = float(optimiser_bytes * cost.parameters(ops))
    totals["optimiser"] = [0.0, updated, updated / copies]
    totals[GAPS] = [0.0, 0.0, launches * launch_us * 1e-6]
    return {name: Share(flops / batch, moved / batch, 1e3 * s) for name, (flops, moved, s) in totals.items()}


def floor_of(settings: NetworkSettings, train: TrainSettings, batch: int, device: torch.device) -> dict[str, float]:
    """The least milliseconds of each class in a step of `batch` images, by known or measured rates.

    They are not known for classifiers.
    """
    if isinstance(settings, ClassifierSettings):
        return {}
    name = device_name(device)
    dtype = torch.float32 if device.type == "cpu" else DTYPES[train.precision]
    rates = (find(name) if train.precision != "fp32" else None) or measure_rates(device, dtype=dtype)
    element = cost.SINGLE if train.precision == "fp32" or device.type == "cpu" else cost.HALF
    updated = cost.optimiser_bytes(len(train.ema_rate), half_copy=element == cost.HALF)
    ops = cost.operations(settings, element)
    shares = predict(ops, batch, rates, launch_us=0.0, optimiser_bytes=updated)
    return {name: share.ms for name, share in shares.items() if share.ms}
