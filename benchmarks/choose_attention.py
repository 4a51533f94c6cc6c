"""Writes fastdiff's table of measured choices of attention from what gpu_proof.py has timed.

    python benchmarks/gpu_proof.py --only machine attention
    python benchmarks/choose_attention.py .gpu_proof/results.jsonl               or a file kept in benchmarks/results

For each head size D and length L the way with the least median becomes the choice, for drawing (forward alone) and for
training (forward and backward together), summed over the configurations' shapes of this D and L. It replaces the
present choice only where its upper quartile is below the present one's lower quartile. Ways that refuse one of these
shapes, or can't be captured in a graph, are left out; so are shapes for which not every way was tried. Entries of other
GPUs, dtypes and sizes stay in the table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import proof_report
from fastdiff import ops
from fastdiff.attention_choices import FILE, WAYS, Entry, Key, read, write
from fastdiff.errors import UserError
from fastdiff.runtime.script import run_script

DIRECTIONS = {"drawing": ("forward",), "training": ("forward", "backward")}


def entries_of(rows: Sequence[dict[str, Any]], before: dict[Key, Entry]) -> list[Entry]:
    """The choices by the rows of gpu_proof.py, where `before` holds the present ones."""
    place = proof_report.place_of(rows)
    made = []
    for (dtype, D, L), shapes in _figures(rows).items():
        for work, directions in DIRECTIONS.items():
            key = Key(place["device"], dtype, D, L, work)
            parts = [(shape, direction) for shape in shapes.values() for direction in directions]
            times = {way: _sum([shape[direction, way] for shape, direction in parts]) for way in WAYS}
            known = {way: time for way, time in times.items() if time}
            if known:
                way = _choice(known, before[key].way if key in before else ops.expected_way(L, D))
                made.append(Entry(key, way, known, place["date"], place["torch"], place["triton"]))
    return made


def _figures(
    rows: Sequence[dict[str, Any]],
) -> dict[tuple[str, int, int], dict[str, dict[tuple[str, str], list[float]]]]:
    """(dtype, D, L) → shape → (direction, way) → quartile, median and quartile; empty where a way refuses the shape."""
    found: dict[tuple[str, int, int], dict[str, dict[tuple[str, str], list[float]]]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "figure" and row.get("section") == "attention" and "way" in row:
            size = {letter: int(number) for letter, number in re.findall(r"([BLND])(\d+)", row["shape"])}
            shape = found[row["dtype"], size["D"], size["L"]].setdefault(row["shape"], {})
            low, high = row.get("quartiles", (0, 0))
            by_graph = row.get("launched") == "graph"  # else the host's time is in the figure
            shape[row["direction"], row["way"]] = [low, row["microseconds"], high] if by_graph else []
    complete = 2 * len(WAYS)  # both directions
    kept = {
        key: {name: shape for name, shape in shapes.items() if len(shape) == complete} for key, shapes in found.items()
    }
    return {key: shapes for key, shapes in kept.items() if shapes}


def _sum(times: Sequence[list[float]]) -> list[float]:
    """The sums of lower quartiles, medians and upper quartiles; empty if one of the times is."""
    return [round(sum(part), 2) for part in zip(*times, strict=True)] if all(times) else []


def _choice(times: dict[str, list[float]], present: str) -> str:
    fastest = min(times, key=lambda way: times[way][1])
    return fastest if present not in times or times[fastest][2] < times[present][0] else present


def described(entry: Entry, before: Entry | None) -> str:
    """The printed line of an entry."""
    gpu, dtype, D, L, work = entry.key
    times = ", ".join(
        f"{way} {time[1]:g}" for way, time in sorted(entry.microseconds.items(), key=lambda item: item[1][1])
    )
    present = before.way if before else f"{ops.expected_way(L, D)}, by rule"
    return f"{gpu}, {dtype}, D {D}, L {L}, {work}: {entry.way} (before: {present}); microseconds: {times}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of gpu_proof.py")
    parser.add_argument("--to", type=Path, default=FILE, metavar="FILE", help="the table (default: %(default)s)")
    args = parser.parse_args(argv)
    rows = proof_report.read(args.results)
    mode = proof_report.place_of(rows)["mode"]
    if mode != "real":
        raise UserError(f"{args.results} is of a {mode} run, whose figures mean nothing")
    before = read(args.to) if args.to.exists() else {}
    made = entries_of(rows, before)
    if not made:
        raise UserError(
            f"{args.results} has no shape of attention timed in every way; run gpu_proof.py --only attention"
        )
    for entry in made:
        print(described(entry, before.get(entry.key)))
    try:
        write(args.to, [*(before | {entry.key: entry for entry in made}).values()])
    except OSError as error:
        raise UserError(
            f"--to {args.to} can't be written ({error.strerror}); name a file in a folder that exists"
        ) from error
    print(f"written to {args.to}")


if __name__ == "__main__":
    run_script(main, "choose_attention.py")
