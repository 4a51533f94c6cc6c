"""Writes results: a JSON file each, a row of evaluations.csv, and a line for the screen."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.errors import UserError
from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.evaluation.judge import Verdict, label
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import Described
from fastdiff.runtime.files import FileLock, LocksUnsupported, write_json, write_text
from fastdiff.runtime.machine import device_name
from fastdiff.runtime.program import command_line

TABLE = "evaluations.csv"
_FIRST = ("time", "samples", "num_samples", "reference", "num_reference", "network", "feature_precision")
_LAST = ("notes", "file")
_LONGEST = 200
"""Bytes of a name that names of results begin with; file systems allow 255 in all."""


def result_of(
    verdict: Verdict,
    samples: Described,
    reference: Described | None,
    network: FeatureNetwork,
    settings: EvaluateSettings,
    drawing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that a number needs to be compared with others, as JSON. drawing is how the samples were drawn."""
    scores = {}
    for metric, score in verdict.scores.items():
        entry = {"value": score.value, "spread": score.spread, "error_of_rounding": verdict.errors.get(metric)}
        entry |= verdict.further.get(metric, {})
        scores[label(metric, network)] = {name: value for name, value in entry.items() if value is not None}
    return {
        "scores": scores,
        "notes": verdict.notes,
        "samples": {**samples.summary(), **({"drawing": drawing} if drawing else {})},
        "reference": reference.summary() if reference else None,
        "features": network.describe(),
        "protocol": protocol_of(settings),
        "versions": {
            "fastdiff": fastdiff.__version__,
            "torch": torch.__version__,
            **{name: found for name in ("torch-fidelity", "numpy", "pillow") if (found := _version(name))},
            "python": platform.python_version(),
        },
        "command": command_line(),
        "device": device_name(network.device),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def protocol_of(settings: EvaluateSettings) -> dict[str, Any]:
    """The settings that the metrics depend on besides the images and their features."""
    names = {"splits", "kid_subsets", "kid_subset_size", "resamplings", "metric_seed", "resize"}
    return settings.model_dump(mode="json", include=names)


def lines_of(verdict: Verdict, samples: Described, reference: Described | None, network: FeatureNetwork) -> list[str]:
    """The scores in one line, and a line for each remark."""
    shown = []
    for metric, score in verdict.scores.items():
        spread = f" ± {_two_digits(score.spread)}" if score.spread is not None else ""
        error = f" (rounding {verdict.errors[metric]:.2g})" if metric in verdict.errors else ""
        splits = verdict.further.get(metric, {}).get("over_splits")
        over = f" (over splits ± {_two_digits(splits)})" if splits is not None else ""
        shown.append(f"{label(metric, network)} {score.value:.5g}{spread}{over}{error}")
    against = f" against {reference.count or 'an unknown number of'} reference images" if reference else ""
    return [f"{'  '.join(shown)}  ({samples.count} samples{against})", *(f"note: {note}" for note in verdict.notes)]


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block, such as that of a full disk, into a UserError that names the folder of results."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--results_dir: {folder} can't be written to ({error.strerror or error})") from error


def short_stem(path: Path) -> str:
    """A file's name without its ending, cut to a length that leaves room for more in the name of another file."""
    return os.fsdecode(os.fsencode(path.stem)[:_LONGEST])


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result's JSON file, named after the samples, and add its row to the table. Returns the file's path.

    The same evaluation again replaces its file, and adds another row.
    """
    same = {name: value for name, value in result.items() if name in ("samples", "reference", "features", "protocol")}
    digest = hashlib.sha256(json.dumps([same, sorted(result["scores"])], sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{short_stem(Path(result['samples']['path'])) or 'samples'}-{digest}.json"
    write_json(path, result)
    reference = result["reference"] or {}
    row = {
        "time": result["time"],
        "samples": result["samples"]["path"],
        "num_samples": result["samples"].get("count", ""),
        "reference": reference.get("path", ""),
        "num_reference": reference.get("count", ""),
        "network": result["features"]["network"],
        "feature_precision": result["features"]["precision"],
    }
    for name, score in result["scores"].items():
        row |= {name: f"{score['value']:.8g}"}
        row |= {f"{name} {what}": f"{score[what]:.3g}" for what in ("spread", "over_splits") if what in score}
    _add_row(folder / TABLE, {**row, "notes": "; ".join(result["notes"]), "file": path.name})
    return path


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, with new columns where it has new names."""
    with ExitStack() as stack:
        with suppress(LocksUnsupported):
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), remove=True))
        rows: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="surrogateescape")  # as write_text writes it
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        names = [name for each in (*rows, row) for name in each if name and name not in _LAST]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, dict.fromkeys((*_FIRST, *names, *_LAST)), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_text(path, table.getvalue())
