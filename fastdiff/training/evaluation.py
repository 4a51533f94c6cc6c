"""Scores the averages of the weights during training, by images that each of them draws from the same noise."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.config.sections import Config
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.diffusion.solvers import SOLVERS, solver_table
from fastdiff.errors import UserError, blaming
from fastdiff.evaluation.collect import OF_MOMENTS, Batches, Wanted, collect
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.evaluation.judge import label
from fastdiff.evaluation.run import Evaluation
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import Described
from fastdiff.models import SuperResSettings, UNet, build_model
from fastdiff.models.unet import freeze
from fastdiff.runtime.processes import Processes
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import GuidedNetwork
from fastdiff.sampling.labels import Labels
from fastdiff.sampling.pictures import to_uint8
from fastdiff.sampling.settings import DrawSettings
from fastdiff.training.settings import RunSettings, TrainSettings
from fastdiff.training.trainer import Trainer

logger = logging.getLogger(__name__)

SOLVER, STEPS = "dpmpp_2m_sde", 20
AT_ONCE = 64
"""Most images that a process draws at a time. With a micro-batch of at least as many, the number of processes doesn't
change the batches, which an image's last bits depend on."""
_LOWER = (*OF_MOMENTS, "kid")
"""Metrics of which a lower value is better."""


class _Ended(Exception):
    """The run is to stop before all images are drawn. Raised on all ranks together."""


@dataclass
class Candidate:
    """The best average of an evaluation by its first metric: its entry in best.json, and its weights."""

    about: dict[str, Any]
    weights: dict[str, Tensor]

    def beats(self, other: dict[str, Any]) -> bool:
        """Whether it is better than what best.json holds, or that was not measured in the same way.

        The same images count as the same reference wherever they lie.
        """

        def measure(about: dict[str, Any]) -> list[Any]:
            same = [about.get(name) for name in ("metric", "samples", "network", "weights")]
            return [*same, about.get("pixels") or about.get("reference")]

        if measure(self.about) != measure(other):
            return True
        return _better(self.about["metric"], self.about["value"], other["value"])


@dataclass
class Result:
    """The scores of all averages after a step."""

    scores: dict[str, float] = field(default_factory=dict)
    """Column of progress.csv → value."""
    lines: list[str] = field(default_factory=list)
    """The scores for the log and, the first time, remarks on them."""
    best: Candidate | None = None


