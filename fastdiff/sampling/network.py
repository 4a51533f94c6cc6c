"""Opens the network of a checkpoint for sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.config.checkpoint import Checkpoint
from fastdiff.diffusion import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, UNet, build_model, weights
from fastdiff.models.unet import body_dtype, freeze


@dataclass(frozen=True)
class Network:
    """A network on its device, and the metadata of its checkpoint."""

    model: UNet
    diffusion: DiffusionSettings
    file: Path
    digest: str
    """The hash of the file's bytes."""
    class_names: list[str]

    @property
    def settings(self) -> BackboneSettings:
        return self.model.settings

    @property
    def known_classes(self) -> int:
        """The number of classes in the training data; the network may have room for more."""
        return len(self.class_names) or self.settings.num_classes


def open_network(
    settings: BackboneSettings,
    diffusion: DiffusionSettings,
    checkpoint: Checkpoint,
    precision: str,
    device: torch.device,
    frozen: bool = True,
) -> Network:
    """Build the network that the settings describe, with a checkpoint's weights. Raises UserError if they don't fit.

    frozen=False skips `freeze`, which the kernels "reference" don't support.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    weights.check_fits(settings, checkpoint.state, checkpoint.file)
    model = build_model(settings)
    weights.load_into(model, checkpoint.state, checkpoint.file)
    model.to(device).eval().set_precision(body_dtype(precision, device))
    if frozen:
        freeze(model)
    return Network(model, diffusion, checkpoint.file, checkpoint.digest, checkpoint.class_names)
