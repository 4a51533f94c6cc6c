"""Draws grids of samples during training, always from the same noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from fastdiff import ops
from fastdiff.config.sections import Config
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.solvers import solver_table
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, SuperResSettings, build_model
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import GuidedNetwork
from fastdiff.sampling.pictures import grid, save_grid, to_uint8
from fastdiff.settings import what_is_wrong
from fastdiff.training.trainer import Trainer, low_res_of

logger = logging.getLogger(__name__)


def preview_diffusion(config: Config) -> GaussianDiffusion | None:
    """The process that draws the grids; None without sample_interval. UserError for an invalid sample_respacing."""
    if not config.train.sample_interval:
        return None
    try:
        settings = type(config.diffusion).model_validate(
            {**config.diffusion.model_dump(), "timestep_respacing": config.train.sample_respacing}
        )
    except ValidationError as error:
        raise UserError(f"--sample_respacing: {what_is_wrong(error).replace('timestep_respacing ', '')}") from None
    return create_diffusion(settings, config.model.learn_sigma)


def draw_preview(
    trainer: Trainer, diffusion: GaussianDiffusion, file: Path, go_on: Callable[[], bool] = lambda: True
) -> np.ndarray | None:
    """A grid [H, W, C] uint8 of samples from the first average, saved as `file`; None except on rank 0. Collective.

    go_on is called on rank 0 before each of the sampler's steps. Once it returns False there is no grid.
    """
    average = trainer.master_weights.gather(trainer.ema[str(trainer.train.ema_rate[0])])
    if not trainer.processes.is_main or average is None or not go_on():
        return None
    samples = _draw(trainer, diffusion, average, go_on)
    if samples is None:
        return None
    if not samples.isfinite().all():
        logger.warning("the samples after step %d are not finite: no grid of them is written", trainer.step)
        return None
    images = to_uint8(samples).cpu().numpy()
    file.parent.mkdir(exist_ok=True)
    save_grid(file, images)
    return np.array(grid(images).convert("RGB"))


def _draw(
    trainer: Trainer, diffusion: GaussianDiffusion, average: dict[str, Tensor], go_on: Callable[[], bool]
) -> Tensor | None:
    """Samples [n, C, H, W] float32 of the network with the averaged weights; None once go_on returns False."""
    settings, train, device = trainer.model_settings, trainer.train, trainer.device
    assert isinstance(settings, BackboneSettings)
    model = build_model(settings)
    model.load_state_dict(average)
    model.to(device).eval().set_precision(trainer.model.dtype)
    index = torch.arange(train.sample_count, device=device)
    kwargs: dict[str, Tensor] = {}
    batch = next(trainer.loader.once()) if isinstance(settings, SuperResSettings) else None
    if batch is not None and isinstance(settings, SuperResSettings):
        x = ops.start_map(batch.images[: train.sample_count])
        kwargs["low_res"] = low_res_of(x, settings.small_size)
        index = index[: len(x)]
    if settings.class_cond:
        classes = torch.tensor(range(len(trainer.loader.class_names)), device=device)
        kwargs["y"] = classes[index % len(classes)] if batch is None else batch.labels[: len(index)]
    table = solver_table(diffusion, "ddim" if train.sample_respacing.startswith("ddim") else "ddpm")
    network = GuidedNetwork(model, table, diffusion)
    engine = Engine(network, batch_size=len(index), seed_and_key=train.seed | SAMPLES)
    samples = None
    for step in engine.steps(index, **kwargs):
        samples = step.sample
        if not go_on():
            return None
    return samples
