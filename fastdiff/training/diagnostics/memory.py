"""Estimates how much of a device's memory a training step needs, before anything is allocated there.

A step runs on tensors that have sizes and lifetimes but no memory. The largest sum of the sizes alive at once is what
an allocator would have to provide. Two batch sizes give the fixed part and the part per image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.models import BackboneSettings, UNet, build_model
from fastdiff.models.unet import dummy_batch
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import BUCKET


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
    """Weights, in the precision that the step stores them in."""
    gradients: int
    optimizer: int
    """AdamW's moments and the float32 master weights of 16-bit weights."""
    averages: int
    per_image: int
    """Activations and intermediate results at the peak of forward and backward pass."""
    fixed: int
    """Intermediate results that don't depend on the batch."""

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages

    def of(self, micro_batch: int) -> int:
        """Total bytes for micro-batches of `micro_batch` images."""
        return self.states + self.fixed + micro_batch * self.per_image

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
    model: BackboneSettings,
    train: TrainSettings,
    diffusion: GaussianDiffusion,
    dtype: torch.dtype,
    device: torch.device,
    world_size: int = 1,
    on_device: bool = False,
) -> Memory:
    """Estimate the memory of a training step with the network's body in `dtype`, without touching `device`.

    on_device: the step is a `DeviceStep`, without DeepSpeed, and its weights are float32.
    """
    halves = train.precision != "fp32" and not on_device
    sizes = (2, 4)
    # Ops choose their implementation by device: fake tensors stand in for the CPU's, meta tensors for a GPU's.
    stand_in = FakeTensorMode() if device.type == "cpu" else torch.device("meta")
    with stand_in:
        network = build_model(model.model_copy(update={"use_checkpoint": model.use_checkpoint is True}))
        process = replace(diffusion)  # a copy, so that the caller's process caches no stand-in tables
        peaks = [_peak(network, process, dtype, device, size, train.kernels, halves) for size in sizes]
    count = sum(p.numel() for p in network.parameters())
    per_image = (peaks[1] - peaks[0]) // (sizes[1] - sizes[0])
    shared = [world_size if train.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    master = 4 * count // shared[0] if halves else 0
    return Memory(
        weights=(2 if halves else 4) * count // shared[2],
        gradients=(2 if halves else 4) * count // shared[1] + (4 * count // shared[0] if halves else 0),
        optimizer=8 * count // shared[0] + master,
        averages=4 * count // shared[0] * len(train.ema_rate),
        per_image=per_image,
        fixed=max(0, peaks[0] - sizes[0] * per_image)
        + (BUCKET * (2 if halves else 4) if train.zero_stage and not on_device else 0),
    )


def _peak(
    network: UNet,
    diffusion: GaussianDiffusion,
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    kernels: str,
    halves: bool,
) -> int:
    """Peak bytes of a forward and backward pass on `size` images, without weights and their gradients."""
    network.train().set_precision(dtype)
    for p in network.parameters():
        p.data = p.data.to(dtype if halves else torch.float32)
        p.grad = torch.zeros_like(p)  # DeepSpeed keeps gradients in buffers of its own
    batch = dummy_batch(network.settings, size, next(network.parameters()).device)
    mode: ops.Kernels = "triton" if device.type == "cuda" and kernels != "reference" else "auto"
    with ops.using(mode, anywhere=True), LiveBytes() as live:
        diffusion.training_losses(network, *batch)["loss"].mean().backward()
    return live.peak
