"""Reads all settings of a run from flags, the sections of a JSON file, and a checkpoint or a preset.

Later sources override earlier ones: the family's defaults, the checkpoint's settings or a preset, the JSON file, flags.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fastdiff.config.aliases import advice
from fastdiff.config.checkpoint import (
    Checkpoint,
    Layer,
    at_size,
    check_family,
    open_checkpoint,
    preset_of,
    settings_of,
    warn_of_another_process,
)
from fastdiff.config.classifier import classifier_settings_of
from fastdiff.config.family import FAMILIES, known_family
from fastdiff.config.flags import read_flags
from fastdiff.config.presets import Preset, config_file, download, find_preset
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.errors import UserError, blaming, quoted, shortened
from fastdiff.models.classifier_settings import ClassifierNetSettings, ClassifierSettings
from fastdiff.models.settings import SuperResSettings, UNetSettings
from fastdiff.runtime.files import read_json
from fastdiff.runtime.paths import expand_path
from fastdiff.runtime.processes import output_folder
from fastdiff.settings import Settings, is_true, merge, validated, what_is_wrong
from fastdiff.training.settings import RunSettings, adopt

# Switches of improved-diffusion and guided-diffusion → ours, of which a script has the first or the second
_SWITCHES = {
    "use_fp16": (("precision",), "fp16"),
    "use_ddim": (("solver",), "ddim"),
    "classifier_use_fp16": (("classifier_precision", "precision"), "fp16"),
}


class Loaded(NamedTuple):
    """What `load` returns."""

    config: Config
    args: argparse.Namespace
    """The flags that are not settings: dry_run, config."""
    checkpoint: Checkpoint | None
    """The checkpoint that the settings name, already read; None if they name none."""


def load(
    argv: list[str] | None,
    *,
    description: str,
    sections: tuple[str, ...],
    kind: type[Config] = Config,
    checkpoint: tuple[str, str] | None = None,
    opened: Checkpoint | None = None,
) -> Loaded:
    """Read settings from the command line and the files that it names.

    sections    The sections whose settings are flags of this script.
    checkpoint  (section, name) of the setting that names a checkpoint. All other sources override its settings. In
                training init_from may name it as well.
    opened      What that setting names, if it has been read already.
    Raises UserError with one sentence that names the flag, or the file and the key.
    """
    args, flag_layer = read_flags(argv, description, {section: _section_class(kind, section) for section in sections})
    for name in ("config", "deepspeed"):
        if path := getattr(args, name, None):
            with blaming(f"--{name}"):
                setattr(args, name, expand_path(path))
    if args.config:
        with blaming("--config"):
            args.config = config_file(args.config)
    file_layer, family = _read_json(args.config, kind) if args.config else ({}, "")
    if given_family := getattr(args, "family", ""):
        family = known_family(given_family, "--family")
    if not family and kind is ClassifierConfig:  # only that family has classifiers
        family = "guided"
    if "train" in sections and args.deepspeed:
        flag_layer["deepspeed"] = _read_object(args.deepspeed)
    layers = [(args.config or "", file_layer), ("", flag_layer)]
    below: list[tuple[str, Layer]] = []
    if checkpoint:
        if checkpoint[0] == "train":
            opened, below = _training_layer(checkpoint, layers, kind, family)
        else:
            opened, below = _checkpoint_layer(checkpoint, layers, kind, family, opened)
        layers = [*below, *layers]
    config = _resolve(kind, layers, _defaults(family, opened))
    if opened and "train" not in sections:
        _check_size(opened, config, layers)
    if "train" in sections:
        config = config.model_copy(update={"train": adopt(config.train, config.deepspeed)})
        given = any("null_class" in layer.get("model", {}) for layer in (file_layer, flag_layer))
        config = config if kind is ClassifierConfig else _with_null_class(config, given)
    if args.print_config:
        shown = config.model_dump(mode="json", include={*sections, *(["deepspeed"] if "train" in sections else [])})
        if kind is SuperResConfig and "sample" in shown and "num_samples" not in config.sample.model_fields_set:
            del shown["sample"]["num_samples"]  # by default it is the number of small images
        print(json.dumps(shown, indent=2))
        sys.exit(0)
    if checkpoint and opened is None:
        config, opened = _with_released_file(config, checkpoint)
    if opened and below and "train" not in sections:  # training compares them itself, with more to say
        warn_of_another_process(opened, config.model, config.diffusion, below[0][1])
    return Loaded(config, args, opened)


def describe(
    checkpoint: Checkpoint, preset: str = "", super_res: bool | None = None, preset_flag: str = "--preset"
) -> Config:
    """The settings of a checkpoint alone: those stored in it, or a preset's, or those inferred from its shapes.

    super_res is the kind of model that is wanted; None accepts both. Raises UserError for the other kind, and for
    invalid settings.
    """
    super_res = checkpoint.super_res if super_res is None else super_res
    found = preset_of(preset, super_res, preset_flag)
    layer = settings_of(checkpoint, super_res, found, preset_flag=preset_flag)
    return _resolve(SuperResConfig if super_res else Config, [layer], _defaults("", checkpoint))


def _defaults(family: str, checkpoint: Checkpoint | None) -> Layer:
    """The defaults of the family that the user named, or that the weights of a file without settings show.

    What weights show says nothing about the images, so that the section data is then left out.
    """
    if family or not (checkpoint and checkpoint.is_guided):
        return FAMILIES[family or "improved"]
    return {section: FAMILIES["guided"][section] for section in ("model", "diffusion")}


def _with_null_class(config: Config, given: bool) -> Config:
    """Enable the null class if label_dropout is on. `given` says whether the user set null_class."""
    dropped = f"--label_dropout {config.train.label_dropout:g}"
    if not config.train.label_dropout or config.model.null_class:
        return config
    if not config.model.class_cond:
        raise UserError(f"{dropped} needs a class-conditional model; give --class_cond True")
    if given:
        raise UserError(f"{dropped} contradicts null_class False; give one of them")
    return config.model_copy(update={"model": config.model.model_copy(update={"null_class": True})})


def _with_released_file(config: Config, setting: tuple[str, str]) -> tuple[Config, Checkpoint | None]:
    """If a preset but no checkpoint is named, add the preset's released file to the settings, and open it."""
    section, name = setting
    settings = getattr(config, section)
    if getattr(settings, name) or not getattr(settings, "preset", ""):
        return config, None
    file = download(find_preset(settings.preset))
    with blaming("--preset"):
        opened = open_checkpoint(str(file))
    return config.model_copy(update={section: settings.model_copy(update={name: str(file)})}), opened


