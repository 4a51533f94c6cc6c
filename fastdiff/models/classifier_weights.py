"""Recognises the state_dict of a classifier, and infers the classifier's settings from its keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.classifier import build_classifier
from fastdiff.models.classifier_settings import ClassifierSettings, Pool
from fastdiff.models.settings import UNetSettings

_ANY = 32  # A multiple of it stands for an image size that the weights neither show nor depend on.
_DEFAULT_DEPTH = ClassifierSettings.model_fields["classifier_depth"].default
LAST_LAYER: dict[Pool, str] = {
    "attention": "out.2.c_proj.weight",
    "adaptive": "out.3.weight",
    "spatial": "out.2.weight",
    "spatial_v2": "out.3.weight",
}
"""How maps become logits → the parameter with a row per class."""


def is_classifier(keys: Iterable[str]) -> bool:
    """Whether a network with these keys, of which some are `input_blocks`, is a classifier: it has no output blocks."""
    names = {key.split(".")[0] for key in keys}
    return "out" in names and "output_blocks" not in names


def infer_classifier_settings(state: Mapping[str, Tensor], image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Infer the settings of a classifier, as in JSON, from keys and shapes.

    image_size  Height and width of the images, where the weights don't show them. Attention that pools maps shows the
                number of pixels, taken as a square's otherwise, and levels that one size has by default show that size.
    Raises UserError if no classifier has these keys and shapes.
    """
    if not is_classifier(state):
        raise UserError("it has output blocks, so it is not of a classifier")
    shapes = {name: value.shape for name, value in state.items()}
    try:
        fitting = [settings for settings in _candidates(state, image_size) if _shapes(settings) == shapes]
    except KeyError as error:
        raise UserError(f"it has no {error.args[0]}, so it is not of a classifier") from None
    except (IndexError, RuntimeError, ValueError, OverflowError, ZeroDivisionError):
        raise UserError("its tensors have other axes than a classifier's") from None
    if not fitting:
        raise UserError("no classifier of guided-diffusion's kind has its tensors")
    if not any(_image_size(state, settings.backbone.level_mult, image_size) for settings in fitting):
        raise UserError("its image size does not show in its weights; give --image_size")
    # Where blocks that halve maps have the keys of other blocks, several depths may fit, if nothing else changes.
    likeliest = min(fitting, key=lambda s: (bool(s.classifier_channel_mult), s.classifier_depth != _DEFAULT_DEPTH))
    return likeliest.model_dump(mode="json", exclude={"use_checkpoint"})


def _candidates(state: Mapping[str, Tensor], image_size: tuple[int, int] | None) -> Iterator[ClassifierSettings]:
    """Settings for every depth with which the input blocks make whole levels."""
    width = state["time_embed.0.weight"].shape[1]
    blocks = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")}) - 1
    halving = [index for index in range(1, blocks + 1) if f"input_blocks.{index}.0.op.weight" in state]
    depths = (
        [halving[0] - 1] if halving else [depth for depth in range(1, blocks + 1) if not (blocks + 1) % (depth + 1)]
    )
    pool = _pool(state)
    embedded, normed = (state[f"input_blocks.1.0.{name}.weight"].shape[0] for name in ("emb_layers.1", "out_layers.0"))
    for depth in depths:
        firsts = range(1, blocks + 1, depth + 1)  # the first block of each level
        mult = tuple(state[f"input_blocks.{index}.0.out_layers.0.weight"].shape[0] / width for index in firsts)
        any_size = (_ANY << len(mult), _ANY << len(mult))
        size = _image_size(state, mult, image_size) or any_size
        attending = [level for level, index in enumerate(firsts) if f"input_blocks.{index}.1.qkv.weight" in state]
        try:
            yield ClassifierSettings(
                classifier_width=width,
                classifier_depth=depth,
                classifier_channel_mult=() if mult == UNetSettings.default_mult.get(max(size)) else mult,
                classifier_attention_resolutions=tuple(min(size) >> level for level in attending),
                classifier_use_scale_shift_norm=embedded == 2 * normed,
                classifier_resblock_updown=not halving,
                classifier_pool=pool,
                image_size=size,
                num_classes=state[LAST_LAYER[pool]].shape[0],
                in_channels=state["input_blocks.0.0.weight"].shape[1],
            )
        except ValidationError:
            continue  # with this depth the levels are those of no classifier


def _pool(state: Mapping[str, Tensor]) -> Pool:
    if "out.2.positional_embedding" in state:
        return "attention"
    if "out.3.weight" not in state:
        return "spatial"
    return "adaptive" if state["out.3.weight"].dim() == 4 else "spatial_v2"


def _image_size(
    state: Mapping[str, Tensor], mult: tuple[float, ...], given: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Height and width of the images: those given unless the weights show others, None if neither says them."""
    if "out.2.positional_embedding" in state:
        pixels, halvings = state["out.2.positional_embedding"].shape[1] - 1, len(mult) - 1
        if given and math.prod(side >> halvings for side in given) == pixels:
            return given
        side = math.isqrt(pixels) << halvings
        return (side, side) if math.isqrt(pixels) ** 2 == pixels else None
    if given:
        return given
    sizes = [size for size, standard in UNetSettings.default_mult.items() if standard == mult]
    return (sizes[0], sizes[0]) if sizes else None


def _shapes(settings: ClassifierSettings) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in build_classifier(settings).state_dict().items()}
