"""Fréchet's distance between two sets of images, in the features of a small classifier of the same images."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
REPEATS = 20  # subsets and resamplings


# --- the distance ---


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features [N, D], N at least 2."""
        x = features.double()
        return cls(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]))


def square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix [D, D] without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson & Landau 1982)."""
    root = square_root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def distance_and_spread(features: Tensor, real: Moments, size: int, seed: int = 0) -> tuple[float, float]:
    """Mean distance of subsets of `size` rows of features [N, D], and the deviation over resamplings of as many."""
    generator = torch.Generator().manual_seed(seed)
    count, size = len(features), min(size, len(features))
    subsets = [torch.randperm(count, generator=generator)[:size] for _ in range(REPEATS if size < count else 1)]
    again = [torch.randint(count, (size,), generator=generator) for _ in range(REPEATS)]
    distances, spread = (
        torch.tensor([frechet_distance(Moments.of(features[chosen]), real) for chosen in choices])
        for choices in (subsets, again)
    )
    return float(distances.mean()), float(spread.std())


def noise_floor(features: Tensor, labels: np.ndarray, size: int, seed: int = 0) -> tuple[float, float]:
    """Distance of `size` real images, at most half, from the rest: mean and deviation over random choices.

    They are chosen from the classes [N] in turn, as the drawn ones are.
    """
    generator = np.random.default_rng(seed)
    size = min(size, len(features) // 2)
    found = []
    for _ in range(REPEATS):
        turn = np.zeros(len(labels))  # of an image within its class, with chance among those of one turn
        for label in np.unique(labels):
            turn[labels == label] = generator.permutation(int((labels == label).sum()))
        order = torch.from_numpy(np.argsort(turn + generator.random(len(turn))))
        found.append(frechet_distance(Moments.of(features[order[:size]]), Moments.of(features[order[size:]])))
    return float(np.mean(found)), float(np.std(found, ddof=1))


# --- the classifier ---


class Classifier(nn.Module):
    """Convolutions down to 4 pixels, a layer of FEATURES features, and a layer of classes."""

    def __init__(self, channels: int, size_hw: tuple[int, int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, size = channels, min(size_hw)
        while size > 4 or not layers:
            wider = 32 if not layers else 64
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if size > 4 else []
            width, size = wider, size // 2
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.penultimate = nn.Sequential(nn.Linear(16 * width, FEATURES), nn.ReLU())
        self.last = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """[N, FEATURES] of images [N, C, H, W] in [-1, 1]."""
        return self.penultimate(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def as_maps(images: np.ndarray, device: torch.device) -> Tensor:
    """[N, H, W, C] uint8 → [N, C, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(
    images: np.ndarray, labels: np.ndarray, classes: int, device: torch.device, seconds: float = 60, steps: int = 1500
) -> Classifier:
    """Train a classifier from a fixed seed for `steps` batches of 64 images, each batch shifted by up to a pixel.

    Training ends early after `seconds` seconds.
    """
    torch.manual_seed(0)
    model = Classifier(images.shape[3], images.shape[1:3], classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    x, y = F.pad(as_maps(images, device), (1, 1, 1, 1), value=-1), torch.from_numpy(labels).to(device)
    height, width = images.shape[1:3]
    start = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator).to(device)
        down, right = torch.randint(3, (2,), generator=generator).tolist()
        moved = x[chosen, :, down : down + height, right : right + width]
        loss = F.cross_entropy(model(moved), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if time.perf_counter() - start > seconds:
            break
    return model.eval()


@torch.no_grad()
def seen(model: Classifier, images: np.ndarray, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """(features [N, FEATURES] on the host, classes [N]) that the classifier computes for images [N, H, W, C] uint8."""
    features, classes = [], []
    for part in np.array_split(images, -(-len(images) // 256)):
        found = model.features(as_maps(part, device))
        features.append(found.cpu())
        classes.append(model.last(found).argmax(dim=1).cpu())
    return torch.cat(features), torch.cat(classes).numpy()
