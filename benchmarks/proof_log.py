"""The findings of benchmarks/gpu_proof.py: one JSON line each, on disk as soon as it is known, and a table of them.

Every line names its part, its kind and when it was written, in seconds since the command began:

    start       command, commit, date, mode                    machine     device, versions, measured rates
    tests       passed, failed, skipped, and the verdict       failure     one failed test and its first line
    throughput  a row of bench_train.py or bench_sampling.py   profile     ms per step by class, costliest kernels
    figure      one kernel at one shape (kernel_figures.py)    fact        anything else that was measured
    note        why something was left out                     end         ok, or how the part ended, and its seconds

The mode is "real", "tiny" or "rehearsal". Rows of another mode or commit than the last start row's are ignored.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
OK = "ok"
BASELINES = (
    "reference",
    "reference+channels-last",
    "reference+compile",
    "reference+max-autotune",
    "diffusers",
    "diffusers+max-autotune",
)

NEEDED = {
    "start": {"command", "commit", "date", "mode"},
    "machine": {"device", "torch", "matmul_tflops", "copy_gbs"},
    "throughput": {"config", "variant", "precision", "batch", "ms", "images_per_second", "mfu"},
    "profile": {"classes", "busy_ms", "wall_ms", "launches"},
    "end": {"verdict", "seconds"},
}
"""Kind → the keys that every row of it has besides its part."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """Appends rows to results.jsonl of each folder; the first folder's is the one to read.

    Several processes may write at once: each row is one write at the end of the file.
    """

    folders: tuple[Path, ...]
    began: float
    """time.monotonic() when the command began; the same clock in every process of a machine."""

    @property
    def file(self) -> Path:
        return self.folders[0] / FILE

    def write(self, part: str, kind: str, **fields: Any) -> None:
        """Append one row and wait until it is on disk."""
        row = {"part": part, "kind": kind, "at": round(time.monotonic() - self.began, 1), **fields}
        for folder in self.folders:
            _append(folder / FILE, [row])
        print("   " + json.dumps(row, default=str)[:240], flush=True)

    def copy(self, rows: Iterable[Row]) -> None:
        """Append what earlier commands found to the file that is read."""
        _append(self.file, rows)

    def cut_half_lines(self) -> None:
        """Remove the half of a line that a killed command left, or the next row would become part of it.

        Call it only when a command begins: later, half a line may be one that another process is writing.
        """
        for folder in self.folders:
            if (folder / FILE).exists():
                with (folder / FILE).open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)


def _append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row, default=str) + "\n" for row in rows).encode())
        os.fsync(file.fileno())


def read_rows(file: Path) -> list[Row]:
    """The rows of a results.jsonl; a last line that a killed command left half written is ignored.

    Raises ValueError for another kind of file.
    """
    rows = []
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text; give a {FILE} of gpu_proof.py") from None
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if i == len(lines) - 1:
                break
            raise ValueError(f"{file}, line {i + 1}, is not JSON; give a {FILE} of gpu_proof.py") from None
        missing = {"part", "kind"} - row.keys() if isinstance(row, dict) else {"part", "kind"}
        missing = missing or NEEDED.get(row["kind"], set()) - row.keys()
        if missing:
            raise ValueError(f"{file}, line {i + 1}, has no {min(missing)}; give a {FILE} of gpu_proof.py")
        rows.append(row)
    return rows


def of_one_kind(rows: Sequence[Row], mode: str | None, commit: str | None) -> list[Row]:
    """The rows that commands of this mode and commit wrote."""
    kept, same = [], False
    for row in rows:
        if row["kind"] == "start":
            same = (row.get("mode"), row.get("commit")) == (mode, commit)
        if same:
            kept.append(row)
    return kept


def latest_kind(rows: Sequence[Row]) -> list[Row]:
    """The rows of the mode and commit of the last command."""
    last = next((row for row in reversed(rows) if row["kind"] == "start"), None)
    return of_one_kind(rows, last.get("mode"), last.get("commit")) if last else []


def finished(rows: Iterable[Row]) -> set[str]:
    """Names of the parts that succeeded when they were last run."""
    last = {row["part"]: row["verdict"] for row in rows if row["kind"] == "end"}
    return {part for part, verdict in last.items() if verdict == OK}


def rate_of(row: Row) -> tuple[float, str]:
    """The median rate of a throughput row and its unit."""
    if "evaluations_per_second" in row:
        return row["evaluations_per_second"][1], "evaluations/s"
    return row["images_per_second"][1], "images/s"


def latest_throughput(rows: Iterable[Row]) -> list[Row]:
    """The last throughput row of every configuration, kind of work, variant, precision and batch."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["kind"] == "throughput":
            found[row["config"], rate_of(row)[1], row["variant"], row["precision"], row["batch"]] = row
    return list(found.values())


