"""Predicts how fast a training step can be, from its operations, their least bytes and a machine's rates.

The forward and the backward pass of each operation of `fastdiff.models.cost` each take

    max(FLOPs as run / (matmul rate * convolution efficiency), bytes / (copy rate * copy efficiency))

and each kernel takes a launch besides, once per batch ("launch gaps"). Input, communication and the host's own time
are assumed to be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.models import cost as work

# The classes of `train.py --profile`; a prediction has no communication, copies or input wait.
CLASSES = (
    "convolutions",
    "matrix products",
    "norms",
    "attention",
    "noising and loss",
    "pointwise",
    "optimiser",
    "launch gaps",
)
_KINDS = {
    "convolutions": ("conv3x3", "downsample conv", "upsample conv", "input conv", "output conv"),
    "matrix products": ("conv1x1", "embedding"),
    "norms": ("group norm",),
    "attention": ("attention",),
    "noising and loss": ("noising", "loss"),
    "pointwise": ("residual", "skip"),
}
CLASS_OF: dict[str, str] = {kind: name for name, kinds in _KINDS.items() for kind in kinds}


@dataclass(frozen=True)
class Machine:
    """The rates of a machine in FLOP/s and bytes/s; peak_flops is None where no datasheet is known."""

    name: str
    matmul_flops: float
    copy_bytes: float
    peak_flops: float | None


@dataclass(frozen=True)
class Share:
    """One class of operations: FLOPs (as run) and bytes per image, and milliseconds per step."""

    run_flops: float
    bytes: float
    ms: float


@dataclass(frozen=True)
class Prediction:
    """The predicted times of one training step of `batch` images on one GPU."""

    batch: int
    train_flops: float
    """Per image, of the network as improved-diffusion defines it."""
    shares: dict[str, Share]

    @property
    def ms(self) -> float:
        return sum(share.ms for share in self.shares.values())

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.ms

    def mfu(self, peak_flops: float) -> float:
        return self.train_flops * self.images_per_second / peak_flops


def predict(
    ops: Sequence[work.Operation],
    batch: int,
    machine: Machine,
    *,
    convolution_efficiency: float = 1.0,
    copy_efficiency: float = 1.0,
    launch_us: float = 2.0,
    optimiser_bytes: int = 38,
) -> Prediction:
    """Predict a step over `batch` images: forward, backward and one update (`optimiser_bytes` per weight)."""
    products, copies = machine.matmul_flops * convolution_efficiency, machine.copy_bytes * copy_efficiency
    totals = {name: [0.0, 0.0, 0.0] for name in CLASSES}
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
    updated = float(optimiser_bytes * work.parameters(ops))
    totals["optimiser"] = [0.0, updated, updated / copies]
    totals["launch gaps"] = [0.0, 0.0, launches * launch_us * 1e-6]
    shares = {name: Share(flops / batch, moved / batch, 1e3 * s) for name, (flops, moved, s) in totals.items()}
    return Prediction(batch, 3 * sum(op.flops for op in ops), shares)
