"""Finds the weights of this network in what other programs save, or says what they saved instead.

Programs wrap a state_dict in dictionaries ({"state_dict": ...}, {"model": ..., "ema": ...}) and its keys in prefixes
(`module.` of DDP, `_orig_mod.` of torch.compile, the attribute of a Lightning module). Weights are taken out of these
only if there is one network, or one average of several: a wrong guess would draw images of the wrong network.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.errors import UserError, one_line, quoted
from fastdiff.runtime.file_kinds import OTHER_PROGRAM, WEIGHTS
from fastdiff.runtime.files import files_in

FIRST = "input_blocks.0.0.weight"
"""The key by which this network is recognised."""
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names that torch.compile, FSDP and activation checkpointing insert anywhere in a key."""
_AVERAGE = re.compile(r"ema|averag|shadow", re.IGNORECASE)
_DEPTH = 4
_SHARD = re.compile(r"(mp_rank_\d+|zero_pp_rank_\d+\w*|bf16_zero\w*)_(model|optim)_states\.pt$")
_GATHER = (
    "gather its weights with the zero_to_fp32.py that DeepSpeed puts beside its step folders (python zero_to_fp32.py . "
    "OUT) and name the pytorch_model.bin that it makes"
)
# Keys → the program whose network has them.
_OTHERS = (
    (r"(^|\.)(first_stage_model|cond_stage_model)\.", "a latent diffusion model, such as Stable Diffusion"),
    (r"lora_(up|down|A|B)\b", "a LoRA, which changes another network"),
    (r"(^|\.)(down_blocks\.\d|mid_block\.|conv_in\.)", "a network of diffusers"),
    (r"\.transformer_blocks\.\d|(^|\.)input_blocks\.\d+\.1\.proj_in\.", "a network of Stable Diffusion's kind"),
    (r"(^|\.)(map_layer0|(enc|dec)\.\d+x\d+_\w+)\.", "a network of EDM"),
    (r"(^|\.)blocks\.\d+\.adaLN_modulation\.", "a diffusion transformer"),
    (r"(^|\.)(downs|ups)\.\d+\.\d+\.", "a network of denoising-diffusion-pytorch"),
    (r"(^|\.)temb\.dense\.\d", "a network of the first DDPM and DDIM code"),
    (r"(^|\.)all_modules\.\d+\.", "a network of score_sde"),
)


class OtherFile(UserError):
    """A file that is recognised, and holds no weights of this network."""


class _Found(NamedTuple):
    """Weights of this network below some keys of the content, with a prefix before each name."""

    place: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]

    @property
    def label(self) -> str:
        return "".join(f"[{key!r}]" for key in self.place) + (f" under {self.prefix!r}" if self.prefix else "")


def network_weights(content: Any, path: Path) -> OrderedDict[str, Tensor]:
    """The state_dict of this network in the content of a file. Logs what was left out where that isn't obvious.

    A flat state_dict of an unknown network is returned as it is. Raises UserError for anything else.
    """
    _refuse_states(content, path)
    states = list(_states(content))
    keys = [key for _, state in states for key in state]
    if not keys:
        raise UserError(f"{path} holds no state_dict; give a model or ema .pt file")
    found = [each for place, state in states for each in _networks(place, state)]
    if other := _other_network(keys):
        raise OtherFile(f"{path} holds {other}; {OTHER_PROGRAM}")
    if not found:
        whole = states[0][1]
        if len(states) > 1 or states[0][0] or len(whole) < len(content):
            raise UserError(
                f"{path} holds no state_dict of improved-diffusion's network (no {FIRST}) but tensors such as "
                f"{', '.join(quoted(key) for key in keys[:3])}; give a file of its weights"
            )
        return whole if isinstance(whole, OrderedDict) else OrderedDict(whole)
    chosen = _choose(found, path)
    if chosen.prefix or chosen.place or len(chosen.state) < len(keys):
        _log_choice(chosen, found, keys, path)
    return _strip(chosen)


def check_name(path: Path) -> None:
    """Raise UserError for a file whose name says that it is a part of a DeepSpeed checkpoint."""
    if _SHARD.search(path.name):
        raise OtherFile(f"{path} is a part of a DeepSpeed checkpoint; {_GATHER}")