def _section_class(kind: type[Config], section: str) -> type[Settings]:
    annotation = kind.model_fields[section].annotation
    assert isinstance(annotation, type)
    return annotation


def _checkpoint_layer(
    setting: tuple[str, str],
    layers: list[tuple[str, Layer]],
    kind: type[Config],
    family: str,
    opened: Checkpoint | None,
) -> tuple[Checkpoint | None, list[tuple[str, Layer]]]:
    """The checkpoint that the layers name, and the layer with its settings, or with those of a named preset."""
    section, name = setting
    preset = _preset(section, layers, kind, family)
    given = _merged(layers)
    path = given.get(section, {}).get(name)
    if path:
        with blaming(f"--{name}"):
            opened = opened or open_checkpoint(expand_path(str(path)))
            if _section_class(kind, "model") is ClassifierSettings:
                return opened, [classifier_settings_of(opened, given, preset)]
            return opened, [settings_of(opened, kind is SuperResConfig, preset, given, family=family)]
    return None, [(f"preset {preset.name}", preset.layer)] if preset else []


def _merged(layers: list[tuple[str, Layer]]) -> Layer:
    return functools.reduce(merge, (layer for _, layer in layers), {})


def _training_layer(
    setting: tuple[str, str], layers: list[tuple[str, Layer]], kind: type[Config], family: str
) -> tuple[Checkpoint | None, list[tuple[str, Layer]]]:
    """The checkpoint from which a run starts, and the layer with its settings, at the image size that the layers give.

    A run that has checkpoints of its own continues from these with its own settings, and the other one is not read.
    """
    given = _merged(layers)
    names = [name for name in (setting[1], "init_from") if given.get("train", {}).get(name)]
    if not names:
        return None, []
    if own := _settings_of_run(_run_folder(given.get("train", {}), layers[0][0], kind)):
        return None, [own]
    with blaming(f"--{names[0]}"):
        opened = open_checkpoint(expand_path(str(given["train"][names[0]])))
        if kind is ClassifierConfig:
            return opened, [classifier_settings_of(opened, given)]
        source, layer = settings_of(opened, kind is SuperResConfig, None, given, family=family)
        return opened, [(source, at_size(layer, given, SuperResSettings if kind is SuperResConfig else UNetSettings))]


