"""Evaluates a network at the rows of a solver's table, with or without guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.process import ModelMeanType
from fastdiff.diffusion.solvers import SolverTable
from fastdiff.models import UNet
from fastdiff.models.unet import enlarged
from fastdiff.runtime.machine import compile_kwargs
from fastdiff.sampling.classifier_gradient import ClassifierGradient, ClassifierGuidance


@dataclass(frozen=True)
class Guidance:
    """output = weaker + weight (output - weaker) at noise levels in `interval`.

    The weaker output is that of the null class (classifier-free guidance, Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598), or of a weaker network with the same class (autoguidance, Karras et al. 2024,
    https://arxiv.org/abs/2406.02507). interval is (low, high] in sigma / alpha (Kynkäänniemi et al. 2024,
    https://arxiv.org/abs/2404.07724).
    """

    weight: float = 1.0
    interval: tuple[float, float] = (0.0, float("inf"))
    guide: UNet | None = None
    classifier: ClassifierGuidance | None = None
    """Guides in every row, whatever the interval."""

    def rows(self, table: SolverTable, diffusion: GaussianDiffusion) -> list[bool]:
        """Whether each row of a solver table is guided."""
        if self.weight == 1:
            return [False] * table.num_evaluations
        schedule, (low, high) = diffusion.schedule, self.interval
        sigma = (schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod)[table.steps]
        return [bool(low < each <= high) for each in sigma]


class _Network:
    """A network whose time conditioning is precomputed for every row of the solver table.

    Without classes, `embeddings` [E, width] holds the projected embeddings of all residual blocks. With classes it
    holds the time embeddings [E, 4 * num_channels]: the class embedding is added before the projection.
    """

    def __init__(self, model: UNet, table: SolverTable, diffusion: GaussianDiffusion) -> None:
        self.model = model
        self.body: Any = model.body
        self.class_cond = model.settings.class_cond
        steps = torch.from_numpy(table.steps).to(next(model.parameters()).device)
        emb = model.embed_time(diffusion.model_timesteps(steps))
        self.embeddings = emb if self.class_cond else torch.cat(model.project(emb), dim=1)
        self.widths = [block.emb_width for block in model.res_blocks]

    def labels(self, y: Tensor) -> Tensor:
        """The class embedding, [B, 4 * num_channels] float32."""
        return self.model.label_emb(y).float()

    def __call__(self, x: Tensor, row: Tensor, classes: Tensor | None, low_res: Tensor | None) -> Tensor:
        at = self.embeddings.index_select(0, row)
        if classes is not None:
            projected = self.model.project(at + classes)
        else:
            projected = list(at.expand(len(x), -1).split(self.widths, dim=1))
        return self.body(x, projected, low_res)


class GuidedNetwork:
    """Computes a network's outputs at the rows of a solver table, and applies guidance to those that it covers.

    `gradient` computes that of a classifier, if one guides.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: UNet,
        table: SolverTable,
        diffusion: GaussianDiffusion,
        guidance: Guidance | None = None,
        compiled: bool = False,
    ) -> None:
        """The network must be in eval mode; `models.unet.freeze` makes it faster.

        compiled: compile the bodies of the network and of the guide, and the classifier, with torch.compile.
        """
        guidance = guidance or Guidance()
        self.settings, self.table = model.settings, table
        self.device = next(model.parameters()).device
        self.input_format = model.input_format
        self.epsilon = diffusion.mean_type is ModelMeanType.EPSILON
        self.network = _Network(model, table, diffusion)
        self.guide = None if guidance.guide is None else _Network(guidance.guide, table, diffusion)
        self.guided = guidance.rows(table, diffusion)
        self.classifier = None
        if guidance.classifier is not None:
            self.classifier = ClassifierGradient(guidance.classifier, table, diffusion, compiled)
        if compiled:
            kwargs = compile_kwargs(self.device, frozen=True)
            for network in filter(None, (self.network, self.guide)):
                network.body = torch.compile(network.body, **kwargs)
        C = self.settings.in_channels
        weights = torch.ones(self.settings.out_channels)
        weights[:C] = guidance.weight  # guidance leaves the predicted variances unchanged
        self._weights = weights[:, None, None].to(self.device)

    def conditioning(self, y: Tensor | None = None, low_res: Tensor | None = None) -> dict[str, Tensor]:
        """The inputs that are the same in all calls for a batch, from classes [B] and small images [B, C, h, w]."""
        given: dict[str, Tensor] = {}
        if y is not None and self.classifier is not None:
            given["labels"] = y
        if y is not None and self.settings.class_cond:
            given["classes"] = self.network.labels(y)
            if self.guide is not None:
                given["guide_classes"] = self.guide.labels(y)
            elif any(self.guided):
                given["null_classes"] = self.network.labels(torch.full_like(y, self.settings.num_classes))
        if low_res is not None:
            given["low_res"] = enlarged(low_res, self.settings.size_hw)
        return given

    def __call__(self, x: Tensor, row: Tensor, given: dict[str, Tensor], guided: bool) -> Tensor:
        """The output [B, C or 2C, H, W] for x [B, C, H, W], or padded as `input_format` says; row [1] int64."""
        classes, low_res = given.get("classes"), given.get("low_res")
        if not guided:
            return self.network(x, row, classes, low_res)
        if self.guide is not None:
            strong = self.network(x, row, classes, low_res)
            weak = self.guide(x, row, given.get("guide_classes"), low_res)
        else:
            assert classes is not None
            both = torch.cat([classes, given["null_classes"]])
            low_res = low_res if low_res is None else torch.cat([low_res, low_res])
            strong, weak = self.network(torch.cat([x, x]), row, both, low_res).chunk(2)
        return weak + self._weights * (strong - weak)

    def gradient(self, x: Tensor, row: Tensor, given: dict[str, Tensor]) -> Tensor | None:
        """The classifier's gradient [B, C, H, W] float32 at x [B, C, H, W] float32; None without a classifier."""
        return None if self.classifier is None else self.classifier(x, row, given["labels"])
