"""Describes checkpoints, the folders of steps and runs that hold them, and configurations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastdiff.config.checkpoint import Checkpoint, open_checkpoint
from fastdiff.config.classifier import classifier_settings_of
from fastdiff.config.family import FAMILIES, known_family
from fastdiff.config.load import describe
from fastdiff.config.presets import configs, preset_for_file
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.errors import UserError, first_line, quoted
from fastdiff.inspection.description import Description, command, differing
from fastdiff.models import BackboneSettings, weights
from fastdiff.models.classifier import build_network
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.runtime.file_kinds import WEIGHTS
from fastdiff.runtime.files import files_in, read_json
from fastdiff.settings import Settings, merge, validated
from fastdiff.training.checkpoints.best import read_best
from fastdiff.training.checkpoints.folder import list_checkpoints, step_of
from fastdiff.training.checkpoints.manifest import MANIFEST, find_damage
from fastdiff.training.checkpoints.resume import read_status


@dataclass(frozen=True)
class Kind:
    """A kind of network, which checkpoints and config.json name by a word."""

    name: str
    config: type[Config]
    """The sections of its runs."""
    train: str
    """The command that trains it."""
    use: Callable[[Path], str]
    """Returns the command that uses a checkpoint at a path."""
    mark: str = ""
    """How the name of a setting begins that only its section model has, by which a configuration is recognised."""

    def section(self, name: str, values: dict[str, Any], file: Path) -> Settings:
        """The settings of a section of its runs, which a file holds. Raises UserError for invalid ones."""
        try:
            return validated(self._section_class(name), values)
        except UserError as error:
            raise UserError(f"{file}: {name}.{error}") from None

    def known(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Those of the values that are settings of a section."""
        return {key: value for key, value in values.items() if key in self._section_class(name).model_fields}

    def _section_class(self, name: str) -> type[Settings]:
        annotation = self.config.model_fields[name].annotation
        assert isinstance(annotation, type)
        return annotation


KINDS = {
    "unet": Kind(
        "UNet",
        Config,
        "train",
        lambda path: command("sample", model_path=path, num_samples=16, solver="dpmpp_2m_sde", steps=20),
    ),
    "super_res": Kind(
        "super-resolution UNet",
        SuperResConfig,
        "super-res-train",
        lambda path: command("super-res-sample", model_path=path, base_samples="SMALL_IMAGES"),
        mark="large_size",
    ),
    "classifier": Kind(
        "classifier",
        ClassifierConfig,
        "classifier-train",
        lambda path: command("sample", model_path="MODEL", num_samples=16, classifier_path=path, classifier_scale=1),
        mark="classifier_",
    ),
}
SECTIONS = ("model", "diffusion", "data", "train")
"""The sections of a run."""
_MOST_BLOCKS = 10_000
"""Residual blocks of a network beyond which settings are damaged; building them would take minutes."""
_SHAPES = "the shapes of the weights"


def describe_checkpoint(place: Path) -> Description:
    """A file of weights, or a step's folder. Raises UserError for one that can't be read or used."""
    checkpoint = open_checkpoint(str(place))
    file, state, info = checkpoint.file, checkpoint.state, checkpoint.info
    kind = _kind(checkpoint.kind, file)
    found = Description(place, f"checkpoint of a {kind.name}")
    if info:
        origin = "the file"
        found.settings = {"model": kind.section("model", info["model"], file)}
        found.settings["diffusion"] = kind.section("diffusion", info["diffusion"], file)
    else:
        origin, found.settings = _settings_of_bare_file(checkpoint)
    step, rate = weights.step_and_rate(file)
    provenance = info.get("provenance") or {}
    found.facts = {
        "converted_from": provenance.get("file", ""),
        "weights": "" if step is None else f"average of rate {rate}" if rate else "model",
        "step": provenance.get("step") if step is None else step,
        "parameters": sum(value.numel() for value in state.values()),
        "dtype": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
        **_about_images(found.settings["model"], checkpoint.class_names),
        "bytes": file.stat().st_size,
        "settings_from": origin,
    }
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        found.notes.append("some weights are not finite: that run had diverged; take an earlier checkpoint")
    if place != file:
        files = sorted(name for name in files_in(place) if name.endswith(WEIGHTS))
        found.kind = f"checkpoint folder of a {kind.name}"
        found.facts |= {"files": files, "bytes": sum((place / name).stat().st_size for name in files)}
        if (place / MANIFEST).is_file() and (damage := find_damage(place)):
            found.notes.append(f"the folder is damaged: {damage}")
    found.next = kind.use(place)
    return found


def _kind(word: Any, file: Path) -> Kind:
    if not isinstance(word, str) or word not in KINDS:
        raise UserError(f"{file} is of the kind {quoted(word)}, which info doesn't know; it knows {', '.join(KINDS)}")
    return KINDS[word]


def _settings_of_bare_file(checkpoint: Checkpoint) -> tuple[str, dict[str, Settings]]:
    """Where the settings of another program's file come from, and its sections."""
    preset = preset_for_file(checkpoint.file)
    named = preset is not None and preset.kind == checkpoint.kind
    origin = f"the preset {preset.name}, by the file's name" if preset and named else _SHAPES
    if checkpoint.kind == "classifier":
        layer = classifier_settings_of(checkpoint)[1]
        model = validated(ClassifierSettings, layer["model"])
        weights.check_fits(model, checkpoint.state, checkpoint.file)
        return origin, {"model": model}
    config = describe(checkpoint)
    weights.check_fits(config.model, checkpoint.state, checkpoint.file)
    return origin, {"model": config.model, "diffusion": config.diffusion}


