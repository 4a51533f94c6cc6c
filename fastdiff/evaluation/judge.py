"""Compares described samples with a described reference: metric → score, with what should be known beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastdiff.errors import blaming
from fastdiff.evaluation.collect import OF_FEATURES, OF_MOMENTS, OUTPUT_OF, Metric
from fastdiff.evaluation.features import FeatureNetwork, Output
from fastdiff.evaluation.metrics import (
    Score,
    SquareRoot,
    frechet_distance,
    frechet_spread,
    inception_score,
    kernel_distance,
    precision_recall,
    rank_of,
)
from fastdiff.evaluation.moments import Moments
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import Described

FEW = 10_000
"""Fewer images than this are remarked on, because distances fall with the number of images."""
_ELSEWHERE = {"fid": "fd", "kid": "kd"}
"""Names of metrics whose own name stands for Inception's features."""


@dataclass
class Verdict:
    """The scores of one set of samples."""

    scores: dict[Metric, Score]
    further: dict[Metric, dict[str, float]] = field(default_factory=dict)
    """Further numbers of a metric by name: over_splits of the Inception score, reference_images of those that compare
    features of a part of the reference."""
    errors: dict[Metric, float] = field(default_factory=dict)
    """By how much each metric changed on the first images because features were computed in bf16 or fp16."""
    notes: list[str] = field(default_factory=list)
    """What changes the numbers: few images, a lossy format, a covariance without full rank."""


def label(metric: Metric, network: FeatureNetwork) -> str:
    """The metric's name in results: fid, but fd[NETWORK] in the features of another network than Inception."""
    return metric if network.is_inception else f"{_ELSEWHERE.get(metric, metric)}[{network.name}]"


class Judge:
    """Scores samples against one reference. The square roots of its covariances are computed once."""

    def __init__(self, settings: EvaluateSettings, network: FeatureNetwork, reference: Described | None) -> None:
        """reference is None if no metric needs one. Raises UserError for one that can't be compared with."""
        self.settings, self.network, self.reference = settings, network, reference
        self.metrics: Sequence[Metric] = settings.metrics
        self._roots: dict[Output, SquareRoot] = {}
        if reference is None:
            return
        with blaming("--reference"):
            for output in dict.fromkeys(OUTPUT_OF[name] for name in self.metrics if name in OF_MOMENTS):
                self._roots[output] = SquareRoot(reference.moments[output], network.device)

    def score(self, samples: Described) -> Verdict:
        """Compute the metrics of samples, whose moments and features have been collected."""
        with blaming("--metrics"):
            scores, further = self._scores(self.settings, samples.moments, samples.features)
        return Verdict(scores, further, self._errors(samples), self._notes(samples))

    def _scores(
        self, settings: EvaluateSettings, moments: dict[Output, Moments], features: dict[Output, Tensor]
    ) -> tuple[dict[Metric, Score], dict[Metric, dict[str, float]]]:
        seed, resamplings, device = settings.metric_seed, settings.resamplings, self.network.device
        found: dict[Metric, Score] = {}
        further: dict[Metric, dict[str, float]] = {}
        real = self.reference.features.get("pool") if self.reference else None
        for metric in self.metrics:
            output = OUTPUT_OF[metric]
            if metric in OF_MOMENTS:
                root, seen = self._roots[output], moments[output]
                spread = frechet_spread(root, features[output], resamplings, seed) if resamplings else None
                found[metric] = Score(frechet_distance(root, seen.mean, seen.covariance), spread)
            elif metric == "is":
                found[metric], over_splits = inception_score(features[output], settings.splits, seed, resamplings)
                further[metric] = {"over_splits": over_splits}
            elif metric == "kid":
                assert real is not None
                size = settings.kid_subset_size
                found[metric] = kernel_distance(features[output], real, settings.kid_subsets, size, seed)
            elif metric not in found:
                assert real is not None
                found["precision"], found["recall"] = precision_recall(features[output], real, device)
        further |= {m: {"reference_images": len(real)} for m in self.metrics if m in OF_FEATURES and real is not None}
        return {metric: found[metric] for metric in self.metrics}, further

    def _errors(self, samples: Described) -> dict[Metric, float]:
        """By how much each metric of the first images differs between rounded and exact features; empty at fp32.

        The reference's first images take the place of the reference where its features were rounded as well.
        """
        if not samples.probe:
            return {}
        probes = [each.probe for each in (samples, self.reference) if each and each.probe]
        count = min(len(exact) for probe in probes for _, exact in probe.values())
        size = min(count, self.settings.kid_subset_size)
        few = self.settings.model_copy(update={"splits": 1, "resamplings": 0, "kid_subset_size": size})
        found = []
        for which in (0, 1):
            judge = self
            if self.reference and self.reference.probe:
                judge = Judge(few, self.network, _probed(self.reference, which))
            of_samples = _probed(samples, which)
            found.append(judge._scores(few, of_samples.moments, of_samples.features)[0])
        rounded, exact = found
        return {metric: abs(rounded[metric].value - exact[metric].value) for metric in self.metrics}

    def _notes(self, samples: Described) -> list[str]:
        """What changes the numbers, and so belongs beside them."""
        notes = [*self.network.notes, *samples.notes]
        if samples.count < FEW:
            notes.append(
                f"only {samples.count} samples: most metrics depend on their number, and FID falls as it grows; "
                "papers use 50,000"
            )
        for output, root in self._roots.items():
            width = self.network.widths[output]
            counts = samples.count, root.moments.images
            ranks = rank_of(samples.moments[output], self.network.device), root.rank
            if min(ranks) < width:
                why = (
                    "fewer images than features" if any(0 < n <= width for n in counts) else "features that hardly vary"
                )
                notes.append(
                    f"the covariance of the {width} {output} features has rank {ranks[0]} for the samples "
                    f"and {ranks[1]} for the reference ({why}): the matrix root is ill-conditioned"
                )
        if self.reference is None:
            return notes
        notes += self.reference.notes
        if 0 < self.reference.count < FEW:
            notes.append(f"only {self.reference.count} reference images")
        used = len(self.reference.features.get("pool", ()))
        if used < self.reference.count and (names := [name for name in self.metrics if name in OF_FEATURES]):
            notes.append(f"{', '.join(names)} use {used} images of the reference, evenly chosen")
        theirs = self.reference.about.get("precision", self.network.precision)
        if theirs != self.network.precision:
            notes.append(
                f"the reference's features were computed in {theirs}, the samples' in {self.network.precision}"
            )
        return notes


def _probed(described: Described, which: int) -> Described:
    """The first images of a set as a set, by rounded features (which = 0) or exact ones (1)."""
    features = {output: pair[which] for output, pair in described.probe.items()}
    moments = {output: Moments.of(rows) for output, rows in features.items()}
    return Described(described.path, min(map(len, features.values())), moments, features)