def peers_of(mine: Row, latest: Sequence[Row]) -> list[Row]:
    """The baselines to put beside a row of ours: those of its batch, else of the largest batch below that fitted."""
    same = [row for row in latest if row["config"] == mine["config"] and rate_of(row)[1] == rate_of(mine)[1]]
    peers = []
    for name in BASELINES:
        here = [row for row in same if row["variant"] == name and row["batch"] <= mine["batch"]]
        largest = max((row["batch"] for row in here), default=0)
        peers += [row for row in here if row["batch"] == largest]
    return peers


def ratios(rows: Sequence[Row]) -> list[str]:
    """The ratio of each baseline's median to ours; other batches and precisions are named."""
    lines = []
    latest = latest_throughput(rows)
    for mine in (row for row in latest if row["variant"].startswith("ours")):
        for other in peers_of(mine, latest):
            same = (mine["batch"], mine["precision"]) == (other["batch"], other["precision"])
            beside = "" if same else f" ({other['precision']}, batch {other['batch']})"
            (rate, unit), (base, _) = rate_of(mine), rate_of(other)
            name = f"{mine['variant']}, {mine['precision']}, batch {mine['batch']}"
            times = rate / base if base else math.inf
            lines.append(f"{mine['config']}, {unit}: {name}, is {times:.2f} times {other['variant']}{beside}")
    return lines


def table(rows: Sequence[Row]) -> str:
    """The printed table of rates, verdicts, profiles and ratios; figures of single kernels stay in the file."""
    lines = []
    for row in rows:
        kind = row["kind"]
        if kind == "throughput":
            lines.append(throughput_line(row))
        elif kind == "profile":
            classes = ", ".join(f"{name} {ms:.2f}" for name, ms in row["classes"].items())
            calls = row["launches"]
            launches = "" if calls is None else f", {calls['kernels']:.0f} launches, {calls['graphs']:.0f} graphs"
            busy = f"GPU busy {row['busy_ms']:.2f} of {row['wall_ms']:.2f} ms{launches}"
            lines.append(f"{row['part']:26} {busy}: {classes}")
        elif kind in ("machine", "tests", "failure", "fact", "note") or (kind == "end" and row["verdict"] != OK):
            said = {name: value for name, value in row.items() if name not in ("part", "kind", "at")}
            lines.append(f"{row['part']:26} {'ended: ' if kind == 'end' else ''}{json.dumps(said)[:500]}")
    return "\n".join([*lines, *ratios(rows)])


def throughput_line(row: Row) -> str:
    """One line for one variant."""
    rate, unit = rate_of(row)
    low, middle, high = row["ms"]
    host = "" if row.get("host_ms") is None else f"  host {row['host_ms']:.2f} ms"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    if mfu and "executed_share" in row:
        mfu += f" (executed {row['mfu'] * row['executed_share']:.1%})"
    return (
        f"{row['part']:26} {row['precision']:5} batch {row['batch']:<4} {rate:9.1f} {unit:14}"
        f"{middle:9.3f} ms ({low:.3f} to {high:.3f}){mfu}{host}  peak {row['peak_memory_gb']:.2f} GB"
        f"  first step after {row['start_seconds']:.1f} s"
    )
