"""The gradient of a classifier's log probability, by which it guides the sampling of another network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.solvers import SolverTable
from fastdiff.models.classifier import Classifier
from fastdiff.runtime.machine import compile_kwargs


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noised images (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233).

    classifier  In eval mode; its parameters need no gradient.
    scale       Factor of the gradient.
    rescale_timesteps  Whether the classifier sees timesteps scaled to 0..1000; None: as the network that it guides.
    """

    classifier: Classifier
    scale: float = 1.0
    rescale_timesteps: bool | None = None


class ClassifierGradient:
    """Computes scale * gradient of log p(y | x_t) by x_t at the rows of a solver table."""

    def __init__(
        self, guidance: ClassifierGuidance, table: SolverTable, diffusion: GaussianDiffusion, compiled: bool = False
    ) -> None:
        self.scale = guidance.scale
        self.classifier: Any = guidance.classifier
        device = next(guidance.classifier.parameters()).device
        if guidance.rescale_timesteps is not None:
            diffusion = replace(diffusion, rescale_timesteps=guidance.rescale_timesteps)
        self._timesteps = diffusion.model_timesteps(torch.from_numpy(table.steps).to(device))
        if compiled:
            self.classifier = torch.compile(self.classifier, **compile_kwargs(device))

    def __call__(self, x: Tensor, row: Tensor, y: Tensor) -> Tensor:
        """The gradient [B, C, H, W] float32 for x [B, C, H, W] float32, labels y [B] int64 and row [1] int64."""
        timesteps = self._timesteps.index_select(0, row).expand(len(x))
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_probabilities = F.log_softmax(self.classifier(leaf, timesteps).float(), dim=-1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
        return self.scale * gradient
