"""Times the variants of one case: in turns in one process, or each in a process of its own where memory is short."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import Label, ResultFile, release_memory
from benchmarks.variant_timing import Built, HostCost, Step, build, few_objects_to_collect, host_cost, seconds_of
from fastdiff.errors import UserError

Row = dict[str, Any]


def measure(
    built: dict[str, Built], rounds: int, seconds: float, guard: Callable[[str], AbstractContextManager[None]]
) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round; their order rotates.

    A variant whose step raises, where guard(its name) takes the exception, is not in the result.
    """
    times: dict[str, list[float]] = {name: [] for name in built}
    counts = dict.fromkeys(built, 1)
    names = list(built)
    with few_objects_to_collect():
        for i in range(rounds + 1):  # the first round finds out how many steps fill a turn
            for name in names[i % len(names) :] + names[: i % len(names)] if names else []:
                each = None
                with guard(name):
                    each = seconds_of(built[name].step, counts[name])
                if each is None:
                    names.remove(name)
                    del built[name], times[name]
                elif i:
                    times[name].append(each)
                else:
                    counts[name] = max(1, round(seconds / each))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()


def speeds(seconds: Sequence[float], base: Sequence[float] | None, flops: float, share: float, args: Any) -> Row:
    """What follows from the seconds that one step takes in each round: its keys of a row.

    base   the seconds of the variant that ratios refer to, in the same rounds; None: there is no ratio
    flops  of a step, by the network as improved-diffusion defines it; share: the executed ones, as a share of these
    """
    middle = quartiles(seconds)[1]
    of_peak = flops / middle / args.peak_flops if args.peak_flops else None
    return {
        "ratio": None if base is None else quartiles([b / s for b, s in zip(base, seconds, strict=True)]),
        "mfu": of_peak,
        "mfu_executed": None if of_peak is None else share * of_peak,
        "mfu_measured": flops / middle / args.matmul_flops,
        "executed_share": share,
    }


def times_as_fast(mine: Row, other: Row) -> float:
    """The speed ratio of two rows of a case, from the rounds if mine has it, else from the medians."""
    if mine["ratio"] and other["variant"] == mine["ratio_to"]:
        return mine["ratio"][1]
    return other["ms"][1] / mine["ms"][1]


@dataclass
class Contest:
    """Variants of one case, timed in turns; rows are printed and written as soon as they are known."""

    label: Label
    device: torch.device
    rows_from: Callable[[dict[str, Built], dict[str, list[float]], str], list[Row]]
    """(what was built, its times, the name of the base) → rows."""
    line_of: Callable[[Row], str]
    results: ResultFile
    rounds: int
    seconds: float

    def time_variants(self, makers: dict[str, Callable[[], Step]]) -> None:
        """Time all of them against the reference; nothing is measured if the results hold all of them already."""
        if not self.results.missing(self.label, list(makers)):
            return
        self.results.forget(self.label, list(makers))
        for row in self._rows(makers, "reference"):
            self._keep(row)

    def time_levers(self, without: dict[str, Callable[[], Step]], ours: Callable[[], Step]) -> None:
        """Time ours without each lever beside ours, except the levers that the results hold already."""
        makers = {f"ours -{lever}": make for lever, make in without.items()}
        for name in self.results.missing(self.label, list(makers)):
            for row in self._rows({"ours": ours, name: makers[name]}, "ours"):
                if row["variant"] == name:
                    self._keep(row)

    def _rows(self, makers: dict[str, Callable[[], Step]], base: str) -> list[Row]:
        guard = functools.partial(self.results.guard, self.label)
        built: dict[str, Built] = {}
        for name, make in makers.items():
            with guard(name):
                built[name] = build(make, self.device)
                print(f"  {name}: begun after {built[name].start_seconds:.1f} s", flush=True)
        times = measure(built, self.rounds, self.seconds, guard)
        hosts: dict[str, HostCost] = {}
        for name in list(built):
            with guard(name):
                hosts[name] = host_cost(built[name].step, self.device)
        rows = [{**row, **hosts[row["variant"]]._asdict()} for row in self.rows_from(built, times, base)
                if row["variant"] in hosts]  # fmt: skip
        built.clear()
        torch._dynamo.reset()
        release_memory()
        return rows

    def _keep(self, row: Row) -> None:
        print(self.line_of(row), flush=True)
        self.results.add(row)


# --- a process for each variant ---


def time_apart(
    label: Label,
    variants: Sequence[str],
    levers: Sequence[str],
    command: Sequence[str],
    line_of: Callable[[Row], str],
    results: ResultFile,
) -> None:
    """Time every variant in a process of its own, one after the other, and each lever beside ours in another.

    command  the program and its flags, to which --variants, --levers, --separate and --json are added.

    Ratios are those of the medians, and their quartiles the slower quartile to the faster one and the other way round,
    because rounds of different processes don't belong together. Clocks may have changed between them.
    """
    for name in results.missing(label, variants):
        for row in _from_process(label, name, [*command, "--variants", name], results):
            base = next((r for r in results.rows if _is_base(r, label)), row if name == "reference" else None)
            kept = {**row, "apart": True, "ratio": base and ratio_of_medians(base["ms"], row["ms"])}
            print(line_of(kept), flush=True)
            results.add(kept)
    for lever in levers:
        name = f"ours -{lever}"
        if results.missing(label, [name]):
            for row in _from_process(label, name, [*command, "--variants", "none", "--levers", lever], results):
                print(line_of(row), flush=True)
                results.add(row)


def _is_base(row: Row, label: Label) -> bool:
    return row["variant"] == "reference" and all(row[key] == value for key, value in label.items())


def ratio_of_medians(base: Sequence[float], ms: Sequence[float]) -> list[float]:
    """base over ms, both quartiles (low, middle, high): at its lowest, of the medians, at its highest."""
    return [base[0] / ms[2], base[1] / ms[1], base[2] / ms[0]]


def _from_process(label: Label, name: str, command: Sequence[str], results: ResultFile) -> list[Row]:
    """The row that a command wrote for the variant `name`; its failure is written down here."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, results.guard(label, name):
        file = Path(folder) / "rows.json"
        print(f"  {name}, in a process of its own", flush=True)
        ended = subprocess.run(
            [sys.executable, *command, "--separate", "never", "--json", str(file)], capture_output=True, text=True
        )
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(file.read_text())
        reasons = [entry["reason"] for entry in found.get("left_out", []) if entry["variant"] == name]
        rows = [row for row in found.get("rows", []) if row["variant"] == name]
        if reasons and not ended.returncode:
            raise UserError(reasons[0])
        for row in rows:  # as a share of the rate that this process has measured, like all rows of the file
            row["mfu_measured"] *= found["matmul_tflops"] / results.content["matmul_tflops"]
        if not rows:
            raise RuntimeError((reasons or [f"exit code {ended.returncode}"])[0] + "\n" + ended.stderr[-3000:])
        return rows
    return []
