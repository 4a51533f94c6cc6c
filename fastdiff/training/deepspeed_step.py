"""One optimiser step through DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff import ops
from fastdiff.images.loader import Batch
from fastdiff.models import UNet
from fastdiff.training.device_step import Losses, poison_gradients
from fastdiff.training.optimizer import AdamWEMA, laid_out_as, learning_rate
from fastdiff.training.settings import TrainSettings


class EngineStep:
    """Through DeepSpeed: any number of processes, any ZeRO stage.

    A step with a non-finite loss or gradient changes nothing on any rank. DeepSpeed's own optimisers see to that, each
    in its way and all by the reduced gradients; for the plain one, which looks at nothing, `_look` does it.
    """

    def __init__(self, losses: Losses, engine: Any, optimizer: AdamWEMA, model: UNet, accumulation: int) -> None:
        self.losses, self.engine, self.optimizer, self.model = losses, engine, optimizer, model
        self.accumulation = accumulation
        self.skipped_steps, self._streak = 0, 0
        self.grad_norms: list[Tensor | float] = []
        self.plain = engine.optimizer is optimizer  # fp32 without ZeRO: DeepSpeed puts nothing around the optimiser

    def take(
        self, micro_batches: list[Batch], train: TrainSettings, step: int, seed_dropout: Callable[[int], None]
    ) -> None:
        """Forward and backward for each micro-batch, then the update. `step` counts those before, skipped or not."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step - self.skipped_steps)
        loss_scale = self.scaler_state().get("cur_scale", 1.0)
        for i, batch in enumerate(micro_batches):
            seed_dropout(i)
            self.engine.backward(poison_gradients(self.losses(self.engine, batch)))
            if i == self.accumulation - 1 and self.plain:
                self._look()
            self.engine.step()
        if not self.plain:
            self.grad_norms.append(self.engine.get_global_grad_norm())
        if self.engine.was_step_applied():
            self._streak = 0
        else:
            self.skipped_steps += 1
            # Not where fp16's scale fell: see SkipCounter.
            self._streak += self.scaler_state().get("cur_scale", 1.0) >= loss_scale

    def _look(self) -> None:
        """The norm of the gradients, which are the parameters' own here, before they are clipped."""
        gradients = [laid_out_as(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = float(ops.squared_norm(gradients).sqrt())
        self.optimizer.overflow = not math.isfinite(norm)
        self.grad_norms.append(norm)

    def bad_streak(self) -> int:
        """Steps skipped in a row up to now."""
        return self._streak

    def start_over(self) -> None:
        """Weights and moments were replaced by those of a good checkpoint."""
        self._streak = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps, "bad_streak": self._streak}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped_steps, self._streak = state["skipped_steps"], state["bad_streak"]

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scale of fp16; empty without one."""
        scaler = self._scaler()
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        scaler = self._scaler()
        for name, value in state.items():
            if scaler is not None and hasattr(scaler, name):
                setattr(scaler, name, value)

    def _scaler(self) -> Any:
        """Where DeepSpeed keeps the dynamic loss scale; None without one."""
        optimizer = self.engine.optimizer
        for place in ("loss_scaler", "loss_scale_config"):
            if hasattr(getattr(optimizer, place, None), "cur_scale"):
                return getattr(optimizer, place)
        return optimizer if hasattr(optimizer, "cur_scale") else None
