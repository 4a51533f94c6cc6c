"""A trainer whose images, timesteps and noise are given, and a loader for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.timesteps import UniformSampler
from fastdiff.images.loader import Batch
from fastdiff.training.trainer import Trainer


class ScriptedLoader:
    """Batches of given images [steps, B, C, H, W] float; positions count rows."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.position, self.class_names = images, 0, ["only"]
        self.labels = torch.zeros(images.shape[:2], dtype=torch.int64) if labels is None else labels

    def __next__(self) -> Batch:
        row, labels = self.images[self.position], self.labels[self.position]
        positions = torch.full((len(row),), self.position)
        self.position += 1
        return Batch(row, labels, positions)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "num_images": 1000, "fingerprint": "made up"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def importance(sampler: UniformSampler, t: Tensor) -> Tensor:
    """Return the importance weights 1 / (T p_t) of given timesteps [B]."""
    p = sampler.weights() / sampler.weights().sum()
    return (1 / (len(p) * p[t])).float()


class ScriptedTrainer(Trainer):
    """A trainer that takes its timesteps, weights and noise from row `loader.position` of tensors [steps, B, ...]."""

    t: Tensor
    noise: Tensor
    weights: Tensor | None = None

    def draw_timesteps(self, batch: Batch, key: int = 0) -> tuple[Tensor, Tensor]:
        row = int(batch.positions[0])
        t = self.t[row]
        if self.weights is not None:
            return t, self.weights[row]
        return t, importance(self.timestep_sampler, t)

    def noise_of(self, batch: Batch, key: int = 0) -> Tensor:  # type: ignore[override]
        return self.noise[int(batch.positions[0])]