class AverageEvaluation:
    """Draws images with each average of the weights and scores them. Nothing that training computes depends on it."""

    def __init__(self, config: Config, processes: Processes) -> None:
        """Open the network of the features and the reference. Collective; raises UserError."""
        train = config.train
        self.train, self.processes, self.count = train, processes, train.eval_samples
        self._has_noted = False
        self.diffusion = _fast_process(config)
        settings = EvaluateSettings(
            reference=train.eval_reference,
            metrics=train.eval_metrics,
            features=train.eval_features,
            feature_weights=train.eval_feature_weights,
            resamplings=0,
            kid_subset_size=min(1000, train.eval_samples),
        )
        with _own_flags():
            # The network isn't compiled, nor is the one that draws: each would be compiled anew at every start.
            shape = (*config.model.size_hw, config.model.in_channels)
            self.judging = Evaluation(settings, processes, shape=shape)
            _try_network(self.judging, shape)

    @property
    def columns(self) -> list[str]:
        """The columns of progress.csv that the scores have."""
        return [self._column(metric, str(rate)) for rate in self.train.ema_rate for metric in self.train.eval_metrics]

    def is_due(self, step: int) -> bool:
        """Whether the averages are scored after this step."""
        return step > 0 and (step % self.train.eval_interval == 0 or step == self.train.last_step)

    def score(self, trainer: Trainer, go_on: Callable[[], bool]) -> Result | None:
        """Score every average; the result is complete on rank 0. Collective.

        go_on is collective, and called before each batch of images. Once it returns False there is no result.
        """
        start = time.perf_counter()
        result = Result()
        drawn, notes = 0, []
        for rate, tensors in trainer.ema.items():
            average = trainer.master_weights.gather(tensors)
            try:
                samples = self._draw(trainer, average, go_on)
            except _Ended:
                self._warn(f"the evaluation after step {trainer.step} is put off until the run resumes")
                return None
            drawn += self.count
            if samples is None:
                self._warn(f"samples of ema_rate {rate} after step {trainer.step} are not finite: they have no scores")
            elif self.judging.judge is not None and average is not None:
                verdict = self.judging.judge.score(samples)
                values = {metric: score.value for metric, score in verdict.scores.items()}
                result.scores |= {self._column(metric, rate): value for metric, value in values.items()}
                notes = verdict.notes
                self._choose(result, trainer.step, rate, values[self.train.eval_metrics[0]], average)
        seconds = time.perf_counter() - start
        shown = "  ".join(f"{name} {value:.5g}" for name, value in result.scores.items())
        result.lines = [
            f"evaluation after step {trainer.step}: {shown}  ({self.count} samples each, {seconds:.1f} s, "
            f"{drawn / seconds:.4g} images/s)"
        ]
        if not self._has_noted:
            result.lines += [f"note: {note}" for note in notes]
        self._has_noted = self._has_noted or bool(notes)
        return result

    def _draw(self, trainer: Trainer, average: dict[str, Tensor] | None, go_on: Callable[[], bool]) -> Described | None:
        """What the metrics need of an average's images; None if one is not finite. Collective; raises _Ended."""
        drawing = _Drawing(trainer, self._network(trainer, average), self.diffusion, self.count, go_on)
        samples = collect(
            drawing.batches(),
            self.judging.network,
            Wanted.of_samples(self.train.eval_metrics, resamples=False),
            self.processes,
            count=self.count,
            batch_size=drawing.batch_size,
            what="samples",
            bar=False,
        )
        return samples if self._all(drawing.finite) else None

    def _warn(self, message: str) -> None:
        if self.processes.is_main:
            logger.warning(message)

    def _column(self, metric: str, rate: str) -> str:
        return f"{label(metric, self.judging.network)}_{rate}"

    def _choose(self, result: Result, step: int, rate: str, value: float, average: dict[str, Tensor]) -> None:
        """Make an average the result's best if it is."""
        metric = self.train.eval_metrics[0]
        if not math.isfinite(value) or (result.best and not _better(metric, value, result.best.about["value"])):
            return
        reference, network = self.judging.reference, self.judging.network
        about = {
            "step": step,
            "ema_rate": rate,
            "metric": metric,
            "value": value,
            "samples": self.count,
            "reference": reference.path if reference else "",
            "pixels": reference.digest if reference else "",
            "network": network.name,
            "weights": network.weights,
        }
        result.best = Candidate(about, average)

    def _network(self, trainer: Trainer, average: dict[str, Tensor] | None) -> UNet:
        """The network with an average's weights, which rank 0 has, on every rank."""
        assert isinstance(trainer.model, UNet)
        with torch.random.fork_rng(devices=[]):  # its initial weights are drawn
            model = build_model(trainer.model.settings)
        model.to(trainer.device).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = torch.empty(parameter.shape, device=trainer.device)
                if average is not None:
                    value.copy_(average[name])
                if self.processes.world_size > 1:
                    dist.broadcast(value, src=0)
                parameter.copy_(value)
        model.set_precision(trainer.model.dtype)
        return model if self.train.kernels == "reference" else freeze(model)

    def _all(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks. Collective."""
        if self.processes.world_size == 1:
            return flag
        unset = torch.tensor(int(not flag), device=self.processes.device)
        dist.all_reduce(unset)
        return not unset.item()


class _Drawing:
    """Draws this process's share of the images of one average, always from the same noise."""

    def __init__(
        self, trainer: Trainer, model: UNet, diffusion: GaussianDiffusion, count: int, go_on: Callable[[], bool]
    ) -> None:
        self.processes, self.device, self.count, self.go_on = trainer.processes, trainer.device, count, go_on
        self.seed, self.finite = trainer.train.seed, True
        # A micro-batch has been computed with its gradients, so that memory suffices to draw as many images.
        self.batch_size = min(trainer.plan.micro, AT_ONCE, count)
        class_cond = trainer.model_settings.class_cond
        self.labels = Labels(tuple(range(len(trainer.loader.class_names)))) if class_cond else None
        network = GuidedNetwork(model, solver_table(diffusion, SOLVER), diffusion)
        self.engine = Engine(network, batch_size=self.batch_size, seed_and_key=self.seed | SAMPLES, fixed_shape=True)

    def batches(self) -> Batches:
        """Batches of images, with their numbers. Collective; raises _Ended.

        `finite` says afterwards whether all of them are.
        """
        rank, world_size, size = self.processes.rank, self.processes.world_size, self.batch_size
        for first in range(0, self.count, world_size * size):
            if not self.go_on():
                raise _Ended
            start = first + rank * size
            index = np.arange(start, min(start + size, self.count))
            if len(index):
                yield self._draw(torch.from_numpy(index).to(self.device)), index

    def _draw(self, index: Tensor) -> Tensor:
        """Images number `index` [n] as [n, H, W, C] uint8."""
        given = {} if self.labels is None else {"y": self.labels(index, self.seed)}
        images = to_uint8(self.engine.draw(index, **given))
        self.finite = self.finite and bool(self.engine.finite(len(index)).all())
        return images


def scores_averages(train: RunSettings) -> bool:
    """Whether the averages are scored during the run; a classifier's eval_interval has another meaning."""
    return isinstance(train, TrainSettings) and bool(train.eval_interval)


def check_evaluation(config: Config) -> None:
    """UserError for settings of the evaluation that are wrong whatever the files hold, before any is opened."""
    train = config.train
    if not scores_averages(train):
        return
    if isinstance(config.model, SuperResSettings):
        raise UserError(
            "--eval_interval: a super-resolution model is not scored while it trains, because what it draws depends on "
            "the small images; leave it out, and compare images of super_res_sample.py by evaluate.py"
        )
    if {"is", "kid"} & set(train.eval_metrics):
        with blaming("--eval_metrics"):
            torch_fidelity_module("metric_kid")  # is imported after the first interval otherwise
    if train.eval_reference and not Path(train.eval_reference).exists():
        raise UserError(f"--eval_reference: {train.eval_reference} does not exist; give images, or statistics (.npz)")


def _fast_process(config: Config) -> GaussianDiffusion:
    """The process with the steps that the solver takes: all steps of a respaced chain, or of so short a one."""
    settings, kept = config.diffusion, None
    sigma_max = DrawSettings.model_fields["sigma_max"].default
    with suppress(ValueError):
        kept = keep_steps(settings, STEPS, SOLVERS[SOLVER].spacing, sigma_max)
    return create_diffusion(settings, config.model.learn_sigma, kept)


def _better(metric: str, value: float, other: float) -> bool:
    return value < other if metric in _LOWER else value > other


def _try_network(judging: Evaluation, shape: tuple[int, int, int]) -> None:
    """Raise UserError if the network doesn't take images of this shape (H, W, C)."""
    wanted = Wanted.of_samples(judging.settings.metrics, resamples=False)
    black = torch.zeros(1, *shape, dtype=torch.uint8, device=judging.processes.device)
    try:
        judging.network(black, wanted.outputs)
    except UserError as error:
        raise UserError(f"--eval_features: {error}") from None


@contextmanager
def _own_flags() -> Iterator[None]:
    """Turn the flags of evaluate.py in a UserError into those of training, where it has such ones."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"--kid_subset_size (\d+)", r"\1 images, at most --eval_samples", str(error))
        text = re.sub(r"--(reference|metrics|features|feature_weights)(?!\w)", r"--eval_\1", text)
        raise UserError(re.sub(r"--(resize|reference_out)", r"evaluate.py --\1", text)) from error