def _parameters(model: Settings, file: Path) -> int:
    """The number of parameters of a network with these settings, which a file holds."""
    assert isinstance(model, BackboneSettings | ClassifierSettings)
    backbone = model.backbone if isinstance(model, ClassifierSettings) else model
    if backbone.num_res_blocks * len(backbone.level_mult) > _MOST_BLOCKS:
        raise UserError(f"{file}: no network has {backbone.num_res_blocks} residual blocks per level")
    try:
        with torch.device("meta"):
            return sum(value.numel() for value in build_network(model).parameters())
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{file}: no network of its settings can be built ({first_line(error)})") from None


def _about_images(model: Settings, class_names: list[str]) -> dict[str, Any]:
    """The size of a network's images, and its classes."""
    assert isinstance(model, BackboneSettings | ClassifierSettings)
    shown = model.model_dump(mode="json")
    conditional = shown.get("class_cond", True) and "num_classes" in shown
    return {
        "images": "x".join(map(str, (*model.size_hw, model.in_channels))),
        "enlarged_from": shown.get("small_size"),
        "classes": (len(class_names) or shown["num_classes"]) if conditional else None,
        "class_names": class_names,
    }


# --- runs ---


def describe_run(folder: Path) -> Description:
    """The folder of a run: its state, its checkpoints, and the newest of them."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no settings")
    kind = _kind(content.get("kind", "unet"), file)
    sections = {name: values for name in SECTIONS if isinstance(values := content.get(name), dict)}
    settings = {name: kind.section(name, values, file) for name, values in sections.items()}
    status, best = read_status(folder), read_best(folder / "checkpoints")
    found = Description(folder, f"run of a {kind.name}", settings=settings)
    newest: dict[str, Any] = {}
    if checkpoints:
        try:
            newest = describe_checkpoint(checkpoints[-1]).facts
        except UserError as error:
            found.notes.append(f"the newest checkpoint can't be read: {error}")
    model = settings.get("model")
    if "parameters" not in newest and model is not None:
        newest["parameters"] = _parameters(model, file)
    about = {name: newest.get(name) for name in ("parameters", "images", "enlarged_from", "classes", "class_names")}
    found.facts = {
        "state": status.get("state", "unknown: there is no status.json"),
        "step": status.get("step"),
        "reason": status.get("reason"),
        "last_written": _last_written(folder),
        "process": status.get("process") if status.get("state") == "running" else None,
        **(about if checkpoints or model is None else {**about, **_about_images(model, [])}),
        "checkpoints": [step_of(checkpoint) for checkpoint in checkpoints],
        "best": {name: best[name] for name in ("metric", "value", "step", "ema_rate") if name in best},
    }
    if status.get("state") == "running":
        found.notes.append("if that process has ended, the run was killed, and the command that began it resumes it")
    if status.get("state") not in ("done", "running") and settings:
        found.next = _resume(kind, folder, settings, content)
    elif checkpoints:
        found.next = kind.use(folder)
    return found


def _last_written(folder: Path) -> str:
    """The time at which the run last wrote to its log or state, such as 2026-01-31 12:00:00."""
    times = [file.stat().st_mtime for name in ("log.txt", "status.json") if (file := folder / name).is_file()]
    return datetime.fromtimestamp(max(times)).isoformat(" ", "seconds") if times else ""


def _resume(kind: Kind, folder: Path, settings: dict[str, Settings], content: dict[str, Any]) -> str:
    """The command that goes on with a run; empty where flags can't say all that its config.json says."""
    if content.get("deepspeed"):
        return ""
    flags: dict[str, Any] = {}
    for section in settings.values():
        flags |= differing(section)
    return command(kind.train, **{**flags, "run_dir": folder, "name": ""})


def describe_runs(folder: Path, runs: list[str]) -> Description:
    """A folder of runs: the state and step of each."""
    found = Description(folder, "folder of runs", {"runs": {}}, next=command("info", folder / runs[0]))
    for name in runs:
        status: dict[str, Any] = {}
        with suppress(UserError):
            status = read_status(folder / name)
        found.facts["runs"][name] = {"state": status.get("state", "unknown"), "step": status.get("step", "unknown")}
    return found


# --- configurations ---


def describe_config(file: Path, content: dict[str, Any]) -> Description:
    """A JSON file with settings. Raises UserError for invalid ones."""
    sections = {name: values for name, values in content.items() if name not in ("family", "deepspeed")}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(f"{file}: section {section} must be a JSON object, not {quoted(values)}")
    marked = [
        kind
        for kind in KINDS.values()
        if kind.mark and any(key.startswith(kind.mark) for key in sections.get("model", {}))
    ]
    kind = marked[0] if marked else KINDS["unet"]
    only = "guided" if kind is KINDS["classifier"] else "improved"  # the one family that has classifiers
    family = known_family(content.get("family", only), f"{file}: family")
    found = Description(file, f"configuration of a {kind.name}")
    defaults = {name: kind.known(name, values) for name, values in FAMILIES[family].items()}
    for name, values in merge(defaults, sections).items():
        found.settings[name] = kind.section(name, values, file)
    model = found.settings.get("model") or kind.section("model", {}, file)
    found.facts = {
        "parameters": _parameters(model, file),
        **_about_images(model, []),
    }
    data = found.settings.get("data")
    has_data = data is not None and "data_dir" in differing(data)
    named = file.stem if file.parent == configs() else file
    found.next = command(kind.train, config=named, data_dir="" if has_data else "IMAGES")
    return found