def default_name(config_file: str | None, kind: type[Config]) -> str:
    """NAME in runs/NAME for a run without the setting `name`: the JSON file's name, else the script's."""
    script = {SuperResConfig: "super_res", ClassifierConfig: "classifier"}.get(kind, "train")
    return Path(config_file).stem if config_file else script


def _run_folder(train: Mapping[str, Any], config_file: str, kind: type[Config]) -> Path:
    """The folder of the run with these settings of the section train."""
    settings = validated(RunSettings, {name: train[name] for name in ("run_dir", "name") if name in train})
    return output_folder(settings.run_dir, f"runs/{settings.name or default_name(config_file, kind)}")


def _settings_of_run(folder: Path) -> tuple[str, Layer] | None:
    """The layer of a run that has checkpoints, from its config.json; None where there is no such run."""
    file = folder / "config.json"
    try:
        if not file.is_file() or not any(folder.glob("checkpoints/step_*")):
            return None
    except OSError:  # the name is too long, for example, which the run says when it looks for its checkpoints
        return None
    content = _read_object(str(file))
    return f"the settings in {file}", {
        section: content[section] for section in ("model", "diffusion") if isinstance(content.get(section), dict)
    }


def _check_size(checkpoint: Checkpoint, config: Config, layers: list[tuple[str, Layer]]) -> None:
    """UserError if a flag or a JSON file changes the size of a checkpoint's images.

    The attention would then stand at other levels, which `attention_resolutions` can only want if it is given as well.
    """
    stored = checkpoint.info.get("model", {}) if checkpoint.info else {}
    given = [(source, layer.get("model", {})) for source, layer in layers[1:]]
    if any("attention_resolutions" in layer for _, layer in given):
        return
    now = config.model.model_dump(mode="json")
    for source, layer in given:
        for name in ("image_size", "large_size", "small_size"):
            if name in layer and name in stored and now[name] != stored[name]:
                where = f"{source}: model.{name}" if source else f"--{name}"
                raise UserError(
                    f"{where} {now[name]}: {checkpoint.file} was trained with {name} {stored[name]}, so leave it out; "
                    "other sizes need a training of their own, larger images a super-resolution model"
                )


def _preset(section: str, layers: list[tuple[str, Layer]], kind: type[Config], family: str) -> Preset | None:
    """The preset that the last layer with a preset names. Raises UserError if it is not of the family."""
    named = [(source, layer[section]["preset"]) for source, layer in layers if "preset" in layer.get(section, {})]
    if not named or "preset" not in _section_class(kind, section).model_fields:
        return None
    source, name = named[-1]
    flag = f"{source}: {section}.preset" if source else "--preset"
    preset = preset_of(str(name), kind is SuperResConfig, flag, _section_class(kind, "model") is ClassifierSettings)
    if preset:
        check_family(preset, family)
    return preset


def _read_object(path: str) -> dict[str, Any]:
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise UserError(f'{path}: must be a JSON object such as {{"train": {{}}}}, not {quoted(content)}')
    return content


def _read_json(path: str, kind: type[Config]) -> tuple[Layer, str]:
    """The sections of a JSON file, and the family that it names, empty for none."""
    content = _read_object(path)
    family = known_family(content.pop("family"), f"{path}: family") if "family" in content else ""
    for section, value in content.items():
        if section not in kind.model_fields:
            hint = (
                _owner(kind, section) or advice(section, kind.model_fields, str) or _elsewhere(kind, "train", section)
            )
            raise UserError(f"{path}: {shortened(section)} is not a section{hint}")
        if not isinstance(value, dict):
            raise UserError(f"{path}: section {section} must be a JSON object, not {quoted(value)}")
    return content, family


