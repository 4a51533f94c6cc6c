"""The metrics against their definitions in float64, torch-fidelity's results, and answers that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.evaluation.metrics import (
    SquareRoot,
    frechet_distance,
    frechet_spread,
    inception_score,
    kernel_distance,
    precision_recall,
    rank_of,
)
from fastdiff.evaluation.moments import Moments

CPU = torch.device("cpu")


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)) + shift


def distance(a: Tensor, b: Tensor) -> float:
    other = Moments.of(b)
    return frechet_distance(SquareRoot(Moments.of(a), CPU), other.mean, other.covariance)


# --- Fréchet distance ---


def test_two_gaussians() -> None:
    """Between N(m, diag(s^2)) and N(n, diag(t^2)) it is |m - n|^2 + |s - t|^2, also after a rotation."""
    generator = torch.Generator().manual_seed(1)
    m, n, s, t = (torch.rand(12, generator=generator, dtype=torch.float64) * scale for scale in (1, 1, 3, 3))
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    a = Moments(turn @ m, turn @ s.square().diag() @ turn.T, 1000)
    b = Moments(turn @ n, turn @ t.square().diag() @ turn.T, 1000)
    known = float((m - n).square().sum() + (s - t).square().sum())
    assert frechet_distance(SquareRoot(a, CPU), b.mean, b.covariance) == pytest.approx(known, rel=1e-12)
    assert frechet_distance(SquareRoot(b, CPU), a.mean, a.covariance) == pytest.approx(known, rel=1e-12)
    assert frechet_distance(SquareRoot(a, CPU), a.mean, a.covariance) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("count", "width"), [(300, 11), (60, 64), (7, 33)])  # the last two have no full rank
def test_frechet_equals_torch_fidelity(count: int, width: int) -> None:
    a, b = features(count, width, 0), features(count + 5, width, 1, 0.5)
    fid = torch_fidelity_module("metric_fid")
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(x.double()) for x in (a, b)), False)
    assert distance(a, b) == pytest.approx(theirs[fid.KEY_METRIC_FID], rel=1e-6)


def test_frechet_of_one_set() -> None:
    x = features(200, 30, 0)
    assert distance(x, x) == pytest.approx(0, abs=1e-9 * float(Moments.of(x).covariance.trace()))


def test_what_is_no_covariance() -> None:
    mean = torch.zeros(3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    crooked = eye.clone()
    crooked[0, 1] = 0.5
    for matrix, what in ((-eye, "eigenvalue -1"), (crooked, "not symmetric"), (eye * math.nan, "not finite")):
        with pytest.raises(UserError, match=what):
            SquareRoot(Moments(mean, matrix, 5), CPU)


def test_rank() -> None:
    assert rank_of(Moments.of(features(40, 20, 0)), CPU) == 20
    assert rank_of(Moments.of(features(15, 20, 0)), CPU) == 14
    assert SquareRoot(Moments.of(features(15, 20, 0)), CPU).rank == 14


def test_frechet_spread_is_that_of_samples() -> None:
    """The bootstrap's deviation is near that of distances of independent samples."""
    width, count = 6, 400
    reference = SquareRoot(Moments.of(features(4000, width, 99)), CPU)
    sets = [torch.randn(count, width, generator=torch.Generator().manual_seed(i)) + 0.4 for i in range(60)]
    distances = [frechet_distance(reference, *Moments.of(x)[:2]) for x in sets]
    spreads = [frechet_spread(reference, x, 40, seed=3) or 0.0 for x in sets[:10]]
    true = float(torch.tensor(distances).std())
    assert 0.7 < sum(spreads) / len(spreads) / true < 1.4
    assert frechet_spread(reference, sets[0], 0, seed=3) is None
    assert frechet_spread(reference, sets[0], 5, seed=3) == frechet_spread(reference, sets[0], 5, seed=3)


# --- Inception score and KID ---


