"""Checkpoints on disk: a folder per step with files that know no world size, under improved-diffusion's names.

checkpoints/step_NNNNNN/
    modelNNNNNN.pt  ema_RATE_NNNNNN.pt  optNNNNNN.pt   as improved-diffusion's, N counting the updates they hold
    state.pt                                            the rest of what a restart needs
checkpoints/latest                                      the name of the newest whole folder
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import weights
from fastdiff.settings import UserError

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


class Writer:
    """Writes one checkpoint folder, piece by piece so that only one piece is in memory, whole or not at all."""

    def __init__(self, folder: Path, step: int, info: dict[str, Any]) -> None:
        self.step, self.info = step, info
        self.final = folder / f"step_{step:06d}"
        self.partial = folder / f".step_{step:06d}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def weights(self, rate: str | None, state: dict[str, Tensor]) -> None:
        """The model (rate None) or an average of it."""
        name = f"model{self.step:06d}.pt" if rate is None else f"ema_{rate}_{self.step:06d}.pt"
        torch.save(weights.with_info(state, self.info), self.partial / name)

    def optimizer(
        self, exp_avg: dict[str, Tensor], exp_avg_sq: dict[str, Tensor], updates: int, group: dict[str, Any]
    ) -> None:
        """AdamW's state as torch.optim.AdamW.state_dict() has it, parameters numbered in the model's order."""
        state = {
            i: {"step": torch.tensor(float(updates)), "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
            for i, name in enumerate(exp_avg)
        }
        groups = [{**group, "params": list(range(len(state)))}]
        torch.save({"state": state, "param_groups": groups}, self.partial / f"opt{self.step:06d}.pt")

    def finish(self, state: dict[str, Any]) -> Path:
        """The rest, then the folder's real name, then the pointer to it; each on disk before the next."""
        torch.save(state, self.partial / "state.pt")
        for file in self.partial.iterdir():
            _sync(file)
        _sync(self.partial)
        shutil.rmtree(self.final, ignore_errors=True)
        self.partial.rename(self.final)
        pointer = self.final.parent / ".latest.partial"
        pointer.write_text(self.final.name + "\n")
        _sync(pointer)
        pointer.rename(self.final.parent / "latest")
        _sync(self.final.parent)
        return self.final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(folder: Path, step: int, info: dict[str, Any], fill: Callable[[Writer], dict[str, Any]]) -> Path:
    """A checkpoint folder written by `fill`, which returns the rest; UserError when the disk won't take it."""
    try:
        writer = Writer(folder, step, info)
        return writer.finish(fill(writer))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error).lower():
            raise
        shutil.rmtree(folder / f".step_{step:06d}.partial", ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"run_dir: the checkpoint of step {step} can't be written to {folder} ({reason})") from error


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint folder of a run, by the pointer or, without it, by number."""
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text().strip()
        if (named / "state.pt").is_file():
            return named
    whole = sorted(path for path in folder.glob("step_*") if (path / "state.pt").is_file())
    return whole[-1] if whole else None


def read(place: Path, rates: list[str], flag: str = "--resume_checkpoint") -> Snapshot:
    """A checkpoint: one of our step folders, or a model or ema .pt file with what lies beside it.

    What a bare .pt lacks (averages, moments) is noted in `notes`, in sentences for the log.
    """
    if place.is_dir():
        inner = place if list(place.glob("*.pt")) else latest(place / "checkpoints") or latest(place)
        models = sorted((inner or place).glob("model*.pt"))
        if not models:
            raise UserError(f"{flag}: {place} holds no modelNNNNNN.pt")
        file = models[-1]
    else:
        file = place
    state = weights.read_state_dict(file, flag)
    match = _STEP.search(file.name)
    step = int(match[1]) if match else 0
    snapshot = Snapshot(step=step, model=dict(state))
    rest = file.parent / "state.pt"
    snapshot.state = weights.read(rest, flag) if rest.is_file() else {}
    if not isinstance(snapshot.state, dict):
        raise UserError(f"{flag}: {rest} holds no training state; take another checkpoint")
    if not file.name.startswith("model"):
        snapshot.step, snapshot.state = 0, {}
        snapshot.notes.append(f"{file.name} is taken as first weights: a new run starts from it, at step 0")
        return snapshot
    for rate in rates:
        average = file.with_name(f"ema_{rate}_{match[1]}.pt") if match else file
        if match and average.is_file():
            snapshot.ema[rate] = dict(weights.read_state_dict(average, flag))
            if _shapes(snapshot.ema[rate]) != _shapes(snapshot.model):
                raise UserError(f"{flag}: {average} is of another model than {file.name} beside it")
        else:
            snapshot.notes.append(f"no ema_{rate} beside {file.name}: that average starts as a copy of the weights")
    optimizer = file.with_name(f"opt{match[1]}.pt") if match else file
    if match and optimizer.is_file():
        _read_optimizer(snapshot, weights.read(optimizer, flag), list(state), optimizer, flag)
    else:
        snapshot.notes.append(f"no optimiser state beside {file.name}: its moments start at zero")
    return snapshot


def add_null_class(snapshot: Snapshot) -> None:
    """Lengthen the table of labels by the null class: zeros in the weights, the averages and the moments."""
    for state in (snapshot.model, *snapshot.ema.values(), snapshot.exp_avg, snapshot.exp_avg_sq):
        if state:
            state[LABELS] = weights.add_null_class(state[LABELS])
    snapshot.notes.append("the checkpoint has no null class: its row of the labels' table starts at zero")


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _read_optimizer(snapshot: Snapshot, content: Any, names: list[str], file: Path, flag: str) -> None:
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
        raise UserError(f"{flag}: {file} holds moments of {count} tensors, the model has {len(names)}")
    if not all({"step", "exp_avg", "exp_avg_sq"} <= moments[i].keys() for i in range(len(names))):
        raise UserError(f"{flag}: {file} holds no moments of Adam (exp_avg, exp_avg_sq)")
    for i, name in enumerate(names):
        snapshot.exp_avg[name], snapshot.exp_avg_sq[name] = moments[i]["exp_avg"], moments[i]["exp_avg_sq"]
        if snapshot.exp_avg[name].shape != snapshot.model[name].shape:
            raise UserError(f"{flag}: {file} holds moments of another model ({name} differs in shape)")
    snapshot.state.setdefault("updates", int(moments[0]["step"]))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object written by `write_json`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}