def describe_folder(folder: Path) -> str:
    """What a folder without checkpoints of ours is, and what to do, as the end of a message; empty if unknown."""
    names = files_in(folder)
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    if runs := sorted(name for name in names if (folder / name / "checkpoints").is_dir()):
        return f"; name one of its runs: {one_line(', '.join(runs[:3]))}{', ...' if len(runs) > 3 else ''}"
    diffusers = "model_index.json" in names or any(name.startswith("diffusion_pytorch_model.") for name in names)
    if diffusers or ("unet" in names and (folder / "unet" / "config.json").is_file()):
        return (
            "; it is a folder of diffusers: convert.py --to pt makes a checkpoint of it, if our network can express it"
        )
    if "zero_to_fp32.py" in names or any(_SHARD.search(name) for name in names) or _steps(folder, names):
        return f"; it is a DeepSpeed checkpoint: {_GATHER}"
    if "job.json" in names:
        return "; it is the folder of a sampling job, which holds images"
    if "saved_model.pb" in names or any(name.endswith(".index") for name in names):
        return f"; it is a TensorFlow checkpoint; {OTHER_PROGRAM}"
    if weights:
        more = ", ..." if len(weights) > 3 else ""
        return f"; name one of its files: {one_line(', '.join(weights[:3]))}{more}"
    return ""


def _steps(folder: Path, names: list[str]) -> bool:
    steps = [folder / name for name in names if re.fullmatch(r"global_step\d+", name)]
    return any(_SHARD.search(name) for step in steps if step.is_dir() for name in files_in(step))


def _refuse_states(content: Any, path: Path) -> None:
    """Raise UserError for the states of training that lie beside weights."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state_dict; give a model or ema .pt file")
    if content.keys() >= {"state", "param_groups"}:
        raise OtherFile(
            f"{path} holds no state_dict but an optimizer's state; give the model or ema .pt file beside it"
        )
    if content.keys() >= {"updates", "loader"}:
        raise OtherFile(f"{path} holds no state_dict but the state of a run; give the model or ema .pt file beside it")
    if "ds_version" in content or "ds_config" in content:
        raise OtherFile(f"{path} is a part of a DeepSpeed checkpoint; {_GATHER}")


def _states(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the tensors of each dictionary in the content, with the keys that lead to it."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, content if len(tensors) == len(content) else tensors
    if len(place) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict) and not value.keys() >= {"state", "param_groups"}:
                yield from _states(value, (*place, key))


def _networks(place: tuple[str, ...], state: dict[str, Tensor]) -> Iterator[_Found]:
    for key in state:
        name = _WRAPPERS.sub("", key)
        if name == FIRST or name.endswith(f".{FIRST}"):
            yield _Found(place, name.removesuffix(FIRST), state)


def _choose(found: list[_Found], path: Path) -> _Found:
    averages = [each for each in found if _AVERAGE.search(" ".join((*each.place, each.prefix)))]
    if len(found) == 1 or len(averages) == 1:
        return (averages or found)[0]
    names = ", ".join(each.label or "one without a prefix" for each in found[:4])
    raise UserError(f"{path} holds {len(found)} networks ({names}); save one of them alone and name that file")


def _strip(found: _Found) -> OrderedDict[str, Tensor]:
    """The weights without prefix and wrappers, and without other tensors where there is a prefix."""
    named = {_WRAPPERS.sub("", key): value for key, value in found.state.items()}
    if not found.prefix and named.keys() == found.state.keys() and isinstance(found.state, OrderedDict):
        return found.state
    state = OrderedDict(
        (name.removeprefix(found.prefix), value) for name, value in named.items() if name.startswith(found.prefix)
    )
    state._metadata = getattr(found.state, "_metadata", None)  # type: ignore[attr-defined]
    return state


def _log_choice(chosen: _Found, found: list[_Found], keys: list[str], path: Path) -> None:
    rest = len(keys) - sum(_WRAPPERS.sub("", key).startswith(chosen.prefix) for key in chosen.state)
    if rest:
        others = f", among {len(found)} networks" if len(found) > 1 else ""
        logging.getLogger(__name__).warning(
            "%s: the weights are those of %s%s; other tensors left out: %d",
            path,
            one_line(chosen.label or "the network without a prefix"),
            others,
            rest,
        )


def _other_network(keys: list[str]) -> str:
    return next((what for pattern, what in _OTHERS if any(re.search(pattern, key) for key in keys)), "")
