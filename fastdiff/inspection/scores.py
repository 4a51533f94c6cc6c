"""Describes results of evaluations, statistics of images, and the terms of a score in bits per dimension."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.evaluation.classifier import read_classifier
from fastdiff.evaluation.curve_files import name_of, shown
from fastdiff.evaluation.report import TABLE
from fastdiff.evaluation.statistics import holds_images, read_about
from fastdiff.inspection.description import Description, command
from fastdiff.runtime.files import files_in, read_json
from fastdiff.runtime.untrusted import npz_array_header, read_npz_array

_MOST = 1 << 26
"""Bytes that an array of terms may have."""


def is_result(content: Any) -> bool:
    """Whether the content of a JSON file is the result of an evaluation."""
    return isinstance(content, dict) and content.keys() >= {"scores", "samples", "features", "protocol"}


def describe_result(file: Path, content: dict[str, Any]) -> Description:
    """The JSON file of a result."""
    found = Description(file, "result of an evaluation")
    try:
        samples, reference = content["samples"], content["reference"] or {}
        found.facts = {
            "scores": {name: shown(score) for name, score in content["scores"].items()},
            "samples": samples["path"],
            "num_samples": samples.get("count"),
            "reference": reference.get("path"),
            "num_reference": reference.get("count"),
            "network": content["features"].get("network"),
            "precision": content["features"].get("precision"),
            "time": content.get("time"),
        }
        found.notes = [str(note) for note in content.get("notes", [])]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged: it lacks an entry of a result") from None
    words = shlex.split(content.get("command", "")) if isinstance(content.get("command", ""), str) else []
    flags = words[2:] if words[:2] == ["fastdiff", "evaluate"] else words[1:]
    found.next = command("evaluate", *flags) if flags else ""
    return found


def is_curves(content: Any) -> bool:
    """Whether the content of a JSON file is that of curves over several solvers, steps or guidances."""
    return isinstance(content, dict) and content.keys() >= {"model", "metrics", "features", "protocol", "rows"}


def describe_curves(file: Path, content: dict[str, Any]) -> Description:
    """The JSON file of curves."""
    found = Description(file, "curves of an evaluation")
    try:
        reference = content["reference"] or {}
        found.facts = {
            "rows": {
                name_of(row): {name: shown(score) for name, score in row["scores"].items()} for row in content["rows"]
            },
            "model": content["model"],
            "num_samples": content["num_samples"],
            "reference": reference.get("path"),
            "num_reference": reference.get("count"),
            "network": content["features"].get("network"),
            "time": content.get("time"),
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged: it lacks an entry of curves") from None
    return found


def describe_results(folder: Path) -> Description:
    """A folder of results: the file and the scores of each."""
    found = Description(folder, "folder of evaluations", {"results": {}, "table": TABLE})
    for name in sorted(files_in(folder)):
        if name.endswith(".json") and is_result(content := read_json(folder / name)):
            found.facts["results"][name] = describe_result(folder / name, content).facts["scores"]
            found.next = command("info", folder / name)
    return found


def describe_statistics(file: Path, archive: zipfile.ZipFile) -> Description:
    """Statistics of features, which an npz may hold beside images."""
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    about = read_about(archive, names)
    found = Description(file, "statistics of images")
    if holds_images(file):
        found.kind = "statistics of images, and images"
        about["size"] = "x".join(map(str, npz_array_header(archive, "arr_0").shape[1:]))
    arrays = sorted(names & {"mu", "sigma", "mu_s", "sigma_s", "features"})
    found.facts = {
        "count": int(read_npz_array(archive, "count", _MOST)) if "count" in names else None,
        "images": about.get("size"),
        "network": about.get("network") or "not said; taken for Inception's",
        "precision": about.get("precision"),
        "arrays": {name: "x".join(map(str, npz_array_header(archive, name).shape)) for name in arrays},
        "made_of": about.get("made_of"),
        "bytes": file.stat().st_size,
    }
    found.next = command("evaluate", samples="SAMPLES", reference=file)
    return found


def describe_features(file: Path) -> Description:
    """A classifier of train_features."""
    model = read_classifier(file)
    found = Description(file, "network of features")
    found.facts = {
        "parameters": sum(value.numel() for value in model.parameters()),
        "images": "x".join(map(str, (*model.size_hw, model.channels))),
        "classes": model.last.out_features,
        "bytes": file.stat().st_size,
    }
    found.next = command("evaluate", samples="SAMPLES", reference="REFERENCE", features=file)
    return found


def describe_terms(file: Path, archive: zipfile.ZipFile) -> Description:
    """A file of nll: one number per timestep, the largest timestep first."""
    terms = read_npz_array(archive, "arr_0", _MOST)
    found = Description(file, "terms per timestep of a score")
    found.facts = {"timesteps": len(terms), "sum": f"{terms.sum():.6g}", "bytes": file.stat().st_size}
    return found
