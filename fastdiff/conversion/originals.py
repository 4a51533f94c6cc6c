"""The commands with which improved-diffusion's and guided-diffusion's scripts use a network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff.config.family import FAMILIES
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.models.settings import BackboneSettings, SuperResSettings, UNetSettings

_CLASSES = 1000  # NUM_CLASSES of both programs
_CLASSIFIER_FLAGS = {
    *("classifier_width", "classifier_depth", "classifier_attention_resolutions", "classifier_pool"),
    *("classifier_use_scale_shift_norm", "classifier_resblock_updown"),
}
_IMPROVED, _GUIDED = "improved-diffusion", "guided-diffusion"
# Flags that both programs have, and those of one.
_COMMON = {
    *("num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "attention_resolutions", "dropout"),
    *("learn_sigma", "class_cond", "use_scale_shift_norm", "use_checkpoint", "diffusion_steps", "noise_schedule"),
    *("timestep_respacing", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas", "use_kl"),
}
_FLAGS = {
    _IMPROVED: {*_COMMON, "sigma_small"},
    _GUIDED: {*_COMMON, "num_head_channels", "resblock_updown", "use_new_attention_order"},
}
# (program, whether it enlarges images) → size of the images → channel_mult.
_DEEP = (1, 1, 2, 2, 4, 4)
_MULT: dict[tuple[str, bool], dict[int, tuple[float, ...]]] = {
    (_IMPROVED, False): {256: _DEEP, 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
    (_IMPROVED, True): {256: _DEEP, 64: (1, 2, 3, 4)},
    (_GUIDED, False): {512: (0.5, 1, 1, 2, 2, 4, 4), 256: _DEEP, 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)},
    (_GUIDED, True): {512: _DEEP, 256: _DEEP, 64: (1, 2, 3, 4)},
}


def program_of(settings: BackboneSettings | ClassifierSettings) -> str:
    """The program whose scripts build the network: improved-diffusion where it can, else guided-diffusion."""
    if isinstance(settings, ClassifierSettings):
        return _GUIDED
    newer = settings.resblock_updown or settings.use_new_attention_order or settings.num_head_channels != -1
    return _GUIDED if newer or not _has_mult(settings, _IMPROVED) else _IMPROVED


def _has_mult(settings: BackboneSettings, program: str) -> bool:
    """Whether the program has the network's channel_mult for images of its size."""
    sizes = _MULT[program, isinstance(settings, SuperResSettings)]
    return sizes.get(max(settings.size_hw)) == settings.level_mult


def command_of(settings: BackboneSettings | ClassifierSettings, diffusion: DiffusionSettings, file: Path) -> str:
    """The command of the original's script that draws with the bare file.

    A classifier guides another network, whose flags are left to the user.
    """
    if isinstance(settings, ClassifierSettings):
        now, default = (each.model_dump(mode="json") for each in (settings, ClassifierSettings()))
        flags = {name: now[name] for name in sorted(_CLASSIFIER_FLAGS) if now[name] != default[name]}
        given = ["--classifier_path", str(file), "--model_path", "MODEL.pt", "MODEL_FLAGS"]
        return shlex.join(["python", "scripts/classifier_sample.py", *given, *_words(flags)])
    program, super_res = program_of(settings), isinstance(settings, SuperResSettings)
    values = {**settings.model_dump(mode="json"), **diffusion.model_dump(mode="json")}
    sizes = ("large_size", "small_size") if super_res else ("image_size",)
    flags = {name: values[name] for name in sizes}
    defaults = _defaults(program)
    flags |= {name: value for name, value in values.items() if name in _FLAGS[program] and value != defaults[name]}
    if super_res:  # whose scripts have fewer flags (see `notes_on`)
        flags = {name: value for name, value in flags.items() if name not in ("use_new_attention_order", "sigma_small")}
    elif not _has_mult(settings, program):
        flags["channel_mult"] = _shown(settings)
    inputs = ["--base_samples", "FILE.npz"] if super_res else []
    script = "super_res_sample.py" if super_res else "image_sample.py"
    return shlex.join(["python", f"scripts/{script}", "--model_path", str(file), *inputs, *_words(flags)])


def _defaults(program: str) -> dict[str, Any]:
    """The program's defaults: ours, which are improved-diffusion's, and those of its family."""
    family = FAMILIES["guided" if program == _GUIDED else "improved"]
    sections = {"model": UNetSettings(), "diffusion": DiffusionSettings()}
    return {
        name: value
        for section, settings in sections.items()
        for name, value in {**settings.model_dump(mode="json"), **family.get(section, {})}.items()
    }


def _words(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _notes_on_classifier(settings: ClassifierSettings) -> Iterator[str]:
    if settings.num_classes != _CLASSES:
        yield f"its classifiers have {_CLASSES} classes: {settings.num_classes} must be in its create_classifier"
    if settings.in_channels != 3:
        yield f"its scripts are for images of 3 channels, and this classifier sees {settings.in_channels}"
    if len(set(settings.size_hw)) > 1:
        yield "its scripts draw square images only"
    if _MULT[_GUIDED, False].get(max(settings.size_hw)) != settings.backbone.level_mult:
        yield f"no flag says channel_mult {_shown(settings.backbone)}: give it in its create_classifier"


def _shown(settings: BackboneSettings) -> str:
    return ",".join(f"{mult:g}" for mult in settings.level_mult)


def notes_on(settings: BackboneSettings | ClassifierSettings, diffusion: DiffusionSettings) -> Iterator[str]:
    """Yield what the program's flags can't say, and what in it must be changed for this network."""
    if isinstance(settings, ClassifierSettings):
        yield from _notes_on_classifier(settings)
        return
    program, super_res = program_of(settings), isinstance(settings, SuperResSettings)
    if settings.class_cond and settings.num_labels != _CLASSES:
        null = ", of which the last is the null class" if settings.null_class else ""
        yield f"NUM_CLASSES in its script_util.py must be {settings.num_labels}{null}"
    if settings.in_channels != 3:
        yield f"its scripts are for images of 3 channels, and this network has {settings.in_channels}"
    if len(set(settings.size_hw)) > 1:
        yield "its scripts draw square images only"
    whole = all(mult == int(mult) for mult in settings.level_mult)
    if not _has_mult(settings, program) and (super_res or not whole):
        yield f"no flag says channel_mult {_shown(settings)}: give it in its script_util.py"
    if super_res and settings.use_new_attention_order:
        yield "no flag of super_res_sample.py says use_new_attention_order: give it in its script_util.py"
    if program == _GUIDED and settings.stem_channels != settings.level_channels[0]:
        yield "its first convolution has the width of the first level, so that it can't load this network"
    if diffusion.sigma_small and (super_res or program == _GUIDED):
        yield "no flag says sigma_small: give it in its script_util.py"
