"""Validates a classifier while it trains, on images that it isn't trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastdiff.images.loader import Loader
from fastdiff.training.metrics import LossMeter

if TYPE_CHECKING:
    from fastdiff.training.trainer import Trainer


class Validation:
    """Losses and accuracies of a batch of validation images every `interval` steps, averaged until they are read.

    Which images come, their timesteps and their noise follow from the seed and the step, so that a run resumes exactly.
    """

    def __init__(self, trainer: Trainer, loader: Loader, interval: int) -> None:
        self.loader, self.interval = loader, interval
        self._trainer = trainer
        self.meter = LossMeter(trainer.objective.num_timesteps, trainer.device, trainer.objective.loss_terms)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take a batch if one is due after the step that the trainer has taken. Collective with sharded weights."""
        trainer = self._trainer
        if trainer.step % self.interval:
            return
        network = trainer.stepper.network
        network.eval()
        for batch in trainer.micro_batches(trainer.on_device(next(self.loader))):
            result = trainer.losses(network, batch, validating=True)
            self.meter.add(result.t, result.weights, result.terms)
        network.train()

    def read_metrics(self) -> dict[str, float]:
        """Means since the last call: val_loss, val_acc@1, ... Collective."""
        return {f"val_{name}": mean for name, mean in self.meter.read().items()}

    def state_dict(self) -> dict[str, Any]:
        return self.meter.state_dict()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue after the trainer's step, with the means of `state_dict`, if there are any."""
        batches = self._trainer.step // self.interval
        position = batches * self._trainer.train.batch_size
        self.loader.load_state_dict({**self.loader.state_dict(), "position": position})
        if state:
            self.meter.load_state_dict(state)
