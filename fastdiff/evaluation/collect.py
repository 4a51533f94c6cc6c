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
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.evaluation.metrics import NEIGHBOURS
from fastdiff.evaluation.moments import MomentSums
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import KEPT, Described
from fastdiff.runtime.processes import Processes

Metric = str
PROBED = 256
"""Images on which the error of rounded features is measured."""
OUTPUT_OF: dict[Metric, Output] = {
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
    most: int | None = None
    """Features of at most so many images, evenly spread over the set; None: of all."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(dict.fromkeys((*self.moments, *self.features)))

    @classmethod
    def of_samples(cls, metrics: Collection[Metric], resamples: bool) -> Wanted:
        """What metrics need of the samples; resamples says whether a bootstrap follows, which needs all features."""
        moments = tuple(OUTPUT_OF[name] for name in metrics if name in OF_MOMENTS)
        features = tuple(OUTPUT_OF[name] for name in metrics if resamples or name not in OF_MOMENTS)
        return cls(moments, tuple(dict.fromkeys(features)))

    @classmethod
    def of_reference(cls, metrics: Collection[Metric]) -> Wanted:
        """What metrics need of the reference."""
        moments = tuple(OUTPUT_OF[name] for name in metrics if name in OF_MOMENTS)
        return cls(moments, ("pool",) if any(name in OF_FEATURES for name in metrics) else (), KEPT)


def check_metrics(metrics: Collection[Metric], network: FeatureNetwork) -> None:
    """Raise UserError for a metric that the network has no output for, or that needs a package that is missing."""
    if not {"is", "kid"}.isdisjoint(metrics):
        torch_fidelity_module("metrics")
    for name in metrics:
        if OUTPUT_OF[name] not in network.widths:
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
    bar: bool = True,
) -> Described:
    """See `count` images, of which `batches` gives this process's share; complete on rank 0. Collective.

    Every batch has the same shape for the network, because the features of an image may otherwise depend on how many
    others come with it. what names the images in messages, and in the progress bar unless that is left out. A
    network that computes in bf16 or fp16 is run in fp32 as well on the first PROBED images. Raises UserError for
    features that are not finite, and for images that don't fit the network.
    """
    sums = {name: MomentSums(network.widths[name], network.device) for name in wanted.moments}
    rows: dict[Output, list[Tensor]] = {name: [] for name in wanted.features}  # on the device until the end
    kept = np.ones(count, dtype=bool)
    if wanted.most is not None and count > wanted.most:
        kept[:] = False
        kept[np.arange(wanted.most) * count // wanted.most] = True
    exact = network.at("fp32") if network.precision != "fp32" else None
    probed: list[tuple[np.ndarray, dict[Output, np.ndarray], dict[Output, np.ndarray]]] = []
    numbers: list[np.ndarray] = []
    digests: list[bytes] = []
    size = ""
    interval = 0.1 if sys.stderr.isatty() else 30.0  # in a log file every update is a line
    shown = tqdm(
        total=-(-count // processes.world_size),
        desc=what,
        unit="image",
        mininterval=interval,
        dynamic_ncols=True,
        disable=not (bar and processes.is_main),
    )
    with shown:
        for images, positions in batches:
            size = size or "x".join(map(str, images.shape[1:]))
            digests += [hashlib.sha256(image.tobytes()).digest() for image in images.cpu().numpy()]
            numbers.append(positions)
            for start in range(0, len(images), batch_size):
                part, places = images[start : start + batch_size], positions[start : start + batch_size]
                outputs = _padded(network, part, batch_size, wanted.outputs)
                _check_finite(outputs, network, what)
                if exact and (first := places < PROBED).any():
                    precise = _padded(exact, part, batch_size, wanted.outputs)
                    probed.append((places[first], _rows(outputs, first), _rows(precise, first)))
                for name in wanted.moments:
                    sums[name].add(outputs[name])
                for name in wanted.features:
                    rows[name].append(outputs[name] if kept.all() else outputs[name][torch.from_numpy(kept[places])])
            shown.update(len(images))
    arrays = {name: torch.cat(parts).cpu().numpy() if parts else None for name, parts in rows.items()}
    own = _Share(numbers, digests, arrays, probed, size)
    shares: list[Any] = [own]
    if processes.world_size > 1:
        shares = [None] * processes.world_size if processes.is_main else []
        dist.gather_object(own, shares or None)
        for each in sums.values():
            each.reduce(processes.device)
    return _combined(what, shares, sums, kept) if processes.is_main else Described(what, 0)


@dataclass
class _Share:
    """What one process has seen."""

    numbers: list[np.ndarray]
    digests: list[bytes]
    rows: dict[Output, np.ndarray | None]
    """Features of this process's images among those that are kept; None if it has seen no image."""
    probed: list[tuple[np.ndarray, dict[Output, np.ndarray], dict[Output, np.ndarray]]]
    size: str


def _combined(what: str, shares: list[_Share], sums: dict[Output, MomentSums], kept: np.ndarray) -> Described:
    """Put the shares of all processes in the order of the images.

    kept [N] bool marks the images whose features were collected.
    """
    numbers = np.concatenate([part for share in shares for part in share.numbers])
    digests = [digest for share in shares for digest in share.digests]
    size = next((share.size for share in shares if share.size), "")
    pixels = hashlib.sha256(size.encode() + b"".join(digests[i] for i in np.argsort(numbers))).hexdigest()

    def ordered(parts: Iterable[np.ndarray], numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(list(parts))[np.argsort(numbers)])

    features = {
        name: ordered((rows for share in shares if (rows := share.rows[name]) is not None), numbers[kept[numbers]])
        for name in shares[0].rows
    }
    probe: dict[Output, tuple[Tensor, Tensor]] = {}
    if probed := [each for share in shares for each in share.probed]:
        first = np.concatenate([places for places, _, _ in probed])
        for name in probed[0][1]:
            rounded, exact = (ordered((each[i][name] for each in probed), first) for i in (1, 2))  # type: ignore[index]
            probe[name] = rounded, exact
    moments = {name: each.moments() for name, each in sums.items()}
    return Described(what, len(numbers), moments, features, probe, size, f"sha256:{pixels[:16]}")


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


def _check_finite(outputs: dict[Output, Tensor], network: FeatureNetwork, what: str) -> None:
    if not torch.stack([output.isfinite().all() for output in outputs.values()]).all():  # waits for the device once
        exact = "" if network.precision == "fp32" else "--feature_precision fp32, or "
        raise UserError(
            f"the network's features of {what} are not finite; give {exact}another network or other weights"
        )
