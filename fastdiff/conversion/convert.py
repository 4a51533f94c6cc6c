"""Converts a network: checks that nothing would be lost, and writes files, settings and the model card at once."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.config.checkpoint import Checkpoint, open_checkpoint, open_network
from fastdiff.config.presets import find_preset
from fastdiff.config.sections import Config
from fastdiff.conversion import network_files
from fastdiff.conversion.from_diffusers import is_diffusers_folder, open_diffusers
from fastdiff.conversion.model_card import PICTURE, Card
from fastdiff.conversion.originals import command_of, notes_on, program_of
from fastdiff.conversion.run_files import newest_grid, scores_of
from fastdiff.conversion.settings import ConvertSettings
from fastdiff.conversion.to_diffusers import PIPELINE, check_expressible, needs_pipeline
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, blaming, one_line
from fastdiff.models import BackboneSettings, SuperResSettings, weights
from fastdiff.models.classifier import build_network
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.runtime.caller import default_device
from fastdiff.runtime.file_kinds import WEIGHTS
from fastdiff.runtime.files import atomic_write, checksum, files_in, new_folder, write_text
from fastdiff.runtime.paths import expand_path
from fastdiff.runtime.untrusted import is_there
from fastdiff.sampling.labels import Labels
from fastdiff.sampling.pictures import CHANNELS, save_grid
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import SampleSettings

_ENDINGS = {"diffusers": "", "safetensors": ".safetensors", "openai": ".pt", "pt": ".pt"}
_WRITTEN = {
    *("README.md", PICTURE, "model.safetensors", "model.pt"),
    *("model_index.json", PIPELINE, "unet", "scheduler"),
}
"""All names in a folder that a conversion writes."""
_SOLVER, _STEPS = "dpmpp_2m_sde", 20  # as fastdiff.load draws


def open_source(argv: Sequence[str]) -> tuple[Checkpoint | None, str]:
    """What the flag model_path names, read, and the kind of its network, by which the flags of models differ.

    None where only a preset is named, or nothing. Raises UserError for what can't be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model_path", "--preset"):
        parser.add_argument(name, nargs="?", default="")
    given = parser.parse_known_args(argv)[0]
    if not given.model_path:
        return None, find_preset(given.preset).kind if given.preset else "unet"
    with blaming("--model_path"):
        path = Path(expand_path(given.model_path))
        diffusers = is_there(path, "dir") and is_diffusers_folder(path)
        source = open_diffusers(path) if diffusers else open_checkpoint(str(path))
    return source, source.kind


def check_target(settings: ConvertSettings) -> Path:
    """The path to write. Raises UserError where that may not be written."""
    if not settings.to:
        raise UserError(f"--to is missing: give one of {', '.join(_ENDINGS)}")
    if not settings.out:
        raise UserError(f"--out is missing: name what is to be written, as in --to {settings.to} NAME")
    with blaming("--out"):
        out = Path(os.path.normpath(settings.out))
        if out.name in ("", ".."):
            raise UserError(f"{settings.out} is no name of a new file or folder")
        ending = out.suffix.lower()
        if ending in WEIGHTS and ending != _ENDINGS[settings.to]:
            wanted = _ENDINGS[settings.to]
            what = f"a {wanted} file or a folder" if wanted else "a folder"
            raise UserError(f"{out} ends in {ending}, and --to {settings.to} writes {what}")
        if not os.path.lexists(out):
            return out
        if is_file_name(out) == is_there(out, "dir"):
            raise UserError(f"{out} is a {'folder' if is_file_name(out) else 'file'}; give another name")
        left = [] if is_file_name(out) else sorted(files_in(out))
        if (is_file_name(out) or left) and not settings.overwrite:
            raise UserError(f"{out} exists; give another name, or --overwrite True")
        if others := [name for name in left if name not in _WRITTEN]:
            raise UserError(f"{out} holds {one_line(others[0])}, which no conversion wrote; give another name")
    return out


def is_file_name(out: Path) -> bool:
    """Whether a name is one of a file of weights; others are those of folders."""
    return out.suffix.lower() in WEIGHTS


@dataclass(frozen=True)
class _Network:
    """A network to be written: its weights in the order of the modules, its settings, and the metadata of its file."""

    state: dict[str, Tensor]
    settings: BackboneSettings | ClassifierSettings
    diffusion: DiffusionSettings
    info: dict[str, Any]

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.state.values())


def convert(config: Config, source: Checkpoint) -> list[str]:
    """Write the network of a checkpoint as the section `convert` says; returns lines about it. Raises UserError."""
    settings = config.convert
    out = check_target(settings)
    network = _checked(config, source, out)
    notes: list[str] = []
    if settings.half:
        with blaming("--half"):
            state, note = network_files.rounded(network.state, source.file)
        network, notes = replace(network, state=state), [note]
    images = _draw(network, source, out, settings.grid_images) if settings.grid_images else None
    with network_files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if is_file_name(out):
            _save(out, network, settings.to)
        else:
            with new_folder(out) as folder:
                _save(folder, network, settings.to)
                picture = _save_picture(folder, images, source)
                card = Card(out, settings.to, network.settings, network.diffusion, network.info, network.state)
                write_text(folder / "README.md", card.text(scores_of(source), picture))
    return list(_summary(out, network, settings.to, notes))


