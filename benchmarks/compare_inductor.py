"""Predicts the time of each op's kernels and of those that torch.compile makes of its definition, by the same counts.

    P=.rehearsal/venv/bin/python     # `make .rehearsal/venv/.ready` installs it
    $P benchmarks/rehearsal/run.py $P benchmarks/compare_inductor.py --json benchmarks/results/inductor_cost_sm90.json
    $P benchmarks/rehearsal/run.py $P benchmarks/compare_inductor.py --configs cifar10_uncond --ops output_layer

The ops are those of a training step and of drawing, with a bf16 body, at all shapes of the configurations. Both sides
are compiled for sm_90 by the same Triton, and `kernel_cost.py` predicts their times on an H100 from the machine code;
`inductor_kernels.py` finds Inductor's kernels. No time is measured. Where the model leaves a choice, it favours
Inductor: a kernel has the cheapest of its configurations, moves every tensor once, and pays nothing for accesses that
are not coalesced; what libraries and PyTorch compute beside the kernels (convolutions) is free, and listed.

The table has sums over a step for each op and direction, then the shapes at which ours loses.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from fastdiff.kernels import aot
from fastdiff.kernels.launch import Launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import kernel_cost
from benchmarks.aot import Job, results_of
from benchmarks.bench_train import chosen, load
from benchmarks.flag_types import at_least
from benchmarks.inductor_kernels import Traced, gradients, kernels_of
from benchmarks.op_cases import Case, cases_of, on
from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.precompile import META, launches_of
from fastdiff.runtime.machine import GPUS
from fastdiff.runtime.script import run_script

TRAINED = {"cifar10_uncond": 256, "imagenet64_270M": 128}
"""Batch sizes; images are drawn in batches of the same size."""
COPY = GPUS["H100"].copy_bytes
Row = dict[str, Any]


class Beside(TorchDispatchMode):
    """Notes the names of PyTorch's own operations, and how many bytes without memory they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        moved = sum(x.nbytes for x in tree_leaves((args, result)) if isinstance(x, Tensor) and x.is_meta)
        if moved and func.namespace == "aten" and not func.is_view and "empty" not in name and name != "detach":
            self.calls.append((name, moved))
        return result


def our_launches(case: Case) -> dict[str, Traced]:
    """What our implementation launches, forward and backward."""
    tensors = [on(META, x) for x in case.tensors]
    with Beside() as forward:
        launches = launches_of(lambda: case.run(*tensors))
    found = {"forward": _traced(launches, forward.calls)}
    if any(x.requires_grad for x in tensors):
        with Beside() as both:
            more = launches_of(lambda: gradients(case.run(*tensors), tensors))
        calls = list((Counter(both.calls) - Counter(forward.calls)).elements())
        found["backward"] = _traced(more[len(launches) :], calls)
    return found


def _traced(launches: list[Launch], calls: list[tuple[str, float]]) -> Traced:
    return Traced([[one] for one in launches], [name for name, _ in calls], [moved for _, moved in calls])


Predicted = dict[Any, kernel_cost.Cost | str]
"""The cost of each launch by its `key`, or the reason why there is none."""


def key(one: Launch) -> Any:
    """Equal for launches that cost the same."""
    return aot.code_key(one), kernel_cost.work_key(one)


