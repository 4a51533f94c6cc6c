"""Opens a checkpoint: its weights, its settings (stored in it, those of a preset, or inferred), and its network."""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fastdiff.config.family import NAMES
from fastdiff.config.presets import Preset, find_preset, preset_for_file
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, UNetSettings, weights
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import NetworkSettings
from fastdiff.models.classifier_weights import is_classifier
from fastdiff.models.settings import misplaced_attention
from fastdiff.models.unet import body_dtype, freeze
from fastdiff.runtime.files import checksum
from fastdiff.settings import Size, affecting, is_true

Layer = dict[str, dict[str, Any]]
_FREE = affecting(BackboneSettings, "training") | affecting(DiffusionSettings, "training", "steps")
"""Settings of model and diffusion that drawing and scoring may choose, because weights don't depend on them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file whose content has been read, so that settings and networks are built from one read."""

    file: Path
    state: OrderedDict[str, Tensor]

    @cached_property
    def info(self) -> dict[str, Any]:
        """The metadata in the file (kind, model, diffusion, class_names); empty for a file of another program."""
        return weights.info_of(self.state)

    @property
    def class_names(self) -> list[str]:
        return self.info.get("class_names", [])

    @cached_property
    def kind(self) -> str:
        """The kind of its network, one of `weights.KINDS`, according to its metadata or else its keys and shapes."""
        if self.info:
            return self.info["kind"]
        if is_classifier(self.state):
            return "classifier"
        return "super_res" if weights.script_mismatch(self.state, super_res=False) else "unet"

    @property
    def super_res(self) -> bool:
        """Whether it holds a super-resolution model."""
        return self.kind == "super_res"

    @cached_property
    def is_guided(self) -> bool:
        """Whether it carries no settings, but its weights have features of guided-diffusion's networks.

        These are resampling inside residual blocks, and a first convolution that is as wide as the first level.
        """
        if not self.info:
            with suppress(UserError):
                shown = weights.infer_settings(self.state, self.super_res)
                return shown["resblock_updown"] or shown["scale_stem"]
        return False

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, shortened to 16 hexadecimal digits."""
        return f"sha256:{checksum(self.file)[:16]}"


def open_checkpoint(path: str) -> Checkpoint:
    """Read the checkpoint at a path (see `weights.find` for folders). Raises UserError if it can't be read."""
    file = weights.find(path)
    return Checkpoint(file, weights.read_state_dict(file))


def named(checkpoint: Checkpoint | None) -> Checkpoint:
    """Return the checkpoint. Raises UserError if there is none."""
    if checkpoint is None:
        raise UserError("--model_path is missing: give a .pt checkpoint or a run's folder")
    return checkpoint


def scripts_for(super_res: bool) -> str:
    """The names of the scripts for checkpoints of that kind, for messages."""
    return "super_res_train.py and super_res_sample.py" if super_res else "train.py, sample.py and nll.py"


def preset_of(name: str, super_res: bool, flag: str = "--preset", classifier: bool = False) -> Preset | None:
    """The preset with that name, None for an empty name. Raises UserError if it is unknown or of another kind."""
    preset = find_preset(name, flag) if name else None
    if preset and classifier:
        if preset.kind != "classifier":
            raise UserError(f"{flag}: {name} is for {scripts_for(preset.kind == 'super_res')}, not a classifier's")
        return preset
    if preset and preset.kind == "classifier":
        raise UserError(f"{flag}: {name} is a classifier, which sample.py takes as --classifier_path")
    if preset and (preset.kind == "super_res") != super_res:
        raise UserError(f"{flag}: {name} is for {scripts_for(not super_res)}")
    return preset


def check_family(preset: Preset, family: str) -> None:
    """Raise UserError if the user named another family than the preset's."""
    if family and family != preset.family:
        raise UserError(
            f"family {family} contradicts the preset {preset.name}, which is {NAMES[preset.family]}'s; leave family out"
        )


def settings_of(
    checkpoint: Checkpoint,
    super_res: bool,
    preset: Preset | None = None,
    given: Layer | None = None,
    preset_flag: str = "--preset",
    family: str = "",
) -> tuple[str, Layer]:
    """A description of the source of a checkpoint's settings, and its sections model and diffusion.

    given holds the settings of the command line and the JSON file, with which the caller overrides the result: the
    warning about assumed defaults omits them. family is the one that they name. Raises UserError if the file is of the
    other kind or contradicts the preset, or the preset the family.
    """
    file = checkpoint.file
    if checkpoint.kind == "classifier":
        raise UserError(f"{file} is a classifier, which sample.py takes as --classifier_path")
    if info := checkpoint.info:
        if checkpoint.super_res != super_res:
            raise UserError(f"{file} is for {scripts_for(not super_res)}")
        if preset:
            check_agrees(info, preset, file, preset_flag)
        return f"the settings in {file}", {"model": info["model"], "diffusion": info["diffusion"]}
    if mismatch := weights.script_mismatch(checkpoint.state, super_res):
        raise UserError(f"{file} does not fit: {mismatch}, which is for {scripts_for(not super_res)}")
    if preset:
        return f"preset {preset.name}", preset.layer
    if (named := preset_for_file(file)) and named.kind == checkpoint.kind:  # else its name says nothing of the network
        check_family(named, family)
        logging.getLogger(__name__).warning(
            "%s carries no settings; taken from the preset %s by the file's name", file, named.name
        )
        return f"preset {named.name}", named.layer
    try:
        return f"the settings in {file}", {"model": _inferred(checkpoint, super_res, given or {}, family)}
    except UserError as error:
        raise UserError(f"{file} can't be used: {error}") from None


