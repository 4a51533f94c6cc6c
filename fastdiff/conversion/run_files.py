"""What lies beside a checkpoint in its run: the newest grid of samples, and scores."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.config.checkpoint import Checkpoint
from fastdiff.errors import UserError
from fastdiff.models.weights import step_and_rate
from fastdiff.runtime.files import read_json

_GRID = re.compile(r"step_(\d+)\.png")
_RESULTS = Path("runs/evaluations")  # where evaluate.py writes by default


class Score(NamedTuple):
    """A metric's value, and what it was measured with."""

    metric: str
    value: str
    how: str


def run_of(file: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, None for another file."""
    return next((each for each in list(file.resolve().parents)[:3] if (each / "checkpoints").is_dir()), None)


def newest_grid(file: Path) -> Path | None:
    """The newest grid of samples of a checkpoint's run up to its step."""
    run, step = run_of(file), step_and_rate(file)[0]
    grids = run.glob("samples/step_*.png") if run else ()
    found = [(int(match[1]), grid) for grid in grids if (match := _GRID.fullmatch(grid.name))]
    return max((each for each in found if step is None or each[0] <= step), default=(0, None))[1]


def scores_of(checkpoint: Checkpoint) -> list[Score]:
    """The scores of these weights in the run's best.json and in results of evaluate.py."""
    run = run_of(checkpoint.file)
    folders = [checkpoint.file.parent, *([run, run / "evaluations"] if run else []), _RESULTS]
    results = [score for folder in dict.fromkeys(folders) for score in _evaluated(folder, checkpoint)]
    return list(dict.fromkeys([*(_best(run, checkpoint.file) if run else ()), *results]))


def _best(run: Path, file: Path) -> Iterator[Score]:
    """The score in best.json, if it is of this file's average."""
    best = _object(run / "checkpoints" / "best" / "best.json")
    if (best.get("step"), best.get("ema_rate")) == step_and_rate(file) and isinstance(best.get("value"), (int, float)):
        reference = Path(str(best.get("reference", ""))).name
        how = f"{best.get('samples')} samples during training, reference {reference}, features {best.get('network')}"
        yield Score(str(best.get("metric")), f"{best['value']:.5g}", how)


def _evaluated(folder: Path, checkpoint: Checkpoint) -> Iterator[Score]:
    """The scores in a folder of evaluate.py's results of images that were drawn with these weights."""
    table = folder / "evaluations.csv"
    if not table.is_file():
        return
    # Other programs may have changed these files: what has another form is left out.
    damaged = (OSError, csv.Error, LookupError, TypeError, ValueError, AttributeError)
    with suppress(*damaged), table.open(newline="") as file:
        names = [str(row.get("file")) for row in csv.DictReader(file)]
        for name in dict.fromkeys(names):
            result = _object(folder / Path(name).name)
            samples = result.get("samples") or {}
            drawing = samples.get("drawing") or {}
            if drawing.get("model_path") != checkpoint.digest:
                continue
            drawn = [f"{samples.get('count')} samples", str(drawing.get("solver"))]
            drawn += [f"{drawing['steps']} steps"] if drawing.get("steps") else []
            drawn += [f"guidance {drawing['guidance']}"] if "guidance" in drawing else []
            reference = Path(str((result.get("reference") or {}).get("path", ""))).name
            drawn += [f"reference {reference}"] if reference else []
            for metric, score in (result.get("scores") or {}).items():
                yield Score(metric, f"{score['value']:.5g}", ", ".join(drawn))


def _object(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none that can be read."""
    with suppress(UserError):
        content = read_json(file)
        return content if isinstance(content, dict) else {}
    return {}