def _resolve(kind: type[Config], layers: list[tuple[str, Layer]], defaults: Layer) -> Config:
    merged: Layer = {}
    for section, values in defaults.items():
        known = _section_class(kind, section).model_fields
        merged[section] = {name: value for name, value in values.items() if name in known}
    sources: dict[tuple[str, str], str] = {}
    givers: dict[str, list[str]] = {}  # section → sources of its settings other than flags
    for source, layer in layers:
        for section, values in layer.items():
            if section == "deepspeed":
                merged[section] = merge(merged.get(section, {}), values)
                continue
            known = _section_class(kind, section).model_fields
            if source and values:
                givers.setdefault(section, []).append(source)
            for name, value in _aliases(source, section, values, known).items():
                where = f"{source}: {section}.{shortened(name)}" if source else f"--{name}"
                if name not in known:
                    raise UserError(f"{where} is not a setting{_hint(kind, section, name)}")
                merged.setdefault(section, {})[name] = value
                sources[section, name] = where
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError(_sentence(error, sources, givers)) from None


def _aliases(source: str, section: str, values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Replace the originals' names (use_fp16, use_ddim, iterations) by the equivalent choices."""
    values = dict(values)
    if "iterations" in known and (steps := values.pop("iterations", "0")) not in ("0", 0):
        _choose(source, section, values, f"iterations {steps}", "max_steps", steps)
    for switch, (names, choice) in _SWITCHES.items():
        if switch in known and is_true(values.get(switch)):
            del values[switch]
            name = next(name for name in names if name in known)
            _choose(source, section, values, f"{switch} True", name, choice)
    return values


def _choose(source: str, section: str, values: dict[str, Any], given: str, name: str, choice: str) -> None:
    """Set `name` to the choice that `given` stands for. Raises UserError if the same source gives it another value."""
    if values.setdefault(name, choice) != choice:
        where = f"{source}: {section}." if source else "--"
        raise UserError(f"{where}{given} contradicts {name} {values[name]}; give one of them")


def _hint(kind: type[Config], section: str, name: str) -> str:
    """The end of an error message about an unknown setting: where it belongs, or a similar name; may be empty."""
    if name == "family":
        return "; it stands beside the sections, at the top of the file"
    if kind is Config and section == "model" and name in ("large_size", "small_size"):
        return "; super-resolution models are for super_res_train.py and super_res_sample.py"
    if kind is not ClassifierConfig and section == "model" and name in ClassifierNetSettings.model_fields:
        return "; classifiers are for classifier_train.py"
    if kind is ClassifierConfig and section == "model" and f"classifier_{name}" in ClassifierSettings.model_fields:
        return f"; a classifier has classifier_{name}"
    if kind is SuperResConfig and section == "model" and name == "image_size":
        return "; a super-resolution model has large_size and small_size"
    here = advice(name, _section_class(kind, section).model_fields, str)
    return _owner(kind, name) or here or _elsewhere(kind, section, name)


def _elsewhere(kind: type[Config], section: str, word: str) -> str:
    """Advice on another program's word by the settings of the other sections that are used with this one."""
    used = ("model", "diffusion", *(("data", "train") if section not in ("sample", "nll") else (section,)))
    owners = {name: each for each in used for name in _section_class(kind, each).model_fields}
    return advice(word, owners, lambda name: f"{owners[name]}.{name}")


def _owner(kind: type[Config], name: str) -> str:
    """'; it belongs in section X' for a setting of a section; empty for any other name."""
    owners = [s for s in kind.model_fields if s != "deepspeed" and name in _section_class(kind, s).model_fields]
    return f"; it belongs in section {owners[0]}" if owners else ""


def _sentence(error: ValidationError, sources: dict[tuple[str, str], str], givers: dict[str, list[str]]) -> str:
    """The first validation error as a sentence that names the setting's source."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    message = what_is_wrong(error)
    if len(location) < 2:  # an error about several settings of a section
        if flag := _flag_named(message, location, sources):
            return f"--{message}" if message.startswith(f"{flag} ") else f"--{flag}: {message}"
        named = " with ".join(givers.get(location[0], [])) if location else ""
        return f"{named}: {message}" if named else message
    section, name = location[0], location[1]
    return f"{sources.get((section, name), f'{section}.{name}')}: {message}"


def _flag_named(message: str, location: list[str], sources: dict[tuple[str, str], str]) -> str:
    """The first setting in an error's message that a flag gave, in the error's section; empty if there is none."""
    flags = {name for (section, name), source in sources.items() if section in location and source == f"--{name}"}
    return next((word for word in re.findall(r"\w+", message) if word in flags), "")
