"""The micro-batch: how many images a process computes at once, and the memory that a training step needs for them.

`split_batch` cuts a process's share of the batch into equal micro-batches. Where the setting is "auto", `fit` chooses
the fastest size that fits by `estimate`: a step runs on tensors that have sizes and lifetimes but no memory, and the
largest sum of the sizes alive at once is what an allocator would have to provide. Two batch sizes give the fixed part
and the part per image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.models import UNet
from fastdiff.models.arrangement import arrange_weights
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import NetworkSettings
from fastdiff.models.unet import body_dtype, dummy_batch
from fastdiff.runtime.machine import best_seconds, free_memory, local_processes
from fastdiff.runtime.processes import Processes
from fastdiff.training.objective import Objective
from fastdiff.training.settings import TrainSettings

if TYPE_CHECKING:
    from fastdiff.training.step_plan import StepPlan

BUCKET = 50_000_000
"""Elements that ZeRO reduces at once. DeepSpeed's default of 500 million would take 1 GB in 16 bits."""
LARGEST_BUCKET = 100_000_000
"""The same where gradients are reduced during the backward pass, for networks of 300 million parameters and more."""
SPARE = 0.08
"""Share of the free memory left for what the estimate leaves out: cuDNN's workspaces, fragments, other programs."""
TRIED = 4
"""How many micro-batch sizes are timed, the largest that fit."""


def overlaps(zero_stage: int, world_size: int) -> bool:
    """Whether ZeRO reduces gradients while the backward pass computes (DeepSpeed's overlap_comm).

    It does so with several processes at stages 1 and 2. This takes a second bucket, and after the reductions of a
    backward pass the host waits for the GPU, whose next kernels are then launched a little late. At stage 0 DeepSpeed
    always reduces after the backward pass, and stage 3 has a schedule of its own.
    """
    return world_size > 1 and zero_stage in (1, 2)


