"""Opens the classifier that guides sampling, and checks that it fits the network that draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.config.checkpoint import Network, open_checkpoint
from fastdiff.config.classifier import classifier_settings_of, open_classifier
from fastdiff.config.presets import download, find_preset, is_preset
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, quoted
from fastdiff.models.classifier import Classifier
from fastdiff.models.classifier_settings import ClassifierNetSettings, ClassifierSettings
from fastdiff.sampling.settings import SampleSettings
from fastdiff.settings import validated


@dataclass(frozen=True)
class OpenClassifier:
    """A classifier on its device, and the metadata of its checkpoint."""

    model: Classifier
    file: Path
    digest: str
    """The hash of the file's bytes."""
    class_names: list[str]
    trained_with: dict[str, Any]
    """The stored settings of the diffusion process that noised its images; empty where there are none."""
    precision: str
    scale: float
    """Weight of its gradient."""

    @property
    def settings(self) -> ClassifierSettings:
        return self.model.settings

    @property
    def known_classes(self) -> int:
        """The number of classes in its training data."""
        return len(self.class_names) or self.settings.num_classes


def open_guiding(
    settings: SampleSettings, given: ClassifierNetSettings, network: Network, device: torch.device
) -> OpenClassifier | None:
    """Open the classifier that `settings` names, to guide `network`; None if they name none.

    given  The classifier's own settings; those that were set must be the file's.
    Raises UserError if the classifier doesn't fit the network.
    """
    if given.model_fields_set and not settings.classifier_path:
        raise UserError(f"{min(given.model_fields_set)} is for the classifier of classifier_path, which is not given")
    if not settings.guiding_classifier:
        return None
    path = settings.guiding_classifier
    if is_preset(path) and not Path(path).exists():
        path = str(download(find_preset(path), flag="--classifier_path"))
    checkpoint = open_checkpoint(path)
    if checkpoint.info.get("noised") is False:
        raise UserError(f"{checkpoint.file} was trained on images without noise (--noised False), so it can't guide")
    size_hw = network.settings.size_hw
    _, layer = classifier_settings_of(checkpoint, {"model": {"image_size": size_hw}})
    chosen = given.model_dump(mode="json", include=given.model_fields_set)
    precision = settings.precision if settings.classifier_precision == "auto" else settings.classifier_precision
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--classifier_precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    model = open_classifier(
        checkpoint,
        validated(ClassifierSettings, {**layer["model"], **chosen}),
        precision,
        device,
        frozen=settings.kernels != "reference",
    )
    opened = OpenClassifier(
        model.requires_grad_(False),
        checkpoint.file,
        checkpoint.digest,
        checkpoint.class_names,
        layer.get("diffusion", {}),
        precision,
        settings.classifier_scale,
    )
    _check_fit(network, opened)
    return opened


def _check_fit(network: Network, classifier: OpenClassifier) -> None:
    """UserError unless the classifier knows the network's images, their noise and their classes."""
    drawn, known, who = network.settings, classifier.settings, classifier.file
    if known.size_hw != drawn.size_hw:
        sizes = ["x".join(map(str, size)) for size in (known.size_hw, drawn.size_hw)]
        raise UserError(f"{who} knows images of {sizes[0]} pixels, the model draws {sizes[1]}")
    if known.in_channels != drawn.in_channels:
        raise UserError(f"{who} knows images of {known.in_channels} channels, the model draws {drawn.in_channels}")
    for name, value in _noise(network.diffusion).items():
        if classifier.trained_with.get(name, value) != value:
            raise UserError(
                f"{who} was trained with {name} {classifier.trained_with[name]}, the model with {value}; a classifier "
                "must know the noise of the model's images"
            )
    if not drawn.class_cond:
        return
    if network.class_names and classifier.class_names and network.class_names != classifier.class_names:
        raise UserError(
            f"{who} knows other classes than the model: {quoted(classifier.class_names)}, not "
            f"{quoted(network.class_names)}; a classifier needs the same classes in the same order"
        )
    if classifier.known_classes != network.known_classes:
        raise UserError(f"{who} knows {classifier.known_classes} classes, the model {network.known_classes}")


def _noise(settings: DiffusionSettings) -> dict[str, Any]:
    """The settings that say how much noise there is at a timestep."""
    return settings.model_dump(mode="json", include={"diffusion_steps", "noise_schedule"})