def predicted(launches: Iterable[Launch], processes: int) -> Predicted:
    """Compile all launches, each kind once. What doesn't compile, or has loops that can't be counted, has no cost."""
    jobs = {key(one): Job([one], kernel_cost.ARCH, True) for one in launches}
    costs: Predicted = {}
    for name, future in zip(jobs, results_of(list(jobs.values()), processes), strict=True):
        try:
            result = future.result()
            costs[name] = result.costs[0] if result.costs else result.unknown
        except Exception as error:  # the compiler's, of any kind
            costs[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        print(f"{len(costs)} of {len(jobs)} compiled", end="\r", file=sys.stderr, flush=True)
    return costs


def summed(traced: Traced, costs: Predicted) -> Row:
    """Microseconds and bytes of launches, each in the cheapest of its configurations, and of what is beside them.

    PyTorch's operations take the time of a copy of as many bytes.
    """
    seconds = [kernel_cost.RAMP + moved / COPY for moved in traced.other_bytes]
    row: Row = {"launches": len(traced.launches) + len(seconds), "bytes": sum(traced.other_bytes)}
    row["others"] = traced.others
    for candidates in traced.launches:
        found = [costs[key(one)] for one in candidates]
        known = [cost for cost in found if isinstance(cost, kernel_cost.Cost)]
        if not known:
            return {**row, "failed": f"{candidates[0].kernel.__name__}: {found[0]}"}
        best = min(known, key=lambda cost: cost.seconds(COPY))
        seconds.append(best.seconds(COPY))
        row["bytes"] += best.dram_bytes
    return {"us": round(1e6 * sum(seconds), 2), **row}


def compare(cases: list[tuple[str, Case]], processes: int) -> list[Row]:
    """A row for each case of a step, and each direction."""
    sides: list[tuple[Traced, Traced]] = []
    rows: list[Row] = []
    for i, (step, case) in enumerate(cases):
        with ops.using("reference"):
            compiled = kernels_of(case.run, [on(torch.device("cuda"), x) for x in case.tensors], **case.options)
        for direction, ours in our_launches(case).items():
            sides.append((ours, compiled[direction]))
            rows.append({"step": step, "op": case.op, "shape": case.shape, "direction": direction})
            rows[-1] |= {"count": case.count, "elements": case.elements}
        print(f"{i + 1} of {len(cases)} traced", end="\r", file=sys.stderr, flush=True)
    costs = predicted((one for both in sides for side in both for some in side.launches for one in some), processes)
    for row, (ours, theirs) in zip(rows, sides, strict=True):
        row |= {"ours": summed(ours, costs), "inductor": summed(theirs, costs)}
        if "us" in row["ours"] and "us" in row["inductor"]:
            row["ratio"] = round(row["inductor"]["us"] / row["ours"]["us"], 3)
    return rows


HEADS = (
    *("op", "direction", "shapes", "ours: us", "launches", "bytes per element"),
    *("Inductor: us", "launches", "bytes per element", "beside them", "Inductor / ours", "of each shape"),
)


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown: sums over a step for each op and direction, then the shapes where ours loses or a time is missing."""
    for step in dict.fromkeys(row["step"] for row in rows):
        alike: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            if row["step"] == step:
                alike[row["op"], row["direction"]].append(row)
        yield from (f"`{step} bf16`, predicted for an H100, a step's sum:", "")
        yield from (f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|")
        for (op, direction), some in alike.items():
            yield f"| {op} | {direction} | {len(some)} | {' | '.join(_cells(some))} |"
        yield ""
    for row in rows:
        if row.get("ratio", 0) < 1:
            known = (str(row[side].get("us", row[side].get("failed"))) for side in ("ours", "inductor"))
            label = " ".join(row[name] for name in ("step", "op", "direction", "shape"))
            yield f"- {label}: {row.get('ratio')} ({', '.join(known)})"


def _cells(rows: list[Row]) -> Iterator[str]:
    known = [row for row in rows if "ratio" in row]
    total = lambda side, name: sum(row["count"] * row[side][name] for row in known)
    elements = sum(row["count"] * row["elements"] for row in known)
    for side in ("ours", "inductor"):
        us = f"{total(side, 'us'):.4g}" if known else "-"
        yield from (us, f"{total(side, 'launches')}", f"{total(side, 'bytes') / max(1, elements):.1f}")
    yield ", ".join(sorted({name for row in rows for name in row["inductor"]["others"]}))
    ratios = [row["ratio"] for row in known]
    yield f"{total('inductor', 'us') / total('ours', 'us'):.2f}" if known else "-"
    yield f"{min(ratios):.2f} to {max(ratios):.2f}" if len(known) > 1 else ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="all", help=f"of {', '.join(TRAINED)} (default: all)")
    parser.add_argument("--ops", default="all", help="names of ops, as in the table (default: all)")
    parser.add_argument("--processes", type=at_least(1), default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all rows here as well")
    args = parser.parse_args(argv)
    if not hasattr(ctypes.CDLL(None), "rehearsal_counts"):
        raise UserError("there is no simulated GPU here; start this by benchmarks/rehearsal/run.py")
    steps = chosen(args.configs, list(TRAINED), list(TRAINED), "--configs")
    cases = [(f"{name} {TRAINED[name]}", case) for name in steps for case in cases_of(load(name), TRAINED[name])]
    known = list(dict.fromkeys(case.op for _, case in cases))
    wanted = chosen(args.ops, known, known, "--ops")
    rows = compare([(step, case) for step, case in cases if case.op in wanted], args.processes)
    if args.json:
        head = {"predicted": True, "arch": kernel_cost.ARCH, "torch": torch.__version__, "triton": triton.__version__}
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        args.json.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
    print("\n".join(table(rows)))


if __name__ == "__main__":
    run_script(main, "compare_inductor.py")
