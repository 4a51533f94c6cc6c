"""Optimiser steps: their base class, and one that DeepSpeed takes no part in, which CUDA graphs can replay.

This file also holds what such a step keeps on the device: the counts of skipped steps and fp16's loss scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images.loader import Batch
from fastdiff.models.encoder import Encoder
from fastdiff.runtime.cuda_graphs import GraphRunner
from fastdiff.training.metrics import LossResult
from fastdiff.training.optimizer import AdamWEMA, OnDevice, learning_rate, learning_rate_on_device
from fastdiff.training.step_plan import StepPlan

Losses = Callable[[Any, Batch], LossResult]
"""Computes losses(network, micro-batch), without side effects."""
Record = Callable[[LossResult], None]
"""Adds the losses of a micro-batch to what is logged and to the timestep sampler's history."""
WARM_UP = 3
"""Steps before graphs are captured, in which code is compiled and cuDNN chooses its kernels."""


class OptimizerStep:
    """Base of `DeviceStep` and `EngineStep`. A step with a non-finite loss or gradient changes no weight or moment.

    grad_norms  norms of the gradients before clipping, of the steps since the list was last emptied
    """

    def __init__(
        self, losses: Losses, record: Record, optimizer: AdamWEMA, model: Encoder, plan: StepPlan, device: torch.device
    ) -> None:
        self.losses, self.record, self.optimizer, self.model = losses, record, optimizer, model
        self.train, self.accumulation = plan.train, plan.accumulation
        self.grad_norms: list[Tensor | float] = []
        self._skips = SkipCounter(device)

    @property
    def network(self) -> Any:
        """What `losses` calls in a step, on every rank."""
        return self.model

    @property
    def skipped_steps(self) -> int:
        """Number of steps with a non-finite loss or gradient. Waits for the device."""
        return self._skips.read()[0]

    def bad_streak(self) -> int:
        """Number of steps skipped in a row. On a GPU, which this doesn't wait for, it may be a step or two old."""
        return self._skips.poll()[1]

    def start_over(self) -> None:
        """Reset the streak, after weights and moments were loaded from a checkpoint, possibly into new tensors."""
        self._skips.set(self.skipped_steps, 0)

    def state_dict(self) -> dict[str, int]:
        skipped, streak = self._skips.read()
        return {"skipped_steps": skipped, "bad_streak": streak}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skips.set(state["skipped_steps"], state["bad_streak"])


class DeviceStep(OptimizerStep):
    """A step for which the host never waits for the device, and which CUDA graphs replay unless cuda_graph is False.

    Whether the step is skipped must be known before the update. That takes one more pass over the gradients, 2 or 4
    bytes per element, besides the 28 bytes of the update and 8 of each average.

    Master weights are float32 in every precision. With kernels, the network computes with 16-bit copies of most, which
    the update writes (`arrange_weights`), and the update reads their 16-bit gradients; those of several micro-batches
    are summed in float32. Otherwise the network casts weights where it uses them. A micro-batch is one graph and the
    update another, so that any accumulation needs the memory of one micro-batch.
    """

    def __init__(self, losses: Losses, record: Record, optimizer: AdamWEMA, model: Encoder, plan: StepPlan) -> None:
        device = next(model.parameters()).device
        super().__init__(losses, record, optimizer, model, plan, device)
        self.scale: LossScale | None = None
        if self.train.precision == "fp16":
            self.scale = LossScale(max(1, round(1 / self.train.fp16_scale_growth)), device)
        self._scales_gradients = plan.scales_gradients
        self._parameters = list(model.parameters())
        self._sums: list[Tensor] = []  # over micro-batches, of the gradients of 16-bit copies
        if self.accumulation > 1:
            for master, _ in optimizer.copies:
                master.grad = torch.zeros_like(master)
                self._sums.append(master.grad)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._inputs: Batch | None = None
        self._steps = 0
        self._graphs = GraphRunner(device, self.train.cuda_graph)

    def start_over(self) -> None:
        super().start_over()
        self._graphs.clear()
        self._steps = 0

    def take(self, micro_batches: list[Batch], step: int, seed_dropout: Callable[[int], None]) -> None:
        """Forward and backward pass of each micro-batch, then the update. `step` counts all earlier steps.

        The learning rate is computed on the device, where skipped steps are counted, and is a float32 there.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, max(0, step - self._skips.known[0]))  # for the checkpoint
        warming_up = self._steps < WARM_UP
        for i, batch in enumerate(micro_batches):
            if self._graphs.enabled:
                self._put(batch)
            else:
                self._inputs = batch
            seed_dropout(i)
            accumulate = functools.partial(self._accumulate, first=i == 0)
            # The warm-up's gradients would lie beside those of the graphs, out of their reach.
            prepare = None if i else self._drop_gradients
            self._graphs.run("more" if i else "first", accumulate, warming_up=warming_up, prepare=prepare)
        self._step.fill_(step)
        self._graphs.run("update", self._update, warming_up=warming_up, prepare=self.optimizer.prepare)
        self._skips.publish()
        self.grad_norms.append(self._grad_norm.clone())
        self._steps += 1

    def _put(self, batch: Batch) -> None:
        """Copy a micro-batch into the tensors that the graphs read."""
        if self._inputs is None:
            self._inputs = Batch(**{name: tensor.clone() for name, tensor in vars(batch).items()})
        for name, tensor in vars(batch).items():
            getattr(self._inputs, name).copy_(tensor, non_blocking=True)

    def _accumulate(self, first: bool) -> None:
        """Add the gradients of the micro-batch in `_inputs` to those of earlier micro-batches."""
        assert self._inputs is not None
        if first:
            self._drop_gradients()
        result = self.losses(self.model, self._inputs)
        self.record(result)
        loss = poison_gradients(result.loss) / self.accumulation
        (loss if self.scale is None else loss * self.scale.cur_scale).backward()
        if self._sums:
            self._sum_gradients(first)

    @torch.no_grad()
    def _sum_gradients(self, first: bool) -> None:
        """Add the 16-bit gradients of a micro-batch to the float32 sums, and drop them, lest autograd add the next."""
        copies = [copy for _, copy in self.optimizer.copies]
        given = [(total, p.grad) for total, p in zip(self._sums, copies, strict=True) if p.grad is not None]
        sums, gradients = [total for total, _ in given], [gradient for _, gradient in given]
        if first:
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)
        for _, copy in self.optimizer.copies:
            copy.grad = None

    def _drop_gradients(self) -> None:
        for p in (*self._parameters, *(self.model.projection or ())):
            p.grad = None

    def _update(self) -> None:
        """Clip, AdamW, averages, loss scale; nothing but the scale changes where a gradient is not finite."""
        squared = self.optimizer.squared_norm()
        loss_scale = self.scale.cur_scale if self.scale else 1.0
        grad_scale, found_inf = ops.grad_scale_and_overflow(squared, loss_scale, self.train.grad_clip)
        self._grad_norm.copy_(squared.sqrt() / loss_scale)
        lr = learning_rate_on_device(self.train, self._step - self._skips.counts[0]).float()
        self.optimizer.step_on_device(OnDevice(lr, grad_scale if self._scales_gradients else None, found_inf))
        searching = None
        if self.scale:
            before = self.scale.cur_scale.clone()
            self.scale.update(found_inf)
            searching = self.scale.cur_scale < before
        self._skips.note(found_inf != 0, searching)

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scale of fp16; empty in other precisions."""
        return self.scale.state_dict() if self.scale else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self.scale:
            self.scale.load_state_dict(state)


