"""Presets: the settings of the checkpoints that improved-diffusion and guided-diffusion released, and their download.

A preset consists of the sections model and diffusion of a file in configs/, which also trains that network. It can be
found by the name of the configuration and by that of the released file, which are the same for guided-diffusion's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fastdiff
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, blaming, did_you_mean
from fastdiff.models import weights
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.models.settings import SuperResSettings, UNetSettings
from fastdiff.runtime.download import download as download_file
from fastdiff.runtime.machine import cache_folder
from fastdiff.settings import Settings

# Family → the folder of its released files.
_SOURCES = {
    "improved": "https://openaipublic.blob.core.windows.net/diffusion/march-2021",
    "guided": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021",
}
# Configuration → stem of the released file (README of improved-diffusion, "Models and Hyperparameters").
_IMPROVED = {
    "imagenet64_uncond": "imagenet64_uncond_100M_1500K",
    "imagenet64_uncond_vlb": "imagenet64_uncond_vlb_100M_1500K",
    "imagenet64_270M": "imagenet64_cond_270M_250K",
    "cifar10_uncond": "cifar10_uncond_50M_500K",
    "cifar10_uncond_vlb": "cifar10_uncond_vlb_50M_500K",
    "upsample_256": "upsample_cond_500K",
    "lsun_bedroom_lr1e-4": "lsun_uncond_100M_1200K_bs128",
    "lsun_bedroom_lr2e-5": "lsun_uncond_100M_2400K_bs64",
    "baseline": "",
}
# Names of released files and of configurations (README of guided-diffusion, "Download pre-trained models").
_GUIDED = (
    "64x64_diffusion",
    "128x128_diffusion",
    "256x256_diffusion",
    "256x256_diffusion_uncond",
    "512x512_diffusion",
    "64_256_upsampler",
    "128_512_upsampler",
    "lsun_bedroom",
    "lsun_cat",
    "lsun_horse",
    "lsun_horse_nodropout",
    "64x64_classifier",
    "128x128_classifier",
    "256x256_classifier",
    "512x512_classifier",
)
RELEASED = {**_IMPROVED, **{name: name for name in _GUIDED}}
"""Configuration → stem of the released file, empty for one that was not released."""


_SETTINGS: dict[str, type[Settings]] = {
    "unet": UNetSettings,
    "super_res": SuperResSettings,
    "classifier": ClassifierSettings,
}


@dataclass(frozen=True)
class Preset:
    """A published model. `model` and `diffusion` are complete sections, including defaults, as in JSON."""

    name: str
    released: str  # stem of the released file, or empty
    url: str
    kind: Literal["unet", "super_res", "classifier"]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    family: str = "improved"

    @property
    def layer(self) -> dict[str, dict[str, Any]]:
        """The sections of settings, as a JSON file would hold them."""
        return {"model": dict(self.model), "diffusion": dict(self.diffusion)}


def configs() -> Path:
    """The folder configs/, inside an installed package or next to the package in a checkout."""
    return next(folder for place in fastdiff.__path__ if (folder := Path(place) / "configs").is_dir())


def _read(name: str, released: str) -> Preset:
    content = json.loads((configs() / f"{name}.json").read_text())
    kind: Literal["unet", "super_res", "classifier"] = "super_res" if "large_size" in content["model"] else "unet"
    if "classifier_depth" in content["model"]:
        kind = "classifier"
    family = "guided" if name in _GUIDED else "improved"
    model = _SETTINGS[kind].model_validate(content["model"])
    return Preset(
        name=name,
        released=released,
        url=f"{_SOURCES[family]}/{released}.pt" if released else "",
        kind=kind,
        model=model.model_dump(mode="json"),
        diffusion=DiffusionSettings.model_validate(content["diffusion"]).model_dump(mode="json"),
        family=family,
    )


_presets = [_read(name, released) for name, released in RELEASED.items()]
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _presets} | {
    preset.released: preset for preset in _presets if preset.released
}
"""All presets, each by both of its names."""


def find_preset(name: str, flag: str = "--preset") -> Preset:
    """The preset with that name. Raises UserError if there is none."""
    if name not in PRESETS:
        near = did_you_mean(name, PRESETS)
        raise UserError(f"{flag}: {name} is not a preset{near}; there are {', '.join(RELEASED)}")
    return PRESETS[name]


def config_file(given: str) -> str:
    """The path of the JSON file that --config names: a file, or a configuration of the folder configs/ by its name.

    Raises UserError for a name of neither.
    """
    if Path(given).parts != (given,) or Path(given).suffix or (os.path.exists(given) and not os.path.isdir(given)):
        return given
    files = {file.stem: file for file in sorted(configs().glob("*.json"))}
    if given not in files and os.path.isdir(given):
        return given  # the reader says that a folder is no JSON file
    if given not in files:
        near = did_you_mean(given, files) or f"; there are {', '.join(files)}"
        raise UserError(f"{given} is neither a file nor the name of a configuration{near}")
    return str(files[given])


def is_preset(name: str) -> bool:
    """Whether a preset has that name."""
    return name in PRESETS


def preset_for_file(path: str | Path) -> Preset | None:
    """The preset whose released file has this file's name, in any folder."""
    stem = Path(path).stem
    return next((preset for preset in PRESETS.values() if preset.released and preset.released == stem), None)


def download(preset: Preset, folder: Path | None = None, progress: bool = True, flag: str = "--preset") -> Path:
    """Return the path of the released checkpoint; downloads it first if it is missing.

    `folder` defaults to ~/.cache/fastdiff/checkpoints. Only one process at a time downloads into it. Raises UserError
    if no checkpoint was released or the download fails.
    """
    if not preset.released:
        raise UserError(f"{flag} {preset.name}: no checkpoint of it was released; name one with --model_path")
    file = (folder or cache_folder() / "checkpoints") / f"{preset.released}.pt"
    with blaming(f"{flag} {preset.name}"):
        return download_file(
            preset.url,
            file,
            check=weights.read_state_dict,
            advice="fetch it by other means and name the file with --model_path",
            progress=progress,
        )