def at_size(layer: Layer, given: Layer, kind: type[BackboneSettings]) -> Layer:
    """A checkpoint's settings for training its network on, at the size that is given instead of its own.

    channel_mult and attention_resolutions depend on the size: they are replaced by those of the same levels, as are
    attention_resolutions of no level. The null class is left out if class_cond False is given.
    """
    model, wanted = dict(layer["model"]), given.get("model", {})
    if "class_cond" in wanted and not is_true(wanted["class_cond"]):
        model.pop("null_class", None)
    try:
        trained = kind.model_validate(layer["model"])
        size_hw = TypeAdapter(Size).validate_python(wanted.get(kind.size_name, trained.size_hw))
    except ValidationError:
        return layer  # the error is found again, with its source, where all layers are validated
    if size_hw != trained.size_hw or misplaced_attention(trained):
        model["channel_mult"] = trained.level_mult
        model["attention_resolutions"] = [min(size_hw) >> level for level in trained.attending_levels]
    return {**layer, "model": model}


def _inferred(checkpoint: Checkpoint, super_res: bool, given: Layer, family: str) -> dict[str, Any]:
    """The model settings that the shapes of the weights show. Logs a warning about those that they don't show."""
    model = weights.infer_settings(checkpoint.state, super_res, is_true(given.get("model", {}).get("null_class")))
    known = {**given.get("model", {}), **given.get("diffusion", {})}
    kind = SuperResSettings if super_res else UNetSettings
    factors = model.pop("attention_factors")
    with suppress(ValidationError):  # which is raised again, with its source, where all layers are validated
        size = TypeAdapter(Size).validate_python(known.get(kind.size_name, kind.model_fields[kind.size_name].default))
        model |= {kind.size_name: size, "attention_resolutions": [min(size) // factor for factor in factors]}
    sizes = ("large_size", "small_size") if super_res else ("image_size",)
    heads, defaults = "num_heads", "their defaults"
    unseen = ["diffusion_steps", "noise_schedule"]
    if str(known.get("diffusion_steps")) != "1000":  # of 1000 steps rescaled timesteps are the same
        unseen.append("rescale_timesteps")
    if family == "guided" or (checkpoint.is_guided and not family):
        heads, defaults = "num_heads or num_head_channels", "guided-diffusion's defaults"
        unseen.append("use_new_attention_order")
        if not family:
            defaults += ", because its weights have features of that family (--family improved takes the other ones)"
    unseen = [*sizes, *([] if known.keys() & {"num_heads", "num_head_channels"} else [heads]), *unseen]
    if assumed := [name for name in unseen if name not in known]:
        logging.getLogger(__name__).warning(
            "%s carries no settings; taken at %s, give them if it was trained otherwise: %s",
            checkpoint.file,
            defaults,
            ", ".join(assumed),
        )
    return model


def check_agrees(info: dict[str, Any], preset: Preset, file: Path, flag: str) -> None:
    """Raise UserError if the settings stored in a checkpoint differ from the preset's."""
    carried = {**info["model"], **info["diffusion"]}
    for name, value in {**preset.model, **preset.diffusion}.items():
        if name not in _FREE and carried.get(name, value) != value:
            raise UserError(
                f"{flag}: {preset.name} has {name} {value}, but {file} carries its own settings, with {name} "
                f"{carried[name]}; leave {flag} out"
            )


def warn_of_another_process(
    checkpoint: Checkpoint, model: BackboneSettings, diffusion: DiffusionSettings, trained: Layer
) -> None:
    """Log a warning if settings differ from `trained`, those that the weights of the checkpoint were trained with.

    Those that decide the shapes of the weights are left out: a network of other ones can't be loaded. Nothing is known
    where `trained` has no section diffusion, because shapes don't show it.
    """
    if "diffusion" not in trained:
        return
    free = _FREE | affecting(BackboneSettings, "shapes") | {"attention_resolutions", "sigma_small"}
    before = {**trained["model"], **trained["diffusion"]}
    now = {**model.model_dump(mode="json"), **diffusion.model_dump(mode="json")}
    differing = [name for name in now if name in before and name not in free and before[name] != now[name]]
    if differing:
        logging.getLogger(__name__).warning(
            "%s was trained with %s, not with %s; leave that out to take its own settings",
            checkpoint.file,
            ", ".join(f"{name} {before[name]}" for name in differing),
            ", ".join(f"--{name} {now[name]}" for name in differing),
        )


# --- its network ---


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
    """Build the network that the settings describe, with a checkpoint's weights; see `load_network`."""
    model = load_network(settings, checkpoint, precision, device, frozen)
    assert isinstance(model, UNet)
    return Network(model, diffusion, checkpoint.file, checkpoint.digest, checkpoint.class_names)


def load_network(
    settings: NetworkSettings,
    checkpoint: Checkpoint,
    precision: str,
    device: torch.device,
    frozen: bool,
) -> UNet | Classifier:
    """Build a network of either kind, with a checkpoint's weights. Raises UserError if they don't fit.

    frozen=False skips `freeze`, which the kernels "reference" don't support.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    weights.check_fits(settings, checkpoint.state, checkpoint.file)
    model = build_network(settings)
    weights.load_into(model, checkpoint.state, checkpoint.file)
    model.to(device).eval().set_precision(body_dtype(precision, device))
    return freeze(model) if frozen else model
