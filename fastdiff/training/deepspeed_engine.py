"""DeepSpeed: its process group, its engine, and a step through the engine. Only this file imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from fastdiff.errors import UserError
from fastdiff.images.loader import Batch
from fastdiff.models.encoder import Encoder
from fastdiff.runtime.processes import Processes, current, join
from fastdiff.settings import what_is_wrong
from fastdiff.training.device_step import Losses, OptimizerStep, Record, poison_gradients
from fastdiff.training.optimizer import AdamWEMA, learning_rate
from fastdiff.training.step_plan import StepPlan

_TIMEOUT_MARGIN = 2.0  # minutes
_LONGEST = 60.0
"""Minutes for which one rank may write, compile or draw while others wait in a collective."""


def _import_deepspeed() -> Any:
    """Import deepspeed without its messages, for the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"training needs DeepSpeed, which can't be imported ({error}); pip install deepspeed"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory reduction for CPUs would be compiled at every first start: a minute, and a compiler needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def collective_timeout(stall_minutes: float) -> timedelta:
    """Time-out of a collective: longer than any healthy one takes, because the watchdog ends a run that hangs."""
    return timedelta(minutes=max(stall_minutes, _LONGEST) + _TIMEOUT_MARGIN)


def start_processes(stall_minutes: float = 10.0, early: bool = False) -> Processes:
    """Join the other processes and set up DeepSpeed's communication. A lone process needs neither yet.

    The others must arrive within stall_minutes and a margin, or within `collective_timeout` where this process may be
    early. After that every collective has that time-out.
    """
    timeout = collective_timeout(stall_minutes)
    # DeepSpeed creates its groups with torch's default time-out, so that default is replaced.
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    processes = join(timeout=timeout if early else timedelta(minutes=stall_minutes + _TIMEOUT_MARGIN))
    if processes.world_size > 1:
        c10d._set_pg_timeout(timeout)
        _connect()
    return processes


def _connect() -> Any:
    """Import deepspeed and let it communicate through torch's process group, which a lone process gets here."""
    deepspeed = _import_deepspeed()
    backend = "nccl" if current().device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # a lone process needs no port
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    timeout = dist.distributed_c10d.default_pg_timeout
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return deepspeed


@contextmanager
def _no_broadcasts(deepspeed: Any) -> Iterator[None]:
    """Within the block DeepSpeed broadcasts no weights, as it does even where there is no other rank.

    On a GPU this first collective would start NCCL, which a lone process does not need.
    """
    broadcast = deepspeed.comm.broadcast
    deepspeed.comm.broadcast = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.broadcast = broadcast


def create_engine(model: Encoder, optimizer: AdamWEMA, plan: StepPlan) -> Any:
    """Wrap a model with loaded weights and its optimiser in DeepSpeed's engine."""
    deepspeed, config = _connect(), plan.deepspeed_json(sum(p.numel() for p in model.parameters()))
    try:
        with _no_broadcasts(deepspeed) if plan.world_size == 1 else nullcontext():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    except Exception as error:  # DeepSpeed checks its JSON with many kinds of exception
        if not plan.deepspeed:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ValidationError):
            reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {what_is_wrong(error)}"
        raise UserError(f"deepspeed: DeepSpeed refuses these settings: {reason}") from error
    return engine


class EngineStep(OptimizerStep):
    """A step through the engine.

    DeepSpeed's own optimisers skip a step whose reduced gradients are not finite. AdamWEMA alone doesn't check them:
    `_check_gradients` does.
    """

    def __init__(
        self, losses: Losses, record: Record, engine: Any, optimizer: AdamWEMA, model: Encoder, plan: StepPlan
    ) -> None:
        super().__init__(losses, record, optimizer, model, plan, torch.device("cpu"))
        self.engine = engine
        self.plain = engine.optimizer is optimizer  # in fp32 without ZeRO DeepSpeed does not wrap the optimiser

    @property
    def network(self) -> Any:
        return self.engine

    def take(self, micro_batches: list[Batch], step: int, seed_dropout: Callable[[int], None]) -> None:
        """Forward and backward pass of each micro-batch, then the update. `step` counts all earlier steps."""
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
        """Record the norm of the gradients before they are clipped; the optimiser skips the step if it is not finite.

        Without ZeRO and in fp32, the parameters hold the gradients.
        """
        norm = float(self.optimizer.squared_norm().sqrt())
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
