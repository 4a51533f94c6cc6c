"""One optimiser step: through DeepSpeed's engine, or on the device alone, where CUDA graphs can replay it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images import Batch
from fastdiff.models import UNet
from fastdiff.training.loss_scale import LossScale
from fastdiff.training.optimizer import AdamWEMA, OnDevice, laid_out_as
from fastdiff.training.settings import TrainSettings

Losses = Callable[[Any, Batch], Tensor]
"""losses(network, micro-batch) → the scalar to be minimised"""

WARM_UP = 3
"""Steps taken before graphs are captured: code is compiled in them, and cuDNN chooses its kernels."""


class EngineStep:
    """Through DeepSpeed: any number of processes, any ZeRO stage."""

    def __init__(self, losses: Losses, engine: Any, optimizer: AdamWEMA, model: UNet, accumulation: int) -> None:
        self.losses, self.engine, self.optimizer, self.model = losses, engine, optimizer, model
        self.accumulation = accumulation
        self.skipped_steps = 0
        self.grad_norms: list[Tensor | float] = []
        self.plain = engine.optimizer is optimizer  # fp32 without ZeRO: DeepSpeed puts nothing around the optimiser

    def take(self, micro_batches: list[Batch], lr: float, seed_dropout: Callable[[int], None]) -> None:
        """Forward and backward for each micro-batch, then the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for i, batch in enumerate(micro_batches):
            seed_dropout(i)
            self.engine.backward(self.losses(self.engine, batch))
            if i == self.accumulation - 1:
                self._note_gradient_norm(before=True)
            self.engine.step()
        self._note_gradient_norm(before=False)
        if not self.engine.was_step_applied():  # then the averages stayed as they were, too
            self.skipped_steps += 1

    def _note_gradient_norm(self, before: bool) -> None:
        """Without ZeRO and in fp32 the gradients are the parameters' own: clipped in the step, and gone after it."""
        if before and self.plain and not self.optimizer.keeps_grad_norm:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.grad_norms.append(torch.nn.utils.get_total_norm(gradients))
        elif not before and not self.plain:
            self.grad_norms.append(self.engine.get_global_grad_norm())
        elif not before and self.optimizer.last_grad_norm is not None:
            self.grad_norms.append(self.optimizer.last_grad_norm)

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


class DeviceStep:
    """On one device, without a number from the host: nothing waits, and with cuda_graph CUDA graphs replay it.

    Parameters and gradients are float32 here whatever the precision; the network casts weights where it uses them. A
    micro-batch is one graph and the update another, so that any accumulation needs the memory of one micro-batch.
    """

    def __init__(self, losses: Losses, optimizer: AdamWEMA, model: UNet, train: TrainSettings, accumulation: int):
        device = next(model.parameters()).device
        self.losses, self.optimizer, self.model = losses, optimizer, model
        self.grad_clip, self.accumulation = train.grad_clip, accumulation
        self.scale: LossScale | None = None
        if train.precision == "fp16":
            self.scale = LossScale(max(1, round(1 / train.fp16_scale_growth)), device)
        optimizer.keeps_grad_norm = not (self.scale or self.grad_clip)
        self.grad_norms: list[Tensor | float] = []
        self._parameters = list(model.parameters())
        self._lr = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._inputs: Batch | None = None
        self._steps = 0
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device) if train.cuda_graph and device.type == "cuda" else None

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients overflowed. Waits for the device if there can be any."""
        return int(self._skipped) if self.scale else 0

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped.fill_(count)

    def take(self, micro_batches: list[Batch], lr: float, seed_dropout: Callable[[int], None]) -> None:
        """Forward and backward for each micro-batch, then the update. The learning rate is a float32 here."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr  # for the checkpoint
        for i, batch in enumerate(micro_batches):
            if self._stream is None:
                self._inputs = batch
            else:
                self._put(batch)
            seed_dropout(i)
            self._run("more" if i else "first", functools.partial(self._accumulate, first=i == 0))
        self._lr.fill_(lr)
        self._run("update", self._update, prepare=self.optimizer.prepare)
        self.grad_norms.append(self._grad_norm.clone())
        self._steps += 1

    def _put(self, batch: Batch) -> None:
        """Copy a micro-batch to where graphs read it."""
        given = (batch.images, batch.labels, batch.positions)
        if self._inputs is None:
            self._inputs = Batch(*(tensor.clone() for tensor in given))
        for place, tensor in zip(
            (self._inputs.images, self._inputs.labels, self._inputs.positions), given, strict=True
        ):
            place.copy_(tensor, non_blocking=True)

    def _run(self, name: str, work: Callable[[], None], prepare: Callable[[], None] | None = None) -> None:
        if self._stream is None:
            work()
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._steps < WARM_UP:
                work()
            else:
                if name not in self._graphs:
                    self._capture(name, work, prepare)
                self._graphs[name].replay()
        current.wait_stream(self._stream)

    def _capture(self, name: str, work: Callable[[], None], prepare: Callable[[], None] | None) -> None:
        if prepare is not None:
            prepare()  # what must reach the device before, for a capture takes no copies from the host
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # thread_local: the loader's threads go on with CUDA calls of their own.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._graphs[name] = graph

    def _accumulate(self, first: bool) -> None:
        """Gradients of the micro-batch in place, added to those of the ones before."""
        assert self._inputs is not None
        if first:
            for p in self._parameters:
                p.grad = None
        loss = self.losses(self.model, self._inputs) / self.accumulation
        (loss if self.scale is None else loss * self.scale.cur_scale).backward()
        for p in self._parameters:
            if p.grad is not None:
                p.grad = laid_out_as(p, p.grad)

    def _update(self) -> None:
        """Clip, AdamW, averages, loss scale."""
        if self.optimizer.keeps_grad_norm:
            self.optimizer.step_on_device(OnDevice(self._lr))
            if self.optimizer.last_grad_norm is not None:
                self._grad_norm.copy_(self.optimizer.last_grad_norm)
            return
        squared = ops.squared_norm([p.grad for p in self._parameters if p.grad is not None])
        loss_scale = self.scale.cur_scale if self.scale else 1.0
        grad_scale, found_inf = ops.grad_scale_and_overflow(squared, loss_scale, self.grad_clip)
        self._grad_norm.copy_(squared.sqrt() / loss_scale)
        self.optimizer.step_on_device(OnDevice(self._lr, grad_scale, found_inf if self.scale else None))
        if self.scale:
            self.scale.update(found_inf)
            self._skipped += found_inf.to(torch.int64)

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scale of fp16; empty without one."""
        return self.scale.state_dict() if self.scale else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self.scale:
            self.scale.load_state_dict(state)
