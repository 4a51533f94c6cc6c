"""Checkpoints as training states: reading them, ours and improved-diffusion's (`saving` writes them)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models import weights
from fastdiff.runtime.untrusted import is_there
from fastdiff.training.checkpoints import folder as checkpoint_files
from fastdiff.training.metrics import LossMeter

LABELS = "label_emb.weight"
_STEP = re.compile(r"(?:ema_[0-9.]+_|model|opt)(\d+)\.pt$")


@dataclass
class Snapshot:
    """A training state in memory, on the CPU: tensors by parameter name. Moments are empty where they are unknown."""

    step: int
    model: dict[str, Tensor]
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


def _numbers(value: Any) -> bool:
    return all(isinstance(number, (int, float)) for number in value)


_COUNTS = (
    *("step", "updates", "skipped_steps", "bad_streak", "samples", "seed", "stream_seed", "rollbacks"),
    *("batch_size", "microbatch", "world_size", "threads"),
)
_STATE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS, _is_count),
    "settings": lambda value: isinstance(value, dict),
    "loader": _is_loader,
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "timestep_sampler": lambda value: isinstance(value, dict),
    "loss_scaler": lambda value: isinstance(value, dict) and _numbers(value.values()),
    "meter": lambda value: isinstance(value, dict) and LossMeter.fits(value.get("sums")),
    "grad_norms": lambda value: isinstance(value, list) and _numbers(value),
}
"""What each entry of state.pt must be, where it is there."""


def read(place: Path, rates: list[str]) -> Snapshot:
    """A checkpoint: one of our step folders, or a model or ema .pt file with what lies beside it.

    What a bare .pt lacks (averages, moments), and which newer checkpoints are damaged, is noted in `notes`, in
    sentences for the log. Raises UserError where nothing can be read.
    """
    file, notes = _model_file(place)
    state = weights.read_state_dict(file)
    match = _STEP.search(file.name)
    step = int(match[1]) if match else 0
    snapshot = Snapshot(step=step, model=dict(state), notes=notes)
    rest = file.parent / "state.pt"
    snapshot.state = weights.read(rest) if rest.is_file() else {}
    if not isinstance(snapshot.state, dict):
        raise UserError(f"{rest} holds no training state; take another checkpoint")
    for name, value in snapshot.state.items():
        if not _STATE.get(name, lambda _: True)(value):
            raise UserError(f"{name} in {rest} is not what a training state has; take another checkpoint")
    if not file.name.startswith("model"):
        snapshot.step, snapshot.state = 0, {}
        snapshot.notes.append(f"{file.name} is taken as first weights: a new run starts from it, at step 0")
        return snapshot
    for rate in rates:
        average = file.with_name(f"ema_{rate}_{match[1]}.pt") if match else file
        if match and average.is_file():
            snapshot.ema[rate] = dict(weights.read_state_dict(average))
            if _shapes(snapshot.ema[rate]) != _shapes(snapshot.model):
                raise UserError(f"{average} is of another model than {file.name} beside it")
        else:
            snapshot.notes.append(f"no ema_{rate} beside {file.name}: that average starts as a copy of the weights")
    optimizer = file.with_name(f"opt{match[1]}.pt") if match else file
    if match and optimizer.is_file():
        try:
            _read_optimizer(snapshot, weights.read(optimizer), list(state), optimizer)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"{optimizer} holds no moments of Adam (exp_avg, exp_avg_sq)") from error
    else:
        snapshot.notes.append(f"no optimiser state beside {file.name}: its moments start at zero")
    return snapshot


def _model_file(place: Path) -> tuple[Path, list[str]]:
    """The model's file that a path means, and sentences about newer checkpoints that are damaged."""
    notes: list[str] = []
    if not is_there(place, "dir"):
        return place, notes
    folder = place
    if not list(place.glob("*.pt")):
        for checkpoints in (place / "checkpoints", place):
            newest, notes = checkpoint_files.newest_whole(checkpoints)
            if newest:
                folder = newest
                break
    elif (place / checkpoint_files.MANIFEST).is_file() and (wrong := checkpoint_files.damage(place)):
        raise UserError(f"{place} is damaged ({wrong}); take another checkpoint")
    models = sorted(folder.glob("model*.pt"))
    if not models:
        raise UserError(f"{place} holds no modelNNNNNN.pt")
    return models[-1], notes


def add_null_class(snapshot: Snapshot) -> None:
    """Lengthen the table of labels by the null class: zeros in the weights, the averages and the moments."""
    for state in (snapshot.model, *snapshot.ema.values(), snapshot.exp_avg, snapshot.exp_avg_sq):
        if state:
            state[LABELS] = weights.add_null_class(state[LABELS])
    snapshot.notes.append("the checkpoint has no null class: its row of the labels' table starts at zero")


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _read_optimizer(snapshot: Snapshot, content: Any, names: list[str], file: Path) -> None:
    moments = content.get("state") if isinstance(content, dict) else None
    if not isinstance(moments, dict) or sorted(moments) != list(range(len(names))):
        count = len(moments) if isinstance(moments, dict) else 0
        # improved-diffusion's fp16 runs keep one flat master tensor
        if isinstance(moments, dict) and list(moments) == [0]:
            flat = moments[0]
            sizes = [snapshot.model[name].numel() for name in names]
            if flat["exp_avg"].numel() == sum(sizes):
                for key in ("exp_avg", "exp_avg_sq"):
                    parts = flat[key].flatten().split(sizes)
                    target = getattr(snapshot, key)
                    target.update({n: p.view(snapshot.model[n].shape) for n, p in zip(names, parts, strict=True)})
                snapshot.state.setdefault("updates", int(flat["step"]))
                return
        raise UserError(f"{file} holds moments of {count} tensors, the model has {len(names)}")
    if not all({"step", "exp_avg", "exp_avg_sq"} <= moments[i].keys() for i in range(len(names))):
        raise UserError(f"{file} holds no moments of Adam (exp_avg, exp_avg_sq)")
    for i, name in enumerate(names):
        snapshot.exp_avg[name], snapshot.exp_avg_sq[name] = moments[i]["exp_avg"], moments[i]["exp_avg_sq"]
        shape = snapshot.model[name].shape
        if snapshot.exp_avg[name].shape != shape or snapshot.exp_avg_sq[name].shape != shape:
            raise UserError(f"{file} holds moments of another model ({name} differs in shape)")
    snapshot.state.setdefault("updates", int(moments[0]["step"]))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all, on disk."""
    checkpoint_files.write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object written by `write_json`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}
