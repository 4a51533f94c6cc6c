"""The content of checkpoints: reading our own and improved-diffusion's as a training state, and AdamW's state_dict."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models import weights
from fastdiff.models.foreign import describe_folder
from fastdiff.runtime.untrusted import is_there
from fastdiff.training.checkpoints.folder import newest_whole
from fastdiff.training.checkpoints.manifest import MANIFEST, find_damage
from fastdiff.training.metrics import LossMeter

LABELS = "label_emb.weight"
_STEP = re.compile(r"(?:ema_[0-9.]+_|model|opt)(\d+)\.pt$")


@dataclass
class Snapshot:
    """A training state on the CPU, with tensors by parameter name. The moments are empty where they are unknown.

    info   the metadata of the model's file (`weights.info_of`); empty for a file of another program
    state  the content of state.pt
    notes  sentences for the log
    """

    step: int
    model: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_loader(value: Any) -> bool:
    counts = isinstance(value, dict) and all(_is_count(value.get(name)) for name in ("position", "num_images"))
    return counts and isinstance(value.get("fingerprint"), str)


def _are_numbers(value: Any) -> bool:
    return all(isinstance(number, (int, float)) for number in value)


_COUNTS = (
    *("step", "updates", "skipped_steps", "bad_streak", "samples", "seed", "stream_seed", "rollbacks"),
    *("batch_size", "microbatch", "world_size", "threads"),
)
_STATE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS, _is_count),
    "channels_last": lambda value: isinstance(value, bool),
    "settings": lambda value: isinstance(value, dict),
    "loader": _is_loader,
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "timestep_sampler": lambda value: isinstance(value, dict),
    "loss_scaler": lambda value: isinstance(value, dict) and _are_numbers(value.values()),
    **dict.fromkeys(
        ("meter", "validation"), lambda value: isinstance(value, dict) and LossMeter.fits(value.get("sums"))
    ),
    "grad_norms": lambda value: isinstance(value, list) and _are_numbers(value),
}
"""Entry of state.pt → check of its type. Every entry may be missing."""


def read_snapshot(place: Path, rates: list[str]) -> Snapshot:
    """Read a checkpoint: a step folder, a run's folder, or a model or EMA .pt file and the files beside it.

    `notes` says which files a bare .pt lacks (averages, moments) and which newer checkpoints are damaged. Raises
    UserError where nothing can be read.
    """
    file, notes = _find_model(place)
    match = _STEP.search(file.name)
    step = match[1] if match else ""
    model = weights.read_state_dict(file)
    snapshot = Snapshot(step=int(step or 0), model=dict(model), info=weights.info_of(model), notes=notes)
    snapshot.state = _read_state(file.with_name("state.pt"))
    if not file.name.startswith("model"):
        snapshot.step, snapshot.state = 0, {}
        notes.append(f"{file.name} is used as initial weights: a new run starts from it, at step 0")
        return snapshot
    for rate in rates:
        average = file.with_name(f"ema_{rate}_{step}.pt")
        if step and average.is_file():
            snapshot.ema[rate] = dict(weights.read_state_dict(average))
            if _shapes(snapshot.ema[rate]) != _shapes(snapshot.model):
                raise UserError(f"{average} is of another model than {file.name} beside it")
        else:
            notes.append(f"no ema_{rate} beside {file.name}: that average starts as a copy of the weights")
    optimizer = file.with_name(f"opt{step}.pt")
    if step and optimizer.is_file():
        try:
            _read_moments(snapshot, weights.read(optimizer), optimizer)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"{optimizer} holds no moments of Adam (exp_avg, exp_avg_sq)") from error
    else:
        notes.append(f"no optimiser state beside {file.name}: its moments start at zero")
    return snapshot


def _find_model(place: Path) -> tuple[Path, list[str]]:
    """The model's file in a step folder or a run's folder, and notes on newer checkpoints that are damaged."""
    notes: list[str] = []
    if not is_there(place, "dir"):
        return place, notes
    folder = place
    if not list(place.glob("*.pt")):
        for checkpoints in (place / "checkpoints", place):
            newest, notes = newest_whole(checkpoints)
            if newest:
                folder = newest
                break
    elif (place / MANIFEST).is_file() and (wrong := find_damage(place)):
        raise UserError(f"{place} is damaged ({wrong}); take another checkpoint")
    models = sorted(folder.glob("model*.pt"))
    if not models:
        raise UserError(f"{place} holds no modelNNNNNN.pt{describe_folder(place)}")
    return models[-1], notes


def _read_state(file: Path) -> dict[str, Any]:
    """The content of state.pt with its types checked; empty where there is no such file."""
    state = weights.read(file) if file.is_file() else {}
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no training state; take another checkpoint")
    for name, value in state.items():
        if not _STATE.get(name, lambda _: True)(value):
            raise UserError(
                f"{name} in {file} has another type or shape than in a training state; take another checkpoint"
            )
    return state


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _read_moments(snapshot: Snapshot, content: Any, file: Path) -> None:
    """Add Adam's moments to a snapshot, from a state_dict of torch.optim.AdamW or improved-diffusion's fp16 runs.

    Raises KeyError and the like where it is neither.
    """
    moments = content.get("state") if isinstance(content, dict) else None
    moments = moments if isinstance(moments, dict) else {}
    shapes = _shapes(snapshot.model)
    if list(moments) == [0] and len(shapes) > 1:
        moments = _unflattened(moments[0], list(shapes.values()))
    if sorted(moments) != list(range(len(shapes))):
        raise UserError(f"{file} holds moments of {len(moments)} tensors, the model has {len(shapes)}")
    for i, (name, shape) in enumerate(shapes.items()):
        _, exp_avg, exp_avg_sq = (moments[i][key] for key in ("step", "exp_avg", "exp_avg_sq"))
        if exp_avg.shape != shape or exp_avg_sq.shape != shape:
            raise UserError(f"{file} holds moments of another model ({name} differs in shape)")
        snapshot.exp_avg[name], snapshot.exp_avg_sq[name] = exp_avg, exp_avg_sq
    snapshot.state.setdefault("updates", int(moments[0]["step"]))


def _unflattened(flat: dict[str, Any], shapes: list[torch.Size]) -> dict[int, dict[str, Any]]:
    """Split the moments of improved-diffusion's fp16 runs, which belong to one flat master tensor, by parameter."""
    sizes = [shape.numel() for shape in shapes]
    if flat["exp_avg"].numel() != sum(sizes):
        return {0: flat}
    pairs = zip(*(flat[key].flatten().split(sizes) for key in ("exp_avg", "exp_avg_sq")), shapes, strict=True)
    return {
        i: {"step": flat["step"], "exp_avg": m.view(shape), "exp_avg_sq": v.view(shape)}
        for i, (m, v, shape) in enumerate(pairs)
    }


def adam_state_dict(
    exp_avg: dict[str, Tensor], exp_avg_sq: dict[str, Tensor], updates: int, group: dict[str, Any]
) -> dict[str, Any]:
    """What torch.optim.AdamW.state_dict() returns, with parameters numbered in the model's order.

    exp_avg and exp_avg_sq are the moments by parameter name, `group` the settings of the one parameter group.
    """
    state = {
        i: {"step": torch.tensor(float(updates)), "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
        for i, name in enumerate(exp_avg)
    }
    return {"state": state, "param_groups": [{**group, "params": list(range(len(state)))}]}


def add_null_class(snapshot: Snapshot) -> None:
    """Append a row of zeros for the null class to the label embedding: in weights, averages and moments."""
    for state in (snapshot.model, *snapshot.ema.values(), snapshot.exp_avg, snapshot.exp_avg_sq):
        if state:
            state[LABELS] = weights.add_null_class(state[LABELS])
    snapshot.notes.append("the checkpoint has no null class: its row of the label embedding starts at zero")