def bucket_size(zero_stage: int, world_size: int, parameters: int) -> int:
    """Elements of the buckets in which ZeRO reduces the gradients of a network with this many parameters.

    A compiled region (`models.regions`) returns all its gradients at once, and DeepSpeed lets the backward pass wait
    when a second bucket is full before the first one is reduced. So with small buckets little would overlap. Of three
    buckets, two are reduced during the backward pass of the regions, and only the last one after it.
    """
    return min(LARGEST_BUCKET, -(-parameters // 3)) if overlaps(zero_stage, world_size) else BUCKET


def split_batch(train: TrainSettings, world_size: int) -> int:
    """The micro-batch of a process: the largest that `microbatch` allows and that divides its share of the batch.

    Micro-batches are equal, so that the mean over them is the mean over images. Raises UserError for a batch that can't
    be shared out evenly.
    """
    if train.batch_size % world_size:
        near = max(1, round(train.batch_size / world_size)) * world_size
        raise UserError(
            f"batch_size {train.batch_size} is over all processes and can't be shared by {world_size}; {near} can"
        )
    share = train.batch_size // world_size
    return _divisors(share, share if train.microbatch in (-1, "auto") else int(train.microbatch))[0]


def _divisors(share: int, limit: int) -> list[int]:
    """The numbers up to `limit` that divide the share evenly, from large to small."""
    return [size for size in range(min(limit, share), 0, -1) if share % size == 0]


# --- choosing ---


@dataclass(frozen=True)
class Fit:
    """The values chosen, and lines for the log that explain them."""

    microbatch: int
    use_checkpoint: bool
    lines: list[str]


def fit(
    model: NetworkSettings,
    plan: StepPlan,
    objective: Objective,
    processes: Processes,
    before: int | None = None,
    always_estimate: bool = False,
) -> Fit:
    """Choose the micro-batch and use_checkpoint; collective if sizes have to be timed.

    before           Micro-batch of the run that this one resumes. It is kept if it fits, because dropout masks depend
                     on it.
    always_estimate  Estimate the memory on a CPU even if nothing is "auto", which takes seconds; on a GPU it is
                     always done.

    Raises UserError if not even one image fits.
    """
    train, share, micro = plan.train, plan.share, plan.micro
    fixed = train.microbatch != "auto" and model.use_checkpoint != "auto"
    if fixed and processes.device.type == "cpu" and not always_estimate:
        return Fit(micro, model.use_checkpoint is True, [])

    available = available_memory(processes)
    wanted = min(8, share) if train.microbatch == "auto" else micro
    for recompute in (False, True) if model.use_checkpoint == "auto" else (model.use_checkpoint is True,):
        settings = model.model_copy(update={"use_checkpoint": recompute})
        memory = estimate(
            settings, train, objective, plan.dtype, processes.device, plan.world_size, not plan.engine_reason
        )
        if micro < share or memory.most(int(available * (1 - SPARE))) < share:
            memory = memory.accumulating()
        most = memory.most(int(available * (1 - SPARE)))
        if most >= wanted:
            break
    lines = [f"use_checkpoint auto: {recompute}"] if model.use_checkpoint == "auto" else []
    if train.microbatch == "auto":
        if not most:
            raise UserError(
                f"--microbatch auto: not even one image fits, {memory.describe(1, available)}; "
                + ("partition the optimiser over more processes" if recompute else "try --use_checkpoint True")
            )
        if before is not None and before <= most and share % before == 0:
            micro = before
            lines.append(f"microbatch auto: {micro}, as the run began")
        else:
            micro, rates = _fastest(settings, train, objective, processes, _divisors(share, most)[:TRIED])
            tried = ", ".join(f"{size}: {rate:.4g} images/s" for size, rate in rates.items())
            lines.append(f"microbatch auto: {micro} ({tried})")
        if micro < share:
            memory = memory.accumulating()
    elif micro > most:
        lines.append(f"this may not fit: try --microbatch auto{'' if recompute else ' or --use_checkpoint auto'}")
    return Fit(micro, recompute, [*lines, memory.describe(micro, available)])


def available_memory(processes: Processes) -> int:
    """Bytes that this process may use: the free memory of its GPU, or its share of the machine's free memory."""
    free = free_memory(processes.device)
    return free if processes.device.type == "cuda" else free // local_processes()


def _fastest(
    model: NetworkSettings,
    train: TrainSettings,
    objective: Objective,
    processes: Processes,
    sizes: Sequence[int],
) -> tuple[int, dict[int, float]]:
    """The size with the most images/s in forward and backward pass on the slowest process, and all sizes' rates."""
    seconds = torch.zeros(len(sizes), dtype=torch.float64)
    network = build_network(model).to(processes.device).train()
    network.set_precision(body_dtype(train.precision, processes.device))
    for i, size in enumerate(sizes):
        try:
            seconds[i] = seconds_of_step(network, objective, processes.device, size) / size
        except torch.OutOfMemoryError:
            seconds[i] = float("inf")
        network.zero_grad(set_to_none=True)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    if processes.world_size > 1:
        slowest = seconds.to(processes.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = slowest.cpu()
    best = int(seconds.argmin())
    if not torch.isfinite(seconds[best]):
        raise UserError(f"--microbatch auto: not even {sizes[-1]} images fit at once; try --use_checkpoint True")
    return sizes[best], {size: 1 / each for size, each in zip(sizes, seconds.tolist(), strict=True)}


def seconds_of_step(network: UNet | Classifier, objective: Objective, device: torch.device, size: int) -> float:
    """Seconds of a forward and backward pass on `size` images."""
    return best_seconds(dummy_step(network, objective, device, size), device, rounds=2)


def dummy_step(network: UNet | Classifier, objective: Objective, device: torch.device, size: int) -> Callable[[], None]:
    """A forward and backward pass on `size` black images, for timing; it adds to the parameters' gradients."""
    batch = dummy_batch(network.settings, size, device)

    def step() -> None:
        objective.training_losses(network, *batch)["loss"].mean().backward()

    return step


# --- estimating the memory ---


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside it create and that are alive: `now`, and their `peak`.

    Sizes are rounded up to `block`, because an allocator hands out whole blocks.
    """

    def __init__(self, block: int = 512) -> None:
        super().__init__()
        self.block = block
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, made=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, made=True)
        return result

    def _see(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.block) * self.block if made else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        return forget


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    """Weights, in the precision that the step stores them in, and the 16-bit copies that a `DeviceStep` keeps."""
    gradients: int
    optimizer: int
    """AdamW's moments and the float32 master weights of 16-bit weights."""
    averages: int
    per_image: int
    """Activations and intermediate results at the peak of forward and backward pass."""
    fixed: int
    """Intermediate results that don't depend on the batch."""
    sums: int = 0
    """Float32 sums of 16-bit gradients, which a step over several micro-batches needs besides."""

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages

    def of(self, micro_batch: int) -> int:
        """Total bytes for micro-batches of `micro_batch` images."""
        return self.states + self.fixed + micro_batch * self.per_image

    def accumulating(self) -> Memory:
        """The memory of a step over several micro-batches: the sums are gradients."""
        return replace(self, gradients=self.gradients + self.sums, sums=0)

    def describe(self, micro_batch: int, available: int) -> str:
        """One line for the log."""
        parts = {name: getattr(self, name) for name in ("weights", "gradients", "optimizer", "averages")}
        parts["activations"] = self.fixed + micro_batch * self.per_image
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        return f"expected memory: {self.of(micro_batch) / 1e9:.2f} of {available / 1e9:.1f} GB ({listed})"

    def most(self, available: int) -> int:
        """The largest micro-batch that fits into `available` bytes; 0 if none does."""
        return max(0, (available - self.states - self.fixed) // self.per_image)


def estimate(
    model: NetworkSettings,
    train: TrainSettings,
    objective: Objective,
    dtype: torch.dtype,
    device: torch.device,
    world_size: int = 1,
    on_device: bool = False,
) -> Memory:
    """Estimate the memory of a training step with the network's body in `dtype`, without touching `device`.

    on_device: the step is a `DeviceStep`, without DeepSpeed, and its master weights are the network's float32 ones.
    """
    halves = train.precision != "fp32" and not on_device
    arranges = on_device and device.type == "cuda" and train.kernels != "reference"
    sizes = (2, 4)
    # Ops choose their implementation by device: fake tensors stand in for the CPU's, meta tensors for a GPU's.
    stand_in = FakeTensorMode() if device.type == "cpu" else torch.device("meta")
    with stand_in:
        network = build_network(model.model_copy(update={"use_checkpoint": model.use_checkpoint is True}))
        objective = replace(objective)  # a copy, so that the caller's caches no stand-in tables
        network.train().set_precision(dtype)
        if arranges:
            arrange_weights(network)
        elif halves:
            network.to(dtype)
        peaks = [_peak(network, objective, device, size, train.kernels) for size in sizes]
    count = sum(p.numel() for p in network.parameters())
    copied = sum(p.numel() for p in network.parameters() if arranges and p.dtype != torch.float32)
    per_image = (peaks[1] - peaks[0]) // (sizes[1] - sizes[0])
    shared = [world_size if train.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    master = 4 * count // shared[0] if halves else 0
    bucket = bucket_size(train.zero_stage, world_size, count) if train.zero_stage and not on_device else 0
    buckets = 2 if overlaps(train.zero_stage, world_size) else 1  # one is filled while the other is reduced
    return Memory(
        weights=(2 if halves else 4) * count // shared[2] + 2 * copied,
        gradients=(2 if halves else 4) * count // shared[1] + (4 * count // shared[0] if halves else 0) - 2 * copied,
        optimizer=8 * count // shared[0] + master,
        averages=4 * count // shared[0] * len(train.ema_rate),
        per_image=per_image,
        fixed=max(0, peaks[0] - sizes[0] * per_image) + (2 if halves else 4) * bucket * buckets,
        sums=4 * copied,
    )


def _peak(network: UNet | Classifier, objective: Objective, device: torch.device, size: int, kernels: str) -> int:
    """Peak bytes of a forward and backward pass on `size` images, without weights and their gradients."""
    for p in (*network.parameters(), *(network.projection or ())):
        p.grad = torch.zeros_like(p)  # DeepSpeed keeps gradients in buffers of its own
    batch = dummy_batch(network.settings, size, next(network.parameters()).device)
    mode: ops.Kernels = "triton" if device.type == "cuda" and kernels != "reference" else "auto"
    with ops.using(mode, anywhere=True), LiveBytes() as live:
        objective.training_losses(network, *batch)["loss"].mean().backward()
    return live.peak
