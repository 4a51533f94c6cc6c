"""A cascade: images of a base model, enlarged by a super-resolution model as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.models import SuperResSettings
from fastdiff.sampling.drawn import Drawn
from fastdiff.sampling.low_res import as_low_res
from fastdiff.sampling.network import Network
from fastdiff.sampling.sampler import Sampler
from fastdiff.settings import UserError


class Cascade:
    """Draws as a Sampler does: the same images as a job of the base model, and one that enlarges its npz."""

    def __init__(self, base: Sampler, upsampler: Callable[[Callable[[Tensor], dict[str, Tensor]]], Sampler]) -> None:
        """upsampler makes the second sampler, given its inputs."""
        self.base = base
        self._index = np.zeros(0, dtype=np.int64)
        self._small = Drawn(np.zeros(0, dtype=np.uint8), None)
        self.upsampler = upsampler(self._inputs)
        self.notes = [*base.notes, *(f"enlarging: {note}" for note in self.upsampler.notes)]

    def draw(self, index: np.ndarray, on_progress: Callable[[float], None] = lambda images: None) -> Drawn:
        """Large images `index` [n] int64, with the base images' labels; see `drawn.Draw`."""
        share = self.base.flops / (self.base.flops + self.upsampler.flops)
        self._index, self._small = index, self.base.draw(index, lambda images: on_progress(images * share))
        large = self.upsampler.draw(index, lambda images: on_progress(images * (1 - share)))
        return Drawn(large.images, self._small.labels)

    def trace(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """As Sampler.trace, of the enlarging."""
        self._index, self._small = index, self.base.draw(index)
        return self.upsampler.trace(index)

    def identity(self) -> dict[str, Any]:
        """Both samplers' settings, the second's with sr_ before their names."""
        return {**self.base.identity(), **{f"sr_{name}": value for name, value in self.upsampler.identity().items()}}

    def _inputs(self, index: Tensor) -> dict[str, Tensor]:
        rows = np.searchsorted(self._index, index.cpu().numpy())
        given = {"low_res": as_low_res(self._small.images[rows], index.device)}
        if self.upsampler.network.settings.class_cond:
            assert self._small.labels is not None
            given["y"] = torch.from_numpy(self._small.labels[rows]).to(index.device)
        return given


def check_fit(base: Network, upsampler: Network) -> None:
    """UserError unless the second network enlarges what the first one draws."""
    small, large = base.settings, upsampler.settings
    assert isinstance(large, SuperResSettings)
    who = f"--sr_model_path: {upsampler.file}"
    if large.small_size != small.size_hw:
        sizes = ["x".join(map(str, size)) for size in (large.small_size, small.size_hw)]
        raise UserError(f"{who} enlarges images of {sizes[0]} pixels, the model draws {sizes[1]}")
    if large.in_channels != small.in_channels:
        raise UserError(f"{who} takes images of {large.in_channels} channels, the model draws {small.in_channels}")
    if large.class_cond and not small.class_cond:
        raise UserError(f"{who} needs classes, which the model doesn't have")
    if large.class_cond and upsampler.known_classes != base.known_classes:
        raise UserError(f"{who} knows {upsampler.known_classes} classes, the model {base.known_classes}")
