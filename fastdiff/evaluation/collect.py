"""Runs a set of images through the feature network, shared out over processes, and collects what the metrics need."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fastdiff.errors import UserError
from fastdiff.evaluation.features import FeatureNetwork, Output
from fastdiff.evaluation.metrics import NEIGHBOURS
from fastdiff.evaluation.moments import MomentSums
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import Described
from fastdiff.runtime.processes import Processes

Metric = str
PROBED = 256
"""Images on which the error of rounded features is measured."""
METRICS: dict[Metric, Output] = {
    "fid": "pool",
    "sfid": "spatial",
    "is": "logits",
    "precision": "pool",
    "recall": "pool",
    "kid": "pool",
}
"""Metric → the output of the network that it compares."""
OF_MOMENTS = ("fid", "sfid")
OF_FEATURES = ("precision", "recall", "kid")
NEED_REFERENCE = (*OF_MOMENTS, *OF_FEATURES)

Batches = Iterable[tuple[Tensor, np.ndarray]]
"""(images uint8 [b, H, W, C], their numbers [b] int64): the images that a process is to see."""


@dataclass(frozen=True)
class Wanted:
    """What is to be collected of a set: moments of some outputs, features of others, and both of some."""

    moments: tuple[Output, ...] = ()
    features: tuple[Output, ...] = ()

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(dict.fromkeys((*self.moments, *self.features)))

    @classmethod
    def of_samples(cls, metrics: Collection[Metric], resamples: bool) -> Wanted:
        """What metrics need of the samples; resamples says whether a bootstrap follows, which needs all features."""
        moments = tuple(METRICS[name] for name in metrics if name in OF_MOMENTS)
        features = tuple(METRICS[name] for name in metrics if resamples or name not in OF_MOMENTS)
        return cls(moments, tuple(dict.fromkeys(features)))

    @classmethod
    def of_reference(cls, metrics: Collection[Metric]) -> Wanted:
        """What metrics need of the reference."""
        moments = tuple(METRICS[name] for name in metrics if name in OF_MOMENTS)
        return cls(moments, ("pool",) if any(name in OF_FEATURES for name in metrics) else ())


def check_metrics(metrics: Collection[Metric], network: FeatureNetwork) -> None:
    """Raise UserError for a metric that the network has no output for."""
    for name in metrics:
        if METRICS[name] not in network.widths:
            what = {"sfid": "the spatial features of Inception", "is": "logits"}[name]
            raise UserError(f"--metrics: {name} needs {what}, which {network.name} doesn't have; leave it out")


def check_count(settings: EvaluateSettings, count: int, what: Literal["samples", "reference images"]) -> None:
    """Raise UserError if `count` images are too few for one of the metrics."""
    least = dict.fromkeys(OF_MOMENTS, (2, "needs a covariance"))
    least |= dict.fromkeys(("precision", "recall"), (NEIGHBOURS + 1, f"needs {NEIGHBOURS} neighbours of each image"))
    least["kid"] = settings.kid_subset_size, f"takes subsets of --kid_subset_size {settings.kid_subset_size}"
    if what == "samples":
        least["is"] = settings.splits, f"takes --splits {settings.splits}"
    for name in settings.metrics:
        if name in least and count < least[name][0]:
            needed, why = least[name]
            raise UserError(
                f"--metrics: {name} {why}, and so at least {needed} images; there are {count} {what}, give more or "
                f"leave {name} out"
            )


def collect(
    batches: Batches,
    network: FeatureNetwork,
    wanted: Wanted,
    processes: Processes,
    *,
    count: int,
    batch_size: int,
    what: str,
    probes: bool = False,
) -> Described:
    """See `count` images, of which `batches` gives this process's share; complete on rank 0. Collective.

    Every batch has the same shape for the network, because the features of an image may otherwise depend on how many
    others come with it. what names the images in the progress bar and in messages. With probes, a network that computes
    in bf16 or fp16 is run in fp32 as well on the first PROBED images. Raises UserError for features that are not
    finite, and for images that don't fit the network.
    """
    sums = {name: MomentSums(network.widths[name], network.device) for name in wanted.moments}
    rows: dict[Output, list[np.ndarray]] = {name: [] for name in wanted.features}
    exact = network.at("fp32") if network.precision != "fp32" and probes else None
    probed: list[tuple[np.ndarray, dict[Output, np.ndarray], dict[Output, np.ndarray]]] = []
    numbers: list[np.ndarray] = []
    digests: list[bytes] = []
    size = ""
    interval = 0.1 if sys.stderr.isatty() else 30.0  # in a log file every update is a line
    bar = tqdm(
        total=-(-count // processes.world_size),
        desc=what,
        unit="image",
        mininterval=interval,
        dynamic_ncols=True,
        disable=not processes.is_main,
    )
    with bar:
        for images, positions in batches:
            size = size or "x".join(map(str, images.shape[1:]))
            digests += [hashlib.sha256(image.tobytes()).digest() for image in images.cpu().numpy()]
            numbers.append(positions)
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                outputs = _padded(network, part, batch_size, wanted.outputs)
                _check_finite(outputs, what)
                if exact and (first := positions[start : start + batch_size] < PROBED).any():
                    precise = _padded(exact, part, batch_size, wanted.outputs)
                    chosen = positions[start : start + batch_size][first]
                    probed.append((chosen, _rows(outputs, first), _rows(precise, first)))
                for name in wanted.moments:
                    sums[name].add(outputs[name])
                for name in wanted.features:
                    rows[name].append(outputs[name].cpu().numpy())
            bar.update(len(images))
    own = _Share(numbers, digests, rows, probed, size)
    shares: list[Any] = [own]
    if processes.world_size > 1:
        shares = [None] * processes.world_size if processes.is_main else []
        dist.gather_object(own, shares or None)
        for each in sums.values():
            each.reduce(processes.device)
    return _combined(what, [share for share in shares if share], sums) if processes.is_main else Described(what, 0)


@dataclass
class _Share:
    """What one process has seen."""

    numbers: list[np.ndarray]
    digests: list[bytes]
    rows: dict[Output, list[np.ndarray]]
    probed: list[tuple[np.ndarray, dict[Output, np.ndarray], dict[Output, np.ndarray]]]
    size: str


def _combined(what: str, shares: list[_Share], sums: dict[Output, MomentSums]) -> Described:
    """Put the shares of all processes in the order of the images."""
    order = np.argsort(np.concatenate([part for share in shares for part in share.numbers]), kind="stable")
    digests = [digest for share in shares for digest in share.digests]
    size = next((share.size for share in shares if share.size), "")
    pixels = hashlib.sha256(size.encode() + b"".join(digests[i] for i in order)).hexdigest()

    def ordered(parts: list[np.ndarray], order: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)[order])

    features = {name: ordered([p for share in shares for p in share.rows[name]], order) for name in shares[0].rows}
    probe: dict[Output, tuple[Tensor, Tensor]] = {}
    if probed := [each for share in shares for each in share.probed]:
        first = np.argsort(np.concatenate([numbers for numbers, _, _ in probed]), kind="stable")
        for name in probed[0][1]:
            probe[name] = (
                ordered([each[1][name] for each in probed], first),
                ordered([each[2][name] for each in probed], first),
            )
    moments = {name: each.moments() for name, each in sums.items()}
    return Described(what, len(order), moments, features, probe, size, f"sha256:{pixels[:16]}")


def _rows(outputs: dict[Output, Tensor], chosen: np.ndarray) -> dict[Output, np.ndarray]:
    return {name: output.cpu().numpy()[chosen] for name, output in outputs.items()}


def _padded(
    network: FeatureNetwork, images: Tensor, batch_size: int, outputs: Collection[Output]
) -> dict[Output, Tensor]:
    """The network's outputs for up to batch_size images, computed with black ones in the places of missing ones."""
    missing = batch_size - len(images)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return {name: output[: batch_size - missing] for name, output in network(images, outputs).items()}


def _check_finite(outputs: dict[Output, Tensor], what: str) -> None:
    for output in outputs.values():
        if not output.isfinite().all():
            raise UserError(
                f"the network's features of {what} are not finite; give --feature_precision fp32, or other weights"
            )
