"""What a network is trained to do: a process of noising, and the loss of the network's output.

A diffusion process is an objective itself; `Classification` is that of a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.diffusion.process import Model
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings


@dataclass
class Classification:
    """Tells apart the classes of noised images, or of the images themselves, then at timestep 0."""

    diffusion: GaussianDiffusion
    noised: bool = True
    loss_terms: ClassVar[tuple[str, ...]] = ("loss", "acc@1", "acc@5")
    """The terms that `training_losses` may return."""

    def __post_init__(self) -> None:
        self.diffusion = replace(self.diffusion)  # a copy with tables of its own

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps to draw from."""
        return self.diffusion.num_timesteps if self.noised else 1

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any],
        noise: ops.Noise,
    ) -> dict[str, Tensor]:
        """Cross-entropy and accuracies of every image: {"loss": [B], "acc@1": [B], "acc@5": [B]}, float32.

        x_start is uint8 [B, H, W, C], model_kwargs holds the labels "y" [B] int64. acc@k is 1 if the class is among the
        k with the largest logits; acc@5 is left out where there are no more than 5 classes. Only "loss" has a gradient.
        """
        labels = model_kwargs["y"]
        x = self.diffusion.noised_for(model, x_start, t, noise) if self.noised else ops.start_map(x_start)
        logits = model(x, self.diffusion.model_timesteps(t))
        loss = F.cross_entropy(logits, labels, reduction="none")
        scores = logits.detach()
        rank = (scores >= scores.gather(1, labels[:, None])).sum(1)  # from 1; of equal logits, the class's is the last
        unknown = 0 * loss.detach()  # NaN where the loss is not finite
        among = {f"acc@{k}": (rank <= k).float() + unknown for k in (1, 5) if k == 1 or logits.shape[1] > k}
        return {"loss": loss, **among}


Objective: TypeAlias = GaussianDiffusion | Classification


def create_objective(settings: NetworkSettings, diffusion: DiffusionSettings, noised: bool = True) -> Objective:
    """The objective of a network with these settings. noised is for classifiers (see `Classification`)."""
    if isinstance(settings, ClassifierSettings):
        return Classification(create_diffusion(diffusion, learn_sigma=False), noised)
    return create_diffusion(diffusion, settings.learn_sigma)
