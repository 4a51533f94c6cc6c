"""The training state and its step: a few micro-batches forward and backward, AdamW, and the averages of the weights.

A step is a function of the settings, the state and its number: images come from a seeded order, timesteps, noise
and dropped labels from counters (seed, position of the image in the stream), dropout from a seed per step. So a run
resumes exactly, and numbers drawn from counters don't depend on the number of processes.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import create_timestep_sampler
from fastdiff.diffusion.noise_keys import LABEL_DROPOUT, NOISE, TIMESTEPS, VALIDATION_NOISE, VALIDATION_TIMESTEPS
from fastdiff.errors import UserError
from fastdiff.images.loader import Batch, Loader, to_device
from fastdiff.models import SuperResSettings, UNet
from fastdiff.models.classifier import Classifier
from fastdiff.models.weights import with_info
from fastdiff.runtime.processes import Processes
from fastdiff.training.checkpoints.format import Snapshot, adam_state_dict
from fastdiff.training.checkpoints.saver import write_checkpoint
from fastdiff.training.deepspeed_engine import EngineStep, create_engine
from fastdiff.training.device_step import DeviceStep
from fastdiff.training.master_weights import MasterWeights
from fastdiff.training.metrics import LossMeter, LossResult
from fastdiff.training.objective import Objective
from fastdiff.training.optimizer import create_optimizer, learning_rate
from fastdiff.training.step_plan import StepPlan, compile_network
from fastdiff.training.validation import Validation


def low_res_of(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Shrink images [B, C, H, W] by area averaging, as super-resolution models see them in training."""
    return F.interpolate(x, size_hw, mode="area")


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """The part of a batch in these rows."""
    return Batch(batch.images[rows], batch.labels[rows], batch.positions[rows])


