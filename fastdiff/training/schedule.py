"""The learning rate by the number of updates, on the host and on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.training.settings import TrainSettings


def learning_rate(train: TrainSettings, updates: int) -> float:
    """Of the update that follows `updates` others: a linear rise over lr_warmup_steps, a linear fall to 0."""
    rate = train.lr
    if train.lr_warmup_steps:
        rate *= min(1.0, (updates + 1) / train.lr_warmup_steps)
    if train.lr_anneal_steps:
        rate *= max(0.0, 1 - updates / train.lr_anneal_steps)
    return rate


def learning_rate_on_device(train: TrainSettings, updates: Tensor) -> Tensor:
    """`learning_rate` of an int64 scalar on the device, to the last bit: a float64 scalar there."""
    rate = torch.full_like(updates, train.lr, dtype=torch.float64)
    if train.lr_warmup_steps:
        rate = rate * ((updates + 1).double() / train.lr_warmup_steps).clamp(max=1.0)
    if train.lr_anneal_steps:
        rate = rate * (1 - updates.double() / train.lr_anneal_steps).clamp(min=0.0)
    return rate
