"""Reads a folder of diffusers' UNet2DModel, as far as our network can express it."""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.config.checkpoint import Checkpoint
from fastdiff.conversion.to_diffusers import TABLE, embeddings
from fastdiff.conversion.unet_names import from_diffusers
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, quoted
from fastdiff.models import SuperResSettings, UNetSettings, weights
from fastdiff.models.settings import GROUPS
from fastdiff.runtime.files import read_json
from fastdiff.runtime.untrusted import read
from fastdiff.settings import validated

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Setting of UNet2DModel → its default, and the values that our network computes.
_ONLY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional", "learned")),
    "freq_shift": (0, (0,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (1,)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_num_groups": (GROUPS, (GROUPS,)),
    "norm_eps": (1e-5, (1e-5,)),
    "resnet_time_scale_shift": ("default", ("default", "scale_shift")),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
}
_KINDS = {"down": ("DownBlock2D", "ResnetDownsampleBlock2D"), "up": ("UpBlock2D", "ResnetUpsampleBlock2D")}
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_NOW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention's layers in files of older versions, and in those of today."""
_FORMER = re.compile(rf"(?<=\.)({'|'.join(_NOW)})(?=\.(weight|bias)$)")
_FIRST = "time_embedding.linear_1.weight"
_ROUNDING = 2.0**-8
"""Of a table of embeddings in bfloat16."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder holds a network of diffusers, by itself or as a part of a pipeline.

    A run's folder has a config.json, too, but not theirs.
    """
    if (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file():
        return True
    with suppress(UserError):
        config = read_json(folder / "config.json")
        return isinstance(config, dict) and "_class_name" in config
    return False


def _unet_folder(folder: Path) -> Path | None:
    return next((each for each in (folder / "unet", folder) if (each / "config.json").is_file()), None)


def open_diffusers(folder: Path) -> Checkpoint:
    """Read a network of diffusers with our names and settings. Raises UserError with the reason where that can't be.

    A file that convert.py wrote carries our settings. Of another one they are those that its configuration describes.
    """
    place = _unet_folder(folder)
    if place is None:
        raise UserError(f"{folder} holds no UNet (no unet/config.json); only networks of UNet2DModel are read")
    config = read_json(place / "config.json")
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DModel":
        name = config.get("_class_name") if isinstance(config, dict) else config
        raise UserError(f"{place} holds a network of the class {quoted(name)}; only UNet2DModel is read")
    file = next((place / name for name in _WEIGHTS if (place / name).is_file()), None)
    if file is None:
        raise UserError(f"{place} holds no {' or '.join(_WEIGHTS)}; download the folder again")
    state = read(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no state_dict; download the folder again")
    weights.check_info(state, file)
    with cannot_be_expressed(folder):
        if not (info := weights.info_of(state)):
            settings = _model_settings(config)
            process = _process(folder / "scheduler" / "scheduler_config.json", config, settings)
            sections = {"model": settings.model_dump(mode="json"), "diffusion": process.model_dump(mode="json")}
            info = {"kind": "unet", **sections, "class_names": []}
        return Checkpoint(file, weights.with_info(_renamed(state, config, info), info))


@contextmanager
def cannot_be_expressed(folder: Path) -> Iterator[None]:
    """Put before the message of a UserError that the network in a folder can't be expressed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder} can't be expressed as a network of fastdiff: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:  # values of other types
        raise UserError(f"{folder} has a damaged configuration ({error}); download it again") from None


def _renamed(state: dict[str, Tensor], config: dict[str, Any], info: dict[str, Any]) -> OrderedDict[str, Tensor]:
    """Our weights for those of a folder, whose settings are in `info`."""
    settings = validated(SuperResSettings if info["kind"] == "super_res" else UNetSettings, info["model"])
    named = {_FORMER.sub(lambda found: _NOW[found[0]], name): value for name, value in state.items()}
    if (table := named.pop(TABLE, None)) is not None:
        wanted = embeddings(settings, validated(DiffusionSettings, info["diffusion"])).float()
        if table.shape[-1] != settings.num_channels:
            raise UserError(
                f"its embedding of timesteps was projected to {table.shape[-1]} numbers, which can't be undone; "
                "convert the checkpoint of which it was made"
            )
        if table.shape != wanted.shape or not torch.allclose(table.float(), wanted, atol=_ROUNDING):
            raise UserError("its embedding of timesteps was learned, and ours are sines and cosines")
    elif not config.get("flip_sin_to_cos", True) and _FIRST in named:
        named[_FIRST] = torch.cat(named[_FIRST].chunk(2, dim=1)[::-1], dim=1)  # theirs takes sines, then cosines
    return from_diffusers(named, settings)


def _model_settings(config: dict[str, Any]) -> UNetSettings:
    """The settings of our network that UNet2DModel's configuration describes. Raises UserError if there are none."""
    for name, (default, possible) in _ONLY.items():
        if (value := config.get(name, default)) not in possible:
            shown = " or ".join(map(str, possible))
            raise UserError(f"its {name} is {quoted(value)}, and our network has {shown} there")
    widths = config.get("block_out_channels", (224, 448, 672, 896))
    scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"
    if config.get("attn_norm_num_groups") not in (GROUPS, *([] if scale_shift else [None])):
        raise UserError(f"its attn_norm_num_groups is not {GROUPS}, so that its middle attention has another norm")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise UserError(f"its time_embedding_dim is not {4 * widths[0]}, four times its first width")
    C, C_out = config.get("in_channels", 3), config.get("out_channels", 3)
    if C_out not in (C, 2 * C):
        raise UserError(f"it has {C} input and {C_out} output channels, and ours as many or twice as many outputs")
    size = config.get("sample_size")
    if size is None:
        raise UserError("it doesn't say the size of its images (sample_size); add it to its config.json")
    attends, resblock_updown = _levels(config)
    head_size = config.get("attention_head_dim", 8)
    heads = {"num_heads": 1} if head_size is None else {"num_heads": -head_size} if head_size < 0 else {}
    classes = config.get("num_class_embeds")
    values = {
        "image_size": size,
        "num_channels": widths[0],
        "channel_mult": [width / widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "num_head_channels": -1 if heads else head_size,
        **heads,
        "resblock_updown": resblock_updown,
        "dropout": config.get("dropout", 0.0),
        "learn_sigma": C_out == 2 * C,
        "in_channels": C,
        "use_scale_shift_norm": scale_shift,
        **({"class_cond": True, "num_classes": classes} if classes else {}),
    }
    settings = validated(UNetSettings, {**values, "attention_resolutions": []})
    resolutions = [settings.level_sizes[level] for level, attend in enumerate(attends) if attend]
    return validated(UNetSettings, {**values, "attention_resolutions": resolutions})


def _levels(config: dict[str, Any]) -> tuple[list[bool], bool]:
    """Whether each level has attention, and whether residual blocks resample."""
    down = config.get("down_block_types", ("DownBlock2D", *("AttnDownBlock2D",) * 3))
    known = {"down": down, "up": config.get("up_block_types", (*("AttnUpBlock2D",) * 3, "UpBlock2D"))[::-1]}
    for way, kinds in known.items():
        possible = {f"Attn{_KINDS[way][0]}", *_KINDS[way]}
        if other := [kind for kind in kinds if kind not in possible]:
            raise UserError(f"it has {quoted(other[0])}, and our network's blocks are {', '.join(sorted(possible))}")
    attends = {way: [kind.startswith("Attn") for kind in kinds] for way, kinds in known.items()}
    if attends["down"] != attends["up"]:
        raise UserError("it has attention at other levels on the way up than on the way down")
    resampling = {
        config.get(f"{way}sample_type", "conv") == "resnet" if attend else kind.startswith("Resnet")
        for way, levels in (("down", slice(None, -1)), ("up", slice(1, None)))
        for kind, attend in zip(known[way][levels], attends[way][levels], strict=True)
    }
    if len(resampling) > 1:
        raise UserError("some of its levels are resampled by residual blocks, others by convolutions")
    return attends["down"], resampling == {True}


def _process(file: Path, config: dict[str, Any], settings: UNetSettings) -> DiffusionSettings:
    """The diffusion process that a scheduler's configuration describes. Raises UserError if it is none of ours."""
    given = read_json(file) if file.is_file() else {}
    if not given:
        logging.getLogger(__name__).warning("there is no %s: a linear chain of 1000 steps is assumed", file)
    if given.get("thresholding") or not given.get("clip_sample", True) or given.get("clip_sample_range", 1) != 1:
        logging.getLogger(__name__).warning(
            "%s doesn't clip predictions to [-1, 1], which fastdiff does: draw with --clip_denoised False", file
        )
    steps, schedule = given.get("num_train_timesteps", 1000), given.get("beta_schedule", "linear")
    ends = given.get("beta_start", 0.0001), given.get("beta_end", 0.02)
    if given.get("trained_betas") is not None or given.get("rescale_betas_zero_snr"):
        raise UserError("its scheduler has betas of its own, and our chains are linear or cosine")
    if schedule == "linear" and any(
        not math.isclose(end * steps / 1000, own, rel_tol=1e-6) for end, own in zip(ends, (0.0001, 0.02), strict=True)
    ):
        raise UserError(f"its linear chain of {steps} steps goes from beta {ends[0]} to {ends[1]}, ours from others")
    if schedule not in _SCHEDULES:
        raise UserError(f"its beta_schedule is {quoted(schedule)}, and ours are {' and '.join(_SCHEDULES)}")
    if (predicts := given.get("prediction_type", "epsilon")) not in ("epsilon", "sample"):
        raise UserError(f"it predicts {quoted(predicts)}, and ours predict epsilon or sample")
    if given and settings.learn_sigma != (given.get("variance_type") == "learned_range"):
        raise UserError(
            f"it has {settings.out_channels} output channels for {settings.in_channels}, which doesn't fit its "
            f"scheduler's variance_type {quoted(given.get('variance_type'))}"
        )
    return validated(
        DiffusionSettings,
        {
            "diffusion_steps": steps,
            "noise_schedule": _SCHEDULES[schedule],
            "sigma_small": str(given.get("variance_type", "")).startswith("fixed_small"),
            "predict_xstart": predicts == "sample",
            "rescale_timesteps": config.get("time_embedding_type") == "learned",
        },
    )