class Trainer:
    """Model, averages, optimiser and data position: everything that a checkpoint holds and a step changes."""

    def __init__(
        self,
        plan: StepPlan,
        model: UNet | Classifier,
        objective: Objective,
        loader: Loader,
        processes: Processes,
        snapshot: Snapshot | None = None,
        validation_images: Loader | None = None,
    ) -> None:
        self.plan, self.train = plan, plan.train
        self.model, self.model_settings = model, model.settings
        self.objective, self.loader = objective, loader
        self.processes, self.device = processes, processes.device
        if snapshot:
            model.load_state_dict(snapshot.model)
        model.to(self.device).train().set_precision(plan.dtype)
        self.optimizer = create_optimizer(model, plan)
        self.stepper: EngineStep | DeviceStep
        if plan.engine_reason:
            weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            engine = create_engine(model, self.optimizer, plan)
            self.master_weights = MasterWeights(engine.optimizer, model, processes.rank, processes.world_size)
            # DeepSpeed makes the master weights from weights already rounded to 16 bits, and may take a trial step.
            self.master_weights.fill(self.master_weights.shards, weights)
            self.optimizer.state.clear()
            self.stepper = EngineStep(self.losses, self.record, engine, self.optimizer, model, plan)
        else:
            self.master_weights = MasterWeights(self.optimizer, model, processes.rank, processes.world_size)
            self.stepper = DeviceStep(self.losses, self.record, self.optimizer, model, plan)
        if plan.train.compile is True:  # auto has been resolved already
            compile_network(model, plan.train.zero_stage, plan.in_regions)
        self.ema = {str(rate): self.master_weights.clone() for rate in self.train.ema_rate}
        self.optimizer.attach_averages(self.master_weights.shards, {float(rate): a for rate, a in self.ema.items()})
        self.timestep_sampler = create_timestep_sampler(
            self.train.schedule_sampler, objective.num_timesteps, self.device
        )
        self.meter = LossMeter(objective.num_timesteps, self.device, objective.loss_terms)
        self.step, self.samples = 0, 0  # optimiser steps (skipped ones included) and images so far
        self.stream_seed, self.rollbacks = self.train.seed, 0
        self.waited = 0.0  # seconds spent waiting for images
        self.validation: Validation | None = None
        if validation_images is not None:
            self.validation = Validation(self, validation_images, self.train.eval_interval)
        if snapshot:
            self._restore(snapshot)

    # --- one step ---

    def run(self) -> Iterator[int]:
        """Take steps until the last, yielding the number of steps done after each."""
        while self.step < self.train.last_step:
            self.take_step()
            yield self.step

    def take_step(self) -> None:
        """Take one optimiser step over batch_size images."""
        self.last_batch = self._next_batch()
        micro_batches = self.micro_batches(self.last_batch)
        self.stepper.take(micro_batches, self.step, functools.partial(self.seed_dropout, self.step))
        self.step += 1
        self.samples += self.train.batch_size
        if self.validation:
            self.validation.after_step()

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's part of a global batch, cut into micro-batches."""
        micro = self.plan.micro
        return [rows_of(batch, slice(i * micro, (i + 1) * micro)) for i in range(self.plan.accumulation)]

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.loader)
        self.waited += time.perf_counter() - start
        return self.on_device(batch)

    def on_device(self, batch: Batch) -> Batch:
        """The batch with its positions on the device as well."""
        return Batch(batch.images, batch.labels, to_device(batch.positions, self.device))

    def losses(self, network: Any, batch: Batch, validating: bool = False) -> LossResult:
        """The loss of a micro-batch under the trainer's counters and timestep sampler. Changes nothing.

        validating  whether the images are for validation, whose timesteps and noise are others
        """
        t, weights = self.draw_timesteps(batch, VALIDATION_TIMESTEPS if validating else TIMESTEPS)
        model_kwargs = {}
        if self.model_settings.class_cond:
            model_kwargs["y"] = self.labels_of(batch)
        if isinstance(self.model_settings, SuperResSettings):
            model_kwargs["low_res"] = low_res_of(ops.start_map(batch.images), self.model_settings.small_size)
        noise = self.noise_of(batch, VALIDATION_NOISE if validating else NOISE)
        terms = self.objective.training_losses(network, batch.images, t, model_kwargs, noise)
        return LossResult((terms["loss"] * weights).mean(), t, weights, terms)

    def record(self, result: LossResult) -> None:
        """Add a micro-batch's losses to the timestep sampler's history and to the meter. Collective."""
        self.timestep_sampler.update(result.t, result.terms["loss"].detach())
        self.meter.add(result.t, result.weights, result.terms)

    def draw_timesteps(self, batch: Batch, key: int = TIMESTEPS) -> tuple[Tensor, Tensor]:
        """Timesteps [B] int64 and importance weights [B] float32 of a micro-batch."""
        return self.timestep_sampler.sample(ops.image_uniform(self.stream_seed | key, batch.positions, 0))

    def labels_of(self, batch: Batch) -> Tensor:
        """Labels [B] int64 of a micro-batch, a share of them replaced by the null class (Ho & Salimans 2022)."""
        if not self.train.label_dropout:
            return batch.labels
        uniform = ops.image_uniform(self.stream_seed | LABEL_DROPOUT, batch.positions, 0)
        return batch.labels.masked_fill(uniform < self.train.label_dropout, self.model_settings.num_classes)

    def noise_of(self, batch: Batch, key: int = NOISE) -> ops.CounterNoise:
        """The noise of a micro-batch, keyed by the images' positions in the stream."""
        _, H, W, C = batch.images.shape
        return ops.CounterNoise(self.stream_seed | key, batch.positions, (C, H, W))

    def seed_dropout(self, step: int, micro: int) -> None:
        """Seed PyTorch's generators for micro-batch number `micro` of the step after `step` others."""
        entropy = [self.stream_seed, step, self.processes.rank, micro]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        # torch.manual_seed would also format a stack trace for each kind of device that isn't there.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # --- reporting ---

    def read_metrics(self) -> dict[str, float]:
        """Means since the last call, under improved-diffusion's names. Waits for the device. Collective."""
        metrics = self.meter.read()
        if self.validation:
            metrics |= self.validation.read_metrics()
        norms = [float(norm) for norm in self.stepper.grad_norms if norm is not None]
        finite = [norm for norm in norms if math.isfinite(norm)] or norms  # not finite where a step was skipped
        if finite:
            metrics["grad_norm"] = sum(finite) / len(finite)
        self.stepper.grad_norms.clear()
        metrics["samples"] = float(self.samples)
        skipped = self.stepper.skipped_steps
        metrics["lr"] = learning_rate(self.train, max(0, self.step - skipped - 1))
        if self.train.precision == "fp16":
            metrics["lg_loss_scale"] = math.log2(self.stepper.scaler_state()["cur_scale"])
        if skipped or self.train.precision == "fp16":
            metrics["skipped_steps"] = float(skipped)
        return metrics

    # --- checkpoints ---

    def save(self, folder: Path, info: dict[str, Any]) -> None:
        """Write the state to `folder`/step_NNNNNN before returning. Collective."""
        files = self.checkpoint_files(info)
        if self.processes.is_main:
            write_checkpoint(folder, self.step, files)
        else:
            deque(files, maxlen=0)
        self.processes.barrier()

    @property
    def state_bytes(self) -> int:
        """The size of a checkpoint to within some kilobytes: weights, averages and two moments in fp32."""
        return 4 * (3 + len(self.ema)) * sum(shape.numel() for shape in self.master_weights.shapes.values())

    def checkpoint_files(self, info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the files of a checkpoint one after another: (name, content for torch.save). Collective.

        The weights carry `info` (JSON) in their metadata. On ranks other than 0 the content of weights and moments is
        None; they have to iterate to the end too.
        """
        averages = {f"ema_{rate}_": tensors for rate, tensors in self.ema.items()}
        for prefix, tensors in {"model": self.master_weights.shards, **averages}.items():
            yield f"{prefix}{self.step:06d}.pt", self._gather_weights(tensors, info)
        moments, updates = self._moments()
        yield f"opt{self.step:06d}.pt", self._gather_moments(moments, updates)
        yield "state.pt", self._rest_of_state(updates)

    def _gather_weights(self, tensors: list[Tensor], info: dict[str, Any]) -> dict[str, Tensor] | None:
        state = self.master_weights.gather(tensors)
        return None if state is None else with_info(state, info)

    def _gather_moments(self, moments: dict[str, list[Tensor]], updates: int) -> dict[str, Any] | None:
        exp_avg, exp_avg_sq = (self.master_weights.gather(moments[key]) for key in ("exp_avg", "exp_avg_sq"))
        if exp_avg is None or exp_avg_sq is None:
            return None
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        return adam_state_dict(exp_avg, exp_avg_sq, updates, group)

    def _rest_of_state(self, updates: int) -> dict[str, Any]:
        """The content of state.pt. Collective."""
        return {
            "step": self.step,
            "updates": updates,
            **self.stepper.state_dict(),
            "samples": self.samples,
            "seed": self.train.seed,
            "stream_seed": self.stream_seed,
            "rollbacks": self.rollbacks,
            "settings": self.train.model_dump(mode="json"),
            "loader": self.loader.state_dict(),
            "class_names": list(self.loader.class_names),
            "timestep_sampler": self.timestep_sampler.state_dict(),
            "loss_scaler": self.stepper.scaler_state() if self.train.precision == "fp16" else {},
            "meter": self.meter.state_dict(),
            **({"validation": self.validation.state_dict()} if self.validation else {}),
            "grad_norms": [float(norm) for norm in self.stepper.grad_norms if norm is not None],
            "world_size": self.processes.world_size,
            "microbatch": self.plan.micro,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "channels_last": ops.keeps_channels_last(),
        }

    def _moments(self) -> tuple[dict[str, list[Tensor]], int]:
        """AdamW's moments on this rank, laid out like the shards (zeros before the first update), and the updates."""
        states = [self.optimizer.state.get(shard, {}) for shard in self.master_weights.shards]
        steps = [state["step"] for state in states if "step" in state]
        updates = int(torch.stack(steps).max()) if steps else 0  # one wait for the device, not one for each
        pairs = list(zip(states, self.master_weights.shards, strict=True))
        return {
            key: [state[key] if key in state else torch.zeros_like(shard) for state, shard in pairs]
            for key in ("exp_avg", "exp_avg_sq")
        }, updates

    def roll_back(self, snapshot: Snapshot) -> None:
        """Return to a snapshot, and draw other images, timesteps and noise from there than the first time."""
        self.master_weights.load(self.model, snapshot.model)
        self.optimizer.state.clear()
        self._restore(snapshot)
        self.rollbacks += 1
        self._take_stream(int(np.random.SeedSequence([self.train.seed, self.rollbacks]).generate_state(1)[0]))
        self.stepper.start_over()

    def _take_stream(self, seed: int) -> None:
        """Set the seed of everything that is drawn per image."""
        self.stream_seed = seed
        self.loader.reseed(seed)

    def _restore(self, snapshot: Snapshot) -> None:
        for rate, averages in self.ema.items():
            self.master_weights.fill(averages, snapshot.ema.get(rate, snapshot.model))
        if snapshot.exp_avg:
            updates = torch.tensor(float(snapshot.state.get("updates", snapshot.step)))
            for key in ("exp_avg", "exp_avg_sq"):
                tensors = self.master_weights.zeros()
                self.master_weights.fill(tensors, getattr(snapshot, key))
                for shard, tensor in zip(self.master_weights.shards, tensors, strict=True):
                    self.optimizer.state[shard][key] = tensor
            for shard in self.master_weights.shards:
                self.optimizer.state[shard]["step"] = updates.to(shard.device, copy=True)
        self.step = snapshot.step
        state = snapshot.state
        self.stepper.load_state_dict({name: state.get(name, 0) for name in ("skipped_steps", "bad_streak")})
        # A checkpoint without this state does not say how many images it has seen: assume these steps' batches.
        self.samples = state.get("samples", snapshot.step * self.train.batch_size)
        self.loader.load_state_dict(state.get("loader") or {**self.loader.state_dict(), "position": self.samples})
        self.rollbacks = state.get("rollbacks", 0)
        if self.rollbacks and state.get("seed") == self.train.seed:
            self._take_stream(state["stream_seed"])
        if state.get("timestep_sampler"):
            try:
                self.timestep_sampler.load_state_dict(state["timestep_sampler"])
            except ValueError as error:
                raise UserError(f"--schedule_sampler: {error}; keep the checkpoint's diffusion steps") from None
            except (KeyError, AttributeError, TypeError, RuntimeError) as error:
                raise UserError(
                    "--schedule_sampler: the checkpoint's timestep_sampler holds no history; take another checkpoint"
                ) from error
        self.stepper.load_scaler_state(state.get("loss_scaler", {}))
        if "meter" in state:
            self.meter.load_state_dict(state["meter"])
        if self.validation:
            self.validation.restore(state.get("validation"))
        self.stepper.grad_norms[:] = state.get("grad_norms", [])