def _checked(config: Config, source: Checkpoint, out: Path) -> _Network:
    """The network of the settings with the checkpoint's weights. Raises UserError if it can't be written."""
    with blaming("--model_path"):
        weights.check_fits(config.model, source.state, source.file)
        weights.check_values(source.state, source.file)
    with torch.device("meta"):
        names = list(build_network(config.model).state_dict())
    file, target = source.file.resolve(), out.resolve()
    if target == file or target in file.parents:
        raise UserError(f"--out: {out} is or holds the network that is converted; give another name")
    if config.convert.to == "diffusers":
        with blaming("--to diffusers"):
            if isinstance(config.model, ClassifierSettings):
                raise UserError("diffusers has no classifier of noised images; write it as safetensors, openai or pt")
            check_expressible(config.model, config.diffusion)
    sections = config.model_dump(mode="json", include={"model", "diffusion"})
    info = {"kind": source.kind, **sections, "class_names": source.class_names}
    info["provenance"] = source.info.get("provenance") or _provenance(source)
    return _Network({name: source.state[name] for name in names}, config.model, config.diffusion, info)


def _provenance(source: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint's weights come from. Files converted once more keep that of the first."""
    step, rate = weights.step_and_rate(source.file)
    known = {"file": source.file.name, "sha256": checksum(source.file), "step": step, "ema_rate": rate or None}
    return {**{name: value for name, value in known.items() if value is not None}, "fastdiff": fastdiff.__version__}


def _save(place: Path, network: _Network, to: str) -> None:
    """Write weights and settings to a file, or into an empty folder."""
    if to == "diffusers":
        assert isinstance(network.settings, BackboneSettings)
        network_files.save_diffusers(place, network.state, network.settings, network.diffusion, network.info)
        return
    file = place if is_file_name(place) else place / f"model{_ENDINGS[to]}"
    if to == "safetensors":
        network_files.save_safetensors(file, network.state, network.info)
    else:
        network_files.save_pt(file, network.state, network.info if to == "pt" else {})


def _draw(network: _Network, source: Checkpoint, out: Path, count: int) -> np.ndarray:
    """Draw images 0 to count - 1 [count, H, W, C] uint8 for the model card, of all classes in turn."""
    with blaming("--grid_images"):
        if is_file_name(out):
            raise UserError(f"the picture is for the model card, and {out} is a single file; name a folder")
        if network.settings.in_channels not in CHANNELS:
            raise UserError(f"images of {network.settings.in_channels} channels are no pictures; leave it out")
        if isinstance(network.settings, SuperResSettings):
            raise UserError("the network enlarges images, and none are given here; leave it out")
        if isinstance(network.settings, ClassifierSettings):
            raise UserError("a classifier draws nothing; leave it out")
        device, diffusion = default_device(), network.diffusion
        rounded = Checkpoint(source.file, weights.with_info(network.state, network.info))
        opened = open_network(network.settings, diffusion, rounded, "fp32", device)
        fast = not diffusion.timestep_respacing and diffusion.diffusion_steps > 2 * _STEPS
        settings = SampleSettings(solver=_SOLVER, steps=_STEPS) if fast else SampleSettings()
        labels = Labels(tuple(range(opened.known_classes))) if network.settings.class_cond else None
        return Sampler(opened, settings, device, labels=labels, count=count).draw(np.arange(count)).images


def _save_picture(folder: Path, images: np.ndarray | None, source: Checkpoint) -> str:
    """Write the picture of the model card, the images or the run's newest grid; returns what it is, empty for none."""
    if images is not None:
        save_grid(folder / PICTURE, images)
        return f"The first {len(images)} images of seed 0."
    if (grid := newest_grid(source.file)) is None:
        return ""
    with atomic_write(folder / PICTURE) as picture:
        picture.write(grid.read_bytes())
    return "Samples that were drawn during training."


def _summary(out: Path, network: _Network, to: str, notes: list[str]) -> Iterator[str]:
    """Yield what was written and how it is used."""
    files = [out] if is_file_name(out) else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in network.state.values()}
    kind = f"{network.parameters / 1e6:.1f} million parameters in {' and '.join(sorted(dtypes))}"
    yield f"{out}: {kind}, {size / 1e6:.1f} MB"
    if to == "openai":
        file = out if is_file_name(out) else out / "model.pt"
        command = command_of(network.settings, network.diffusion, file)
        yield f"{program_of(network.settings)} draws with it by: {command}"
        notes = [*notes, *notes_on(network.settings, network.diffusion)]
    if (
        isinstance(network.settings, BackboneSettings)
        and to == "diffusers"
        and (why := needs_pipeline(network.settings))
    ):
        notes = [*notes, f"DDPMPipeline does not suffice, because {why}: {PIPELINE} draws (see README.md in it)"]
    yield from (f"note: {note}" for note in notes)
    if not is_file_name(out):
        yield f"to publish it: hf upload NAME {shlex.quote(str(out))}"