def test_inception_score() -> None:
    logits = features(103, 10, 0)
    isc = torch_fidelity_module("metric_isc")
    theirs = isc.isc_features_to_metric(logits, 10, True, 2020)
    score, over_splits = inception_score(logits, 10, 2020, resamplings=8)
    assert score.value == theirs[isc.KEY_METRIC_ISC_MEAN]
    assert over_splits == theirs[isc.KEY_METRIC_ISC_STD]
    assert score.spread is not None
    assert 0 < score.spread < score.value
    # K classes that are certain and equally frequent score K, the same class everywhere scores 1.
    certain = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(certain, 1, 0)[0].value == pytest.approx(5)
    assert inception_score(certain[:1].repeat(30, 1), 3, 0)[0].value == pytest.approx(1)


def test_kid_is_the_unbiased_mmd() -> None:
    """With a subset that is the whole set, KID is the U-statistic of its kernel."""
    x, y = features(40, 6, 0).double(), features(40, 6, 1, 0.3).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 6 + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (40 * 39)

    known = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    score = kernel_distance(x.float(), y.float(), 3, 40, 2020)
    assert score.value == pytest.approx(float(known), rel=1e-6)
    assert score.spread == pytest.approx(0, abs=1e-9)


def test_kid_equals_torch_fidelity() -> None:
    x, y = features(90, 12, 0), features(70, 12, 1, 0.2)
    kid = torch_fidelity_module("metric_kid")
    theirs = kid.kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=30, rng_seed=5, verbose=False)
    ours = kernel_distance(x, y, 20, 30, 5)
    assert ours.value == pytest.approx(theirs[kid.KEY_METRIC_KID_MEAN], rel=1e-5)
    assert ours.spread == pytest.approx(theirs[kid.KEY_METRIC_KID_STD], rel=1e-5)


# --- precision and recall ---


def by_definition(images: Tensor, manifold: Tensor) -> float:
    """The share of images within the third-nearest neighbour's distance of some image of the manifold."""
    inside = 0
    radii = []
    for i, centre in enumerate(manifold.double()):
        others = sorted(float((centre - other).norm()) for j, other in enumerate(manifold.double()) if i != j)
        radii.append(others[2])
    for image in images.double():
        inside += any(float((image - centre).norm()) <= r for centre, r in zip(manifold.double(), radii, strict=True))
    return inside / len(images)


@pytest.mark.parametrize("block", [1 << 24, 100])  # in one block and row by row
def test_precision_and_recall(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.evaluation.metrics._BLOCK", block)
    samples, real = features(61, 4, 0), features(47, 4, 1, 0.8)
    precision, recall = precision_recall(samples, real, CPU)
    assert precision.value == pytest.approx(by_definition(samples, real))
    assert recall.value == pytest.approx(by_definition(real, samples))
    assert 0 < precision.value < 1
    assert 0 < recall.value < 1
    assert precision.spread == pytest.approx((precision.value * (1 - precision.value) / 61) ** 0.5)
    theirs = torch_fidelity_module("metric_prc").prc_features_to_metric(samples, real, verbose=False)
    assert (precision.value, recall.value) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_known_precision_and_recall() -> None:
    x = 50 + features(40, 8, 0)  # far from 0, where squared distances cancel
    assert [score.value for score in precision_recall(x, x, CPU)] == [1, 1]
    assert [score.value for score in precision_recall(x, x + 1000, CPU)] == [0, 0]
    # Samples that are half of the reference are all real, and cover more than half of it.
    precision, recall = precision_recall(x[:20], x, CPU)
    assert precision.value == 1
    assert recall.value >= 0.5


def test_copies_of_an_image_are_within_its_ball_of_no_radius() -> None:
    """Of an image that a set holds five times the third-nearest neighbour is a copy, and so is a sample like it."""
    images = torch.randn(60, 2048, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.4
    copies = images.repeat(5, 1)[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert [score.value for score in precision_recall(images, copies, torch.device("cpu"))] == [1, 1]
    assert precision_recall(images + 1e-4, copies, torch.device("cpu"))[0].value == 0
