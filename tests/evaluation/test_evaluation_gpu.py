"""On a GPU: features, exact sums and distances equal the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.evaluation.features import INCEPTION, open_features
from fastdiff.evaluation.metrics import SquareRoot, frechet_distance, frechet_spread, precision_recall
from fastdiff.evaluation.moments import Moments, MomentSums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) + 1


@pytest.mark.parametrize("compiled", [False, True])
def test_inception(compiled: bool, inception_weights: Path) -> None:
    pytest.importorskip("torch_fidelity")
    images = torch.randint(0, 256, (5, 32, 40, 3), generator=torch.Generator().manual_seed(0)).byte()
    outputs: Any = ("pool", "spatial", "logits")
    known = open_features(INCEPTION, str(inception_weights), "fp32", CPU)(images, outputs)
    net = open_features(INCEPTION, str(inception_weights), "fp32", GPU, compiled=compiled)
    # Roundings of 2^-24, 2^-9 and 2^-12 at about 50 layers one after another, and those of cuDNN's sums.
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.1), ("fp16", 0.02)):
        found = net.at(precision)(images, outputs)  # type: ignore[arg-type]
        for name, value in known.items():
            error = (found[name].cpu() - value).norm() / value.norm()
            assert error < tolerance, (precision, name)


def test_sums_have_the_cpus_bits() -> None:
    x = features(700, 300, 0)
    results = []
    for device, size in ((CPU, 700), (GPU, 64), (GPU, 700)):
        sums = MomentSums(300, device)
        for batch in x.split(size):
            sums.add(batch.to(device))
        results.append(sums.moments())
    for other in results[1:]:
        assert torch.equal(other.mean, results[0].mean)
        assert torch.equal(other.covariance, results[0].covariance)


def test_distances() -> None:
    a, b = features(500, 60, 0), features(400, 60, 1)
    ours, theirs = Moments.of(a), Moments.of(b)
    values = [frechet_distance(SquareRoot(ours, device), theirs.mean, theirs.covariance) for device in (CPU, GPU)]
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    spreads = [frechet_spread(SquareRoot(ours, device), b, 5, seed=0) for device in (CPU, GPU)]
    assert spreads[1] == pytest.approx(spreads[0], rel=1e-3)
    assert precision_recall(a, b, GPU) == precision_recall(a, b, CPU)