def poison_gradients(loss: Tensor) -> Tensor:
    """Return the loss with unchanged gradients if it is finite, and NaN gradients otherwise.

    So the gradients show every non-finite loss: of any micro-batch and, once gradients are summed, of any rank.
    """
    return loss * (1 + 0 * loss.detach())


class SkipCounter:
    """Counts skipped steps on the device. Only `read` waits for it.

    counts  [2] int64: skipped steps in all, and in a row up to now. While fp16's loss scale still falls, a skipped step
            is part of the search for the scale and no sign of divergence: it neither extends the row nor ends it.
    known   the same numbers on the host: current on a CPU, a step or two old on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.known = (0, 0)
        self._pinned = torch.zeros(2, dtype=torch.int64, pin_memory=True) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def note(self, bad: Tensor, searching: Tensor | None = None) -> None:
        """Count a step. bad: it was skipped; searching: the loss scale fell in it. Bool scalars on the device."""
        adds = bad if searching is None else bad & ~searching
        self.counts.copy_(torch.stack([self.counts[0] + bad, (self.counts[1] + adds) * bad]))

    def publish(self) -> None:
        """Start copying the counts to the host, unless an earlier copy is still under way."""
        if self._pinned is None or (self._copied is not None and not self._copied.query()):
            return
        self.poll()
        self._pinned.copy_(self.counts, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def poll(self) -> tuple[int, int]:
        """`known`, updated as far as possible without waiting for a GPU."""
        if self._pinned is None:
            return self.read()
        if self._copied is not None and self._copied.query():
            self._copied = None
            skipped, streak = self._pinned.tolist()
            self.known = (skipped, streak)
        return self.known

    def read(self) -> tuple[int, int]:
        """`known`, made current. Waits for the device."""
        skipped, streak = self.counts.tolist()
        self.known, self._copied = (skipped, streak), None
        return self.known

    def set(self, skipped: int, streak: int) -> None:
        """Replace the counts."""
        self.counts.copy_(torch.tensor([skipped, streak]))
        self.known, self._copied = (skipped, streak), None


class LossScale:
    """fp16's loss scale: halves when gradients overflow, doubles after every `window` steps without an overflow.

    Only state_dict waits for the device.

    cur_scale            float32 scalar, at first 2^20 as in improved-diffusion.
    cur_iter             int64 scalar: updates so far, skipped ones included.
    last_overflow_iter   int64 scalar, -1 at first.
    """

    NAMES = ("cur_scale", "cur_iter", "last_overflow_iter")

    def __init__(self, window: int, device: torch.device) -> None:
        self.window = window
        self.cur_scale = torch.full((), 2.0**20, device=device)
        self.cur_iter = torch.zeros((), dtype=torch.int64, device=device)
        self.last_overflow_iter = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale after a step. found_inf: a scalar on the device, 0 unless gradients overflowed."""
        overflow = found_inf != 0
        quiet = self.cur_iter - self.last_overflow_iter - 1
        grows = (quiet > 0) & (quiet % self.window == 0)
        raised = torch.where(grows, 2 * self.cur_scale, self.cur_scale)
        self.cur_scale.copy_(torch.where(overflow, (self.cur_scale / 2).clamp(min=1.0), raised))
        self.last_overflow_iter.copy_(torch.where(overflow, self.cur_iter, self.last_overflow_iter))
        self.cur_iter += 1

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name).item() for name in self.NAMES}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in self.NAMES:
            if name in state:
                getattr(self, name).fill_(state[name])
