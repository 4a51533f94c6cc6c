"""Sums of features are exact, whatever the batches, and refuse what they can't hold."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.evaluation.moments import QUANTUM, Moments, MomentSums

CPU = torch.device("cpu")


def features(count: int, width: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Correlated features about a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return (mixed * scale + 3 * scale).float()


def moments_of(x: Tensor, sizes: list[int]) -> Moments:
    sums = MomentSums(x.shape[1], CPU)
    for batch in x.split(sizes):
        sums.add(batch)
    return sums.moments()


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_batches_change_no_bit(scale: float) -> None:
    x = features(211, 17, scale)
    whole = moments_of(x, [211])
    for sizes in ([1] * 211, [100, 111], [7] * 30 + [1]):
        again = moments_of(x, sizes)
        assert torch.equal(again.mean, whole.mean)
        assert torch.equal(again.covariance, whole.covariance)
    backwards = moments_of(x.flip(0), [50, 161])
    assert torch.equal(backwards.covariance, whole.covariance)
    assert whole.images == 211


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_against_float64(scale: float) -> None:
    x = features(211, 17, scale)
    found, rounded = moments_of(x, [64, 147]), Moments.of((x.double() / QUANTUM).round() * QUANTUM)
    torch.testing.assert_close(found.mean, rounded.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, rounded.covariance, rtol=1e-12, atol=1e-14 * scale**2)
    # Rounding to multiples of QUANTUM moves a feature by at most half of one.
    exact = Moments.of(x)
    assert (found.mean - exact.mean).abs().max() <= QUANTUM / 2
    deviations = exact.covariance.diag().sqrt()
    assert (
        (found.covariance - exact.covariance).abs() <= 2 * QUANTUM * torch.maximum(deviations, deviations[:, None])
    ).all()


def test_against_fractions() -> None:
    """A mean a thousand times the deviation cancels without loss."""
    x = 60 + features(9, 2, 0.02)
    found = moments_of(x, [9])
    quanta = [[round(Fraction(float(v)) / Fraction(QUANTUM)) for v in row] for row in x.tolist()]
    means = [Fraction(sum(row[i] for row in quanta), 9) for i in (0, 1)]
    for i in (0, 1):
        for j in (0, 1):
            exact = sum((row[i] - means[i]) * (row[j] - means[j]) for row in quanta) / 8 * Fraction(QUANTUM) ** 2
            assert float(found.covariance[i, j]) == pytest.approx(float(exact), rel=1e-15)


def test_what_sums_cannot_hold() -> None:
    with pytest.raises(UserError, match="reach 1e\\+05, which is too large .*scale them to about 1"):
        MomentSums(2, CPU).add(torch.tensor([[1e5, 0.0]]))
    sums = MomentSums(2, CPU)
    for _ in range(21):  # 2^63 / (1000 * 2^16)^2 is 2147
        sums.add(torch.full((100, 2), 1000.0))
    with pytest.raises(UserError, match="too large for exact sums over 2200 images"):
        sums.add(torch.full((100, 2), 1000.0))
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        moments_of(torch.ones(1, 2), [1])
    with pytest.raises(UserError, match="no feature exceeds 0.00101, .*scale them to about 1"):
        moments_of(torch.full((5, 2), 0.001), [5])
