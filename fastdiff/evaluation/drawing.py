"""Draws the images to judge, batch by batch, and keeps what curves show of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.evaluation.statistics import Described
from fastdiff.runtime.processes import Processes
from fastdiff.sampling.build import Cascade
from fastdiff.sampling.sampler import Sampler

SHOWN = 10
"""Images of a set that a picture of several sets shows."""


@dataclass
class Drawn:
    """Images that were drawn, as the metrics see them; complete on rank 0."""

    described: Described
    first: np.ndarray | None = None
    """The first SHOWN images [n, H, W, C] uint8; None where a sampling job drew them, and on other ranks."""
    seconds: float = 0.0
    """Seconds that rank 0 spent on drawing its share, which is the largest."""
    of_its_class: float | None = None
    """The share of images whose class the feature network names; None where it doesn't know the model's classes."""


class DrawnImages:
    """This process's share of images 0 to count - 1 of a sampling job, drawn as they are iterated over, once.

    `seconds` is the time that drawing took.
    """

    def __init__(self, sampler: Sampler | Cascade, count: int, processes: Processes) -> None:
        self.sampler, self.count, self.processes = sampler, count, processes
        self.seconds = 0.0
        self._first: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        size, processes = base_of(self.sampler).batch_size, self.processes
        for start in range(processes.rank * size, self.count, processes.world_size * size):
            index = np.arange(start, min(start + size, self.count))
            begin = time.perf_counter()
            images = self.sampler.draw(index).images
            self.seconds += time.perf_counter() - begin
            self._first |= {i: image for i, image in zip(index.tolist(), images, strict=True) if i < SHOWN}
            yield torch.from_numpy(images), index

    def first(self) -> np.ndarray | None:
        """The first SHOWN images of all processes [n, H, W, C] on rank 0, None on the others. Collective."""
        shares = [self._first]
        if self.processes.world_size > 1:
            shares = [{}] * self.processes.world_size if self.processes.is_main else []
            dist.gather_object(self._first, shares or None)
        found = {number: image for share in shares for number, image in share.items()}
        return np.stack([found[i] for i in sorted(found)]) if found else None


def base_of(sampler: Sampler | Cascade) -> Sampler:
    """The sampler whose network the solver's steps evaluate and which chooses the classes."""
    return sampler.base if isinstance(sampler, Cascade) else sampler


def knows_classes(sampler: Sampler | Cascade, network: FeatureNetwork) -> bool:
    """Whether the network has a logit for each of the classes that the model draws."""
    drawn = base_of(sampler).network
    return drawn.settings.class_cond and network.widths.get("logits") == drawn.known_classes


def share_of_its_class(sampler: Sampler | Cascade, network: FeatureNetwork, described: Described) -> float:
    """The share of images number 0 to n - 1 to which the network assigns the class that they were drawn for."""
    base, logits = base_of(sampler), described.features["logits"]
    assert base.labels is not None
    wanted = base.labels(torch.arange(len(logits), device=base.device), base.settings.seed)
    return float((network.classes(logits) == wanted.cpu()).double().mean())
