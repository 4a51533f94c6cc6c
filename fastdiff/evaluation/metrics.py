"""The metrics, as functions of features: Fréchet distance, Inception score, KID, precision and recall.

FID and sFID are the Fréchet distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Nash et al. 2021,
https://arxiv.org/abs/2103.03841). Inception score and KID are computed by torch-fidelity. Precision and recall are
those of Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.evaluation.moments import Moments

NEIGHBOURS = 3
"""k of precision and recall."""
_TOLERANCE = 1e-6
"""Negative eigenvalues of a covariance up to this part of the largest one count as rounding errors."""
_BLOCK = 1 << 24
"""Distances that are in memory at a time."""
_TIE = 1e-9
"""Relative difference of squared distances below which they count as equal."""
_SAME = 1e-12
"""Squared distances up to this part of the squared lengths count as 0, which they are but for rounding."""


class Score(NamedTuple):
    """A metric's value and its spread: the standard deviation that its definition or a bootstrap gives it."""

    value: float
    spread: float | None = None


class SquareRoot:
    """The moments of a set of images and the symmetric square root of their covariance.

    `rank` is the covariance's. Raises UserError for a matrix that is no covariance.
    """

    def __init__(self, moments: Moments, device: torch.device) -> None:
        self.moments = moments
        covariance = moments.covariance.to(device)
        if not covariance.isfinite().all() or not moments.mean.isfinite().all():
            raise UserError("mean and covariance have values that are not finite")
        if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9):
            raise UserError("sigma is no covariance: it is not symmetric")
        values, vectors = torch.linalg.eigh(covariance)
        largest = float(values[-1])
        if values[0] < -_TOLERANCE * max(largest, 0.0) or largest < 0:
            raise UserError(f"sigma is no covariance: it has the eigenvalue {float(values[0]):.3g}")
        self.rank = _rank(values)
        self.matrix = (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def rank_of(moments: Moments, device: torch.device) -> int:
    """The numerical rank of a covariance [D, D].

    Below D the matrix root is ill-conditioned: the images don't span all features, and more images would be nearer. For
    at most D images nothing is computed, because N of them have rank N - 1 unless they depend on each other.
    """
    if 0 < moments.images <= len(moments.mean):
        return moments.images - 1
    return _rank(torch.linalg.eigvalsh(moments.covariance.to(device)))


def _rank(eigenvalues: Tensor) -> int:
    """How many of the eigenvalues, in ascending order, are distinguishable from 0 in their dtype."""
    return int((eigenvalues > len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]).sum())


def frechet_distance(a: SquareRoot, mean: Tensor, covariance: Tensor) -> float:
    """|m_a - m|^2 + tr(C_a + C - 2 (C_a^1/2 C C_a^1/2)^1/2), in float64 (Dowson & Landau 1982).

    The matrix under the last root is symmetric, unlike C_a C, so that its eigenvalues are real and well conditioned.
    """
    ours, root = a.moments, a.matrix
    mean, covariance = mean.to(root), covariance.to(root)
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = ours.covariance.trace().to(root) + covariance.trace()
    return max(0.0, float((ours.mean.to(root) - mean).square().sum() + traces - 2 * cross))


def frechet_spread(reference: SquareRoot, features: Tensor, resamplings: int, seed: int) -> float | None:
    """Standard deviation of the distance over resamplings of the features [N, D] with replacement.

    None without resamplings, of which there are at least 2 otherwise, and for fewer than 3 images. Covariances are
    computed in float32, whose errors are far smaller than the deviation.
    """
    if not resamplings or len(features) < 3:
        return None
    generator = torch.Generator().manual_seed(seed)
    centre = features.double().mean(dim=0).float()
    device, count = reference.matrix.device, len(features)
    centred = (features - centre).to(device)
    distances = []
    for _ in range(resamplings):
        times = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        weights = times.float().to(device)[:, None]
        mean = (centred * weights).sum(dim=0).double() / count
        products = (centred * weights).T @ centred
        covariance = (products.double() - count * mean.outer(mean)) / (count - 1)
        distances.append(frechet_distance(reference, mean + centre.to(mean), covariance))
    return float(torch.tensor(distances).std())


def inception_score(logits: Tensor, splits: int, seed: int, resamplings: int = 0) -> tuple[Score, float]:
    """exp of the mean KL divergence of each image's classes from those of all, over splits of a random order.

    logits are [N, K] without the bias, N at least `splits`. Returns the score with its deviation over resamplings, and
    the deviation over the splits that papers report (Salimans et al. 2016, https://arxiv.org/abs/1606.03498).
    """
    isc = torch_fidelity_module("metric_isc")

    def score(rows: Tensor) -> tuple[float, float]:
        found = isc.isc_features_to_metric(rows, splits, True, seed)
        return found[isc.KEY_METRIC_ISC_MEAN], found[isc.KEY_METRIC_ISC_STD]

    value, over_splits = score(logits)
    generator = torch.Generator().manual_seed(seed)
    again = [
        score(logits[torch.randint(len(logits), (len(logits),), generator=generator)])[0] for _ in range(resamplings)
    ]
    return Score(value, float(torch.tensor(again).std()) if resamplings else None), over_splits


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int, size: int, seed: int) -> Score:
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3, mean and deviation over random subsets.

    Features are [N, D] and [M, D], of at least `size` images (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401).
    """
    kid = torch_fidelity_module("metric_kid")
    found = kid.kid_features_to_metric(
        samples.double(), reference.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return Score(found[kid.KEY_METRIC_KID_MEAN], found[kid.KEY_METRIC_KID_STD])


def precision_recall(samples: Tensor, reference: Tensor, device: torch.device) -> tuple[Score, Score]:
    """Shares of samples in the reference's manifold (precision) and of reference images in the samples' (recall).

    Features are [N, D] and [M, D], more than NEIGHBOURS of each. The manifold of a set is the union of the balls around
    its images that reach to their third-nearest neighbours. The spread of a share p of n images is its bootstrap's,
    sqrt(p (1 - p) / n).
    """
    samples, reference = samples.to(device).double(), reference.to(device).double()
    return _share_within(samples, reference), _share_within(reference, samples)


def _share_within(images: Tensor, manifold: Tensor) -> Score:
    """The share of images [N, D] that lie in a ball of `manifold` [M, D], float64.

    A distance that equals a radius but for rounding is within it, which matters where the sets share images.
    """
    # The nearest neighbour of an image is the image itself. On a GPU `kthvalue` refuses deterministic mode, which a run
    # that trains with it is in.
    radii = torch.cat(
        [d.topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1] for d in _squared_distances(manifold, manifold)]
    )
    inside = torch.cat([(d <= radii * (1 + _TIE)).any(dim=1) for d in _squared_distances(images, manifold)])
    share = float(inside.double().mean())
    return Score(share, (share * (1 - share) / len(inside)) ** 0.5)


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances between rows of a [N, D] and b [M, D], float64, some rows of a at a time: [n, M] each."""
    centre = b.mean(dim=0)  # about it the products are small, and so are their rounding errors
    a, b = a - centre, b - centre
    lengths = b.square().sum(dim=1)
    for rows in a.split(max(1, _BLOCK // len(b))):
        both = rows.square().sum(dim=1, keepdim=True) + lengths
        distances = both - 2 * rows @ b.T
        yield distances.where(distances > _SAME * both, 0.0)
