"""An optimiser step through DeepSpeed's engine: any number of processes, any ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastdiff import ops
from fastdiff.images.loader import Batch
from fastdiff.models import UNet
from fastdiff.training.device_step import Losses, OptimizerStep, Record, poison_gradients
from fastdiff.training.optimizer import AdamWEMA, laid_out_as, learning_rate
from fastdiff.training.step_plan import StepPlan


class EngineStep(OptimizerStep):
    """A step through the engine, which DeepSpeed's own optimisers skip if a reduced gradient is not finite.

    AdamWEMA alone checks nothing: for it `_check_gradients` does.
    """

    def __init__(
        self, losses: Losses, record: Record, engine: Any, optimizer: AdamWEMA, model: UNet, plan: StepPlan
    ) -> None:
        super().__init__(losses, record, optimizer, model, plan, torch.device("cpu"))
        self.engine = engine
        self.plain = engine.optimizer is optimizer  # in fp32 without ZeRO DeepSpeed does not wrap the optimiser

    def take(self, micro_batches: list[Batch], step: int, seed_dropout: Callable[[int], None]) -> None:
        """Forward and backward pass of each micro-batch, then the update. `step` counts earlier steps, even skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step - self.skipped_steps)
        loss_scale = self.scaler_state().get("cur_scale", 1.0)
        for i, batch in enumerate(micro_batches):
            seed_dropout(i)
            result = self.losses(self.engine, batch)
            self.record(result)
            self.engine.backward(poison_gradients(result.loss))
            if i == self.accumulation - 1 and self.plain:
                self._check_gradients()
            self.engine.step()
        if not self.plain:
            self.grad_norms.append(self.engine.get_global_grad_norm())
        searching = self.scaler_state().get("cur_scale", 1.0) < loss_scale
        self._skips.note(torch.tensor(not self.engine.was_step_applied()), torch.tensor(bool(searching)))

    def _check_gradients(self) -> None:
        """Note the norm of the gradients before they are clipped; where it is not finite the optimiser skips the step.

        Here the parameters hold the gradients themselves.
        """
        gradients = [laid_out_as(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = float(ops.squared_norm(gradients).sqrt())
        self.optimizer.overflow = not math.isfinite(norm)
        self.grad_norms.append(norm)

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scale of fp16; empty in other precisions."""
        scaler = self._scaler()
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        scaler = self._scaler()
        for name, value in state.items():
            if scaler is not None and hasattr(scaler, name):
                setattr(scaler, name, value)

    def _scaler(self) -> Any:
        """The object in which DeepSpeed keeps the dynamic loss scale; None if there is none."""
        optimizer = self.engine.optimizer
        places = (getattr(optimizer, "loss_scaler", None), getattr(optimizer, "loss_scale_config", None), optimizer)
        return next((place for place in places if hasattr(place, "cur_scale")), None)
