"""The Triton kernels that drawing launches, found on tensors without memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.solvers import Plan
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, build_model
from fastdiff.models.freeze import freeze
from fastdiff.precompile import META, Launch, launches_of
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import Evaluation, Guidance


def sampling_launches(
    settings: BackboneSettings,
    diffusion: GaussianDiffusion,
    plan: Plan,
    batch: int,
    precision: torch.dtype,
    *,
    guidance: Guidance | None = None,
    clip: bool = True,
) -> list[Launch]:
    """Launches of drawing `batch` images at once by `Engine`, with a body in `precision`."""

    def network(settings: BackboneSettings) -> UNet:
        with META:
            return freeze(build_model(settings).set_precision(precision))

    def work() -> None:
        chosen = guidance or Guidance()
        guide = None if chosen.guide is None else network(chosen.guide.settings)
        evaluation = Evaluation(network(settings), plan, diffusion, replace(chosen, guide=guide), META)
        engine = Engine(evaluation, plan, diffusion, META, batch_size=batch, seed_stream=SAMPLES, clip=clip)
        index = torch.empty(batch, dtype=torch.int64, device=META)
        small = None
        if isinstance(settings, SuperResSettings):
            small = torch.empty(batch, settings.in_channels, *settings.small_size, device=META)
        state = engine._begin(index, index if settings.class_cond else None, small)
        kinds = zip(evaluation.guided, engine._noisy, strict=True)
        for row in {kind: row for row, kind in enumerate(kinds)}.values():
            engine._advance(state, row)

    return launches_of(work)
