"""Cases of training states: state.pt and opt.pt whose entries are missing, of other types, shapes or sizes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.small_trainer import small_trainer

from fastdiff.training.checkpoints.format import read_snapshot
from fuzz.cases import READ, Case, generator

STEP = 3
OTHERS = (
    *(None, True, -1, 5, 2**70, 1.5, float("nan"), "lr", "", b"x", [], {}, [1, "a"], {"a": 1}, {5: None}, ()),
    *(torch.ones(0), torch.ones(2, 3), torch.tensor(7), torch.ones(3, dtype=torch.int64), torch.Size([2])),
)


def places(content: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in nested containers."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        if depth < 4:
            yield from places(content[key], depth + 1)


def mutated(content: Any, rng: random.Random) -> tuple[str, Any]:
    """The content with one or two entries replaced, removed, renamed or added."""
    content = copy.deepcopy(content)
    way = ""
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(list(places(content)))
        way = rng.choice(["replaced", "replaced", "dropped", "renamed", "added"])
        if way == "replaced" or isinstance(container, list):
            container[key] = copy.deepcopy(rng.choice(OTHERS))
        elif way == "added":
            container[rng.choice([7, "more", "exp_avg"])] = copy.deepcopy(rng.choice(OTHERS))
        else:
            value = container.pop(key)
            if way == "renamed":
                container[rng.choice([0, 10**6, "other", "momentum_buffer"])] = value
    return way, rng.choice([content, content, content, content, *OTHERS]) if rng.random() < 0.1 else content


def cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Read the state into a new trainer, as a run does that continues from a .pt file."""
    trainer = small_trainer(schedule_sampler="loss-second-moment")
    for _ in range(STEP):
        trainer.take_step()
    trainer.save(folder, {})
    made = folder / f"step_{STEP:06d}"
    (made / "manifest.json").unlink()  # it would tell that the files aren't those that were written
    files = {name: made / name for name in ("state.pt", f"opt{STEP:06d}.pt")}
    whole = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    names = (str(made), "--schedule_sampler", "--resume_checkpoint")

    def run() -> tuple[str, str]:
        snapshot = read_snapshot(made / f"model{STEP:06d}.pt", ["0.9", "0.99"])
        small_trainer(snapshot, schedule_sampler="loss-second-moment")
        return READ, ""

    for index in range(start, stop):
        rng = generator(seed, "states", index)
        chosen = rng.choice(list(files))
        way, content = mutated(whole[chosen], rng)
        for name, file in files.items():
            torch.save(content if name == chosen else whole[name], file)
        yield Case(f"{chosen.removesuffix('.pt')} {way}", run, names)
