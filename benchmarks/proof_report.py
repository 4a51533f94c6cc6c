"""The findings of gpu_proof.py for report.py: rows of its tables and charts, and tables of parts and kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import proof_log
from fastdiff.errors import UserError
from fastdiff.runtime.machine import find

Row = proof_log.Row
NOTE = (
    "Every variant was timed in a process of its own. × reference is the ratio of the medians; in brackets that of the "
    "slower quartile to the faster one, and the other way round."
)
SHOWN = 20
"""Rows of single kernels in a table; the file has all."""


def read(path: Path) -> list[Row]:
    """The findings of all commands with the last one's mode and commit. Raises UserError."""
    try:
        rows = proof_log.latest_kind(proof_log.read_rows(path))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give a file of benchmarks/gpu_proof.py") from error
    except ValueError as error:
        raise UserError(str(error)) from None
    if not any(row["kind"] == "machine" for row in rows):
        raise UserError(f"{path} does not say where it was measured; run gpu_proof.py --only machine first")
    return rows


def place_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Device, versions and date of the figures, and a note on them."""
    heads = [row for row in rows if row["kind"] in ("start", "machine")]
    return {name: value for row in heads for name, value in row.items()} | {"threads": 0, "note": NOTE}


def cases_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of training and rows of drawing, where there are any: ours, each beside its baselines."""
    latest = proof_log.latest_throughput(rows)
    found = []
    for unit in ("images/s", "evaluations/s"):
        ours = [row for row in latest if row["variant"].startswith("ours") and proof_log.rate_of(row)[1] == unit]
        cases: dict[tuple[str, int], list[Row]] = {}
        for row in ours:
            cases.setdefault((row["config"], row["batch"]), []).append(row)
        made = []
        for here in cases.values():
            peers = proof_log.peers_of(here[0], latest)
            base = next((row for row in peers if row["variant"] == "reference"), None)
            made += [_beside(here[0], base, row) for row in [*peers, *here]]
        if made:
            found.append(made)
    return found


def _beside(mine: Row, base: Row | None, row: Row) -> Row:
    """A row of gpu_proof.py for the table of `mine`; the variant's name says its batch and precision if they differ."""
    differs = [row["precision"]] if row["precision"] != mine["precision"] else []
    differs += [f"batch {row['batch']}"] if row["batch"] != mine["batch"] else []
    name = row["variant"] + (f" ({', '.join(differs)})" if differs else "")
    ratio = None
    if base:
        (low, middle, high), (slow, usual, fast) = (each["images_per_second"] for each in (row, base))
        ratio = [low / fast, middle / usual, high / slow]
    return {**row, "variant": name, "batch": mine["batch"], "precision": mine["precision"], "ratio": ratio}


def parts_table(rows: Sequence[Row]) -> str:
    """A table of the parts that gpu_proof.py ran: how each ended last, its counts of tests, and its other findings."""
    found: dict[str, list[Row]] = {}
    ends: dict[str, Row] = {}
    for row in rows:
        if row["part"] in ends and row["kind"] != "end":  # the part was run again
            found[row["part"]] = []
            del ends[row["part"]]
        if row["kind"] == "end":
            ends[row["part"]] = row
        elif row["kind"] in ("machine", "tests", "failure", "fact", "note"):
            found.setdefault(row["part"], []).append(row)
    lines = ["# Parts", "", "| part | ended | seconds | found |", "|---|---|---:|---|"]
    for part, end in ends.items():
        said = " ".join("; ".join(map(_said, found.get(part, []))).split()).replace("|", "/")
        lines.append(f"| {part} | {end['verdict']} | {end['seconds']:.0f} | {said} |")
    return "\n".join(lines) + "\n"


def figures_tables(rows: Sequence[Row]) -> str:
    """The findings of kernel_figures.py: milliseconds per step by way, and the calls that cost most in a step."""
    figures = [row for row in rows if row["kind"] == "figure" and "section" in row]
    lines = []
    for section in dict.fromkeys(row["section"] for row in figures):
        here = [row for row in figures if row["section"] == section]
        sums = [row for row in here if "ms_per_step" in row]
        single = [row for row in here if "microseconds" in row]
        if not single:
            continue
        lines += ["", f"# {section.capitalize()}"]
        if sums:
            lines += ["", "| network | direction | way | ms per step | calls of a step |", "|---|---|---|---:|---:|"]
        for row in sums:
            cells = [row.get("config", ""), row["direction"], row["way"], f"{row['ms_per_step']:.3f}"]
            lines.append("| " + " | ".join([*cells, f"{row['calls']} of {row['of']}"]) + " |")
        lines += ["", "| shape | direction | way | calls | µs | GB/s | of copy | TFLOP/s | of matmul |"]
        lines += ["|---|---|---|" + "---:|" * 6]
        costs = {id(row): row["microseconds"] * _calls(row) for row in single}
        for row in sorted(single, key=lambda row: -costs[id(row)])[:SHOWN]:
            numbers = [f"{_calls(row)}", f"{row['microseconds']:.1f}"]
            numbers += [str(row.get(name, "–")) for name in ("GB/s", "share of copy", "TFLOP/s", "share of matmul")]
            lines.append("| " + " | ".join([row["shape"], row["direction"], row.get("way", "cuDNN"), *numbers]) + " |")
    return "\n".join(lines) + "\n" if lines else ""


def _calls(row: Row) -> int:
    """Calls in a step; for a shape of attention that several configurations share, in a step of each."""
    return sum(row["count"].values()) if isinstance(row["count"], dict) else row["count"]


def name_of(rows: Sequence[Row]) -> str:
    """The name of kept results: gpu_h100_2026-01-02."""
    device = next(row["device"] for row in reversed(rows) if row["kind"] == "machine")
    known = find(device)
    name = known.name.split()[0] if known else device
    day = next(row["date"] for row in reversed(rows) if row["kind"] == "start")
    return f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}_{day}"


def _said(row: Row) -> str:
    """The short values of a row; lists and tables stay in the file."""
    values = {k: v for k, v in row.items() if k not in ("part", "kind", "at") and not isinstance(v, (list, dict))}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
