"""The settings and the network of a classifier's checkpoint."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from fastdiff.config.checkpoint import Checkpoint, Layer, check_agrees, load_network
from fastdiff.config.presets import Preset, preset_for_file
from fastdiff.errors import UserError
from fastdiff.models.classifier import Classifier
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.models.classifier_weights import infer_classifier_settings
from fastdiff.settings import Size


def classifier_settings_of(
    checkpoint: Checkpoint, given: Layer | None = None, preset: Preset | None = None
) -> tuple[str, Layer]:
    """A description of the source of a classifier's settings, and its sections: model, and diffusion if it is known.

    given holds the settings of the command line and the JSON file, of which image_size helps where the weights don't
    show it. Raises UserError if the file holds another network, or contradicts the preset.
    """
    file = checkpoint.file
    if checkpoint.kind != "classifier":
        what = "a super-resolution model" if checkpoint.super_res else "a diffusion model"
        raise UserError(f"{file} is {what}, not a classifier, which classifier_train.py makes")
    if info := checkpoint.info:
        if preset:
            check_agrees(info, preset, file, "--preset")
        return f"the settings in {file}", {"model": info["model"], "diffusion": info["diffusion"]}
    named = preset or preset_for_file(file)
    if named and named.kind == "classifier":
        return f"preset {named.name}", named.layer
    size = None
    with suppress(ValidationError):  # which is raised again, with its source, where all layers are validated
        size = TypeAdapter(Size | None).validate_python((given or {}).get("model", {}).get("image_size"))
    try:
        model: dict[str, Any] = infer_classifier_settings(checkpoint.state, size)
    except UserError as error:
        raise UserError(f"{file} can't be used: {error}") from None
    return f"the settings in {file}", {"model": model}


def open_classifier(
    checkpoint: Checkpoint, settings: ClassifierSettings, precision: str, device: torch.device, frozen: bool = True
) -> Classifier:
    """Build the classifier that the settings describe, with a checkpoint's weights; as `open_network`.

    Its gradient by the images can be computed, whether it is frozen or not; frozen weights have none.
    """
    model = load_network(settings, checkpoint, precision, device, frozen)
    assert isinstance(model, Classifier)
    return model
