"""Dummy inputs of a network, to time it, to measure its memory, or to record its kernel launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.models.settings import BackboneSettings, SuperResSettings
from fastdiff.ops import CounterNoise


class DummyBatch(NamedTuple):
    """What `GaussianDiffusion.training_losses` takes after the network."""

    images: Tensor  # [B, H, W, C] uint8
    t: Tensor  # [B] int64
    model_kwargs: dict[str, Tensor]  # "y" [B] int64 and "low_res" [B, C, h, w] float32, where the network takes them
    noise: CounterNoise  # of the positions 0 to B - 1


def dummy_batch(settings: BackboneSettings, size: int, device: torch.device) -> DummyBatch:
    """A batch of `size` black images, at timestep 0."""
    C, (H, W) = settings.in_channels, settings.size_hw
    images = torch.zeros(size, H, W, C, dtype=torch.uint8, device=device)
    positions = torch.arange(size, device=device)
    model_kwargs = {"y": positions % settings.num_classes} if settings.class_cond else {}
    if isinstance(settings, SuperResSettings):
        model_kwargs["low_res"] = torch.zeros(size, C, *settings.small_size, device=device)
    return DummyBatch(images, torch.zeros_like(positions), model_kwargs, CounterNoise(0, positions, (C, H, W)))
