"""Reads checkpoint files: the state_dict, the settings stored in it, and settings inferred from keys and shapes.

A file holds a `state_dict` with improved-diffusion's parameter names, written by torch.save or safetensors. fastdiff
also stores the settings of the training run in the state_dict's metadata, which other programs ignore.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError, quoted
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings
from fastdiff.models.classifier_weights import infer_classifier_settings, is_classifier
from fastdiff.models.foreign import check_name, describe_folder, network_weights
from fastdiff.models.settings import BackboneSettings, SuperResSettings
from fastdiff.models.unet import UNet
from fastdiff.runtime.untrusted import METADATA, is_there, read

KINDS = ("unet", "super_res", "classifier")
"""Kinds of networks in the stored settings."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_state_dict(path: Path) -> OrderedDict[str, Tensor]:
    """Read the state_dict in a file. Raises UserError for other content and for invalid stored settings.

    The weights may be wrapped as other programs do (`foreign`).
    """
    check_name(path)
    state = network_weights(read(path), path)
    check_info(state, path)
    return state


def check_info(state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError for invalid stored settings."""
    if problem := _find_problem(_stored_text(state)):
        raise UserError(f"the settings in {path} are damaged ({problem}); give another checkpoint")


def with_info(state: dict[str, Tensor], info: dict[str, Any]) -> OrderedDict[str, Tensor]:
    """Return the state_dict with `info` (settings and the like, as JSON) in its metadata."""
    carrier = OrderedDict(state)
    if info:
        carrier._metadata = metadata_of(info)  # type: ignore[attr-defined]
    return carrier


def metadata_of(info: dict[str, Any]) -> dict[str, str]:
    """The metadata of a state_dict, or of a safetensors file, in which `info` is stored."""
    return {METADATA: json.dumps(info)}


def info_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The `info` that `with_info` stored; empty for a file of another program."""
    text = _stored_text(state)
    return {} if text is None else json.loads(text)


def _stored_text(state: dict[str, Tensor]) -> Any:
    metadata = getattr(state, "_metadata", None)
    return metadata.get(METADATA) if isinstance(metadata, dict) else None


def _find_problem(text: Any) -> str:
    """What is wrong with the stored settings; empty if they are valid or absent."""
    if text is None:
        return ""
    try:
        info = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return "they are not JSON"
    if not isinstance(info, dict):
        return "they are not a JSON object"
    if info.get("kind") not in KINDS:
        return f"kind is {quoted(info.get('kind'))}, not {' or '.join(KINDS)}"
    for section in ("model", "diffusion"):
        if not isinstance(info.get(section), dict):
            return f"{section} is {quoted(info.get(section))}, not an object"
    if not isinstance(info.get("provenance", {}), dict):
        return f"provenance is {quoted(info['provenance'])}, not an object"
    names = info.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"class_names is {quoted(names)}, not a list of names"
    return ""


def infer_settings(state: dict[str, Tensor], super_res: bool = False, null_class: bool = False) -> dict[str, Any]:
    """Infer model settings from keys and shapes, which don't show heads, image size and the diffusion process.

    null_class says whether the last row of the label embedding is the null class, which they don't show either. Raises
    UserError if the keys are not those of this network.
    """
    try:
        return _infer(state, super_res, null_class)
    except KeyError as error:
        raise UserError(f"it has no {error.args[0]}, so it is not of this network") from None
    except (IndexError, ZeroDivisionError):
        raise UserError("its tensors have other axes than this network's") from None


def _infer(state: dict[str, Tensor], super_res: bool, null_class: bool) -> dict[str, Any]:
    first, embedding = (state[f"{name}.weight"].shape for name in ("input_blocks.0.0", "time_embed.0"))
    emb, width = embedding[0], embedding[1]
    in_channels = first[1] // (2 if super_res else 1)
    upsampling = [index for index in range(len(state)) if _upsamples_in_block(state, index)]
    resblock_updown = bool(upsampling)
    blocks_per_level = upsampling[0] if resblock_updown else 0
    level_mult: list[float] = []
    attention: list[int] = []
    index, factor, blocks = 1, 1, 0
    while True:
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in state or (
            # A residual block that halves maps has the same keys as another one: the number of blocks tells them apart.
            resblock_updown and blocks == blocks_per_level and f"{block}.0.in_layers.0.weight" in state
        ):  # downsampling, after the blocks of a level
            blocks, factor = 0, factor * 2
        elif f"{block}.0.in_layers.0.weight" in state:
            multiple = state[f"{block}.0.out_layers.0.weight"].shape[0] / width
            if blocks == 0:
                level_mult.append(multiple)
                attention += [factor] if f"{block}.1.qkv.weight" in state else []
            blocks += 1
        else:
            break
        index += 1
    emb_layers, out_layers = (state[f"input_blocks.1.0.{name}.weight"] for name in ("emb_layers.1", "out_layers.0"))
    inferred: dict[str, Any] = {
        "num_channels": width,
        "num_res_blocks": blocks,
        "channel_mult": [int(m) if m == int(m) else m for m in level_mult],
        "learn_sigma": state["out.2.weight"].shape[0] == 2 * in_channels,
        "in_channels": in_channels,
        "resblock_updown": resblock_updown,
        "scale_stem": bool(level_mult) and level_mult[0] != 1 and first[0] == level_mult[0] * width,
        "use_scale_shift_norm": emb_layers.shape[0] // out_layers.shape[0] == 2,
        "class_cond": "label_emb.weight" in state,
        "attention_factors": attention,
    }
    if inferred["class_cond"]:
        inferred["num_classes"] = state["label_emb.weight"].shape[0] - null_class
    if emb != 4 * width:
        raise UserError(f"its time embedding has {emb} channels, this network's would have {4 * width}")
    return inferred


def _upsamples_in_block(state: dict[str, Tensor], index: int) -> bool:
    """Whether an output block ends with a residual block that doubles maps, which is its second or third layer."""
    return any(f"output_blocks.{index}.{layer}.in_layers.0.weight" in state for layer in (1, 2))


def script_mismatch(state: dict[str, Tensor], super_res: bool) -> str:
    """An error message if the file has a super-resolution model and another is wanted, or the reverse; else empty.

    The first convolution of a super-resolution model takes two images of 1, 3 or 4 channels, that of others one.
    """
    first = state.get("input_blocks.0.0.weight")
    if first is None or first.ndim != 4 or first.shape[1] not in (1, 2, 3, 4, 6, 8):
        return ""
    if super_res == (first.shape[1] in (2, 6, 8)):
        return ""
    return "it is no super-resolution model" if super_res else "it is a super-resolution model"


def check_fits(settings: NetworkSettings, state: dict[str, Tensor], path: Path) -> None:
    """Raise the UserError that `load_into` would raise for a network of these settings, without allocating one.

    Settings stored in a file could describe a network larger than the memory of any machine.
    """
    backbone = settings.backbone
    if backbone.num_res_blocks * len(backbone.level_mult) > len(state):
        raise UserError(
            f"{path} does not fit the model: it has {len(state)} tensors, which is too few for "
            f"{backbone.num_res_blocks} residual blocks per level"
        )
    try:
        with torch.device("meta"):
            model = build_network(settings)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no network of its settings can be built ({error})") from None
    _compare(model, state, path)


def load_into(model: UNet | Classifier, state: dict[str, Tensor], path: Path) -> None:
    """Load a state_dict. Raises UserError, with the settings that would fit, if keys or shapes differ.

    Weights that are not finite floating-point numbers are rejected, too.
    """
    _compare(model, state, path)
    check_values(state, path)
    model.load_state_dict(state)


def check_values(state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError for weights that are not floating-point numbers, or not finite in float32."""
    for name, value in state.items():
        if value.dtype not in _DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UserError(f"{name} in {path} is {value.dtype}, weights are of {kinds}")
        if not value.float().isfinite().all():
            raise UserError(
                f"{name} in {path} is not finite (NaN or infinity): that run had diverged; give an earlier checkpoint"
            )


def _compare(model: UNet | Classifier, state: dict[str, Tensor], path: Path) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if own != given:
        raise UserError(f"{path} does not fit the model: {_describe_difference(model.settings, state, own, given)}")


def _describe_difference(settings: NetworkSettings, state: dict[str, Tensor], own: dict, given: dict) -> str:
    """The flags for a model that fits the file, or else the first tensor that differs."""
    try:
        hints = (
            _classifier_hints(settings, state) if isinstance(settings, ClassifierSettings) else _hints(settings, state)
        )
    except UserError as error:
        return str(error)
    if hints:
        return f"it was trained with {' '.join(hints)}"
    name = min(own.items() ^ given.items())[0]
    return f"{name} is {given.get(name, 'missing')} in the file, {own.get(name, 'absent')} in the model"


def _classifier_hints(settings: ClassifierSettings, state: dict[str, Tensor]) -> list[str]:
    """The flags that would make a classifier of these settings one that fits the file."""
    now = settings.model_dump(mode="json")
    inferred = infer_classifier_settings(state, settings.size_hw)
    return [f"--{name} {value or repr('')}" for name, value in inferred.items() if value != now[name]]


def _hints(settings: BackboneSettings, state: dict[str, Tensor]) -> list[str]:
    """The flags that would make a network of these settings one that fits the file."""
    super_res = isinstance(settings, SuperResSettings)
    if is_classifier(state):
        raise UserError("it is a classifier")
    if mismatch := script_mismatch(state, super_res):
        raise UserError(mismatch)
    inferred = infer_settings(state, super_res)
    return [hint for name, value in inferred.items() if (hint := _hint(settings, name, value, inferred))]


def _hint(settings: BackboneSettings, name: str, value: Any, inferred: dict[str, Any]) -> str:
    """The flag that gives a setting its inferred value; empty if the setting has it."""
    if name == "attention_factors":
        levels = {2**level for level in range(len(inferred["channel_mult"]))}
        sizes = ",".join(str(min(settings.size_hw) // factor) for factor in value)
        differs = set(value) != levels & set(settings.attention_factors)
        return f"--attention_resolutions {sizes or repr('')}" if differs else ""
    if name == "channel_mult":
        return f"--channel_mult {','.join(map(str, value))}" if tuple(value) != tuple(settings.level_mult) else ""
    if name == "scale_stem" and inferred["channel_mult"][:1] == [1]:  # it makes no difference
        return ""
    if name == "num_classes":  # the rows of the label embedding
        if value == settings.num_labels:
            return ""
        if value in (settings.num_classes, settings.num_classes + 1):  # the null class alone explains it
            return f"--null_class {value > settings.num_classes}"
        return f"--num_classes {value - settings.null_class}"
    return f"--{name} {value}" if value != getattr(settings, name) else ""


def add_null_class(table: Tensor) -> Tensor:
    """Append a row of zeros for the null class to label embeddings [num_classes, C]."""
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


_CHECKPOINT = re.compile(r"(?:ema_([0-9]+(?:\.[0-9]+)?)_|model)(\d+)\.(?:pt|safetensors)$")
CONVERTED = ("model.safetensors", "model.pt")
"""The file in a folder that convert.py has written."""


def step_and_rate(file: Path) -> tuple[int | None, str]:
    """The step in a checkpoint's name, None for other names, and the rate of an average, empty for the model itself."""
    match = _CHECKPOINT.fullmatch(file.name)
    return (int(match[2]), match[1] or "") if match else (None, "")


def find(path: str) -> Path:
    """The checkpoint file at a path, or the newest EMA with the highest rate in the folder of a step or a run.

    In a folder that convert.py has written it is the file there.
    """
    if not path:
        raise UserError("no checkpoint is named: give a .pt checkpoint or a run's folder")
    place = Path(path)
    if not is_there(place, "dir"):
        return place
    folders = ("", "step_*/", "checkpoints/step_*/")
    candidates = [file for each in folders for kind in ("pt", "safetensors") for file in place.glob(f"{each}*.{kind}")]
    ranked = [
        (int(match[2]), float(match[1] or -1), file)  # an EMA is preferred to the model of its step
        for file in candidates
        if (match := _CHECKPOINT.search(file.name))
    ]
    if not ranked:
        if converted := [place / name for name in CONVERTED if (place / name).is_file()]:
            return converted[0]
        raise UserError(f"{path} holds no checkpoint (ema_RATE_STEP.pt or modelSTEP.pt){describe_folder(place)}")
    return max(ranked)[-1]
