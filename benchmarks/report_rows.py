"""The rows of a results file of bench_train.py and bench_sampling.py, and the roofline of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import roofline
from benchmarks.proof_log import BASELINES
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.models.cost import Operation
from fastdiff.runtime.machine import find

ORDER = (*BASELINES, "ours")
"""The order of variants; others follow in the file's order."""


OTHERS = ("splits", "left_out", "launches", "sustained", "loader")
"""The lists of a file beside its rows."""


@dataclass(frozen=True)
class Row:
    """One measured variant. Triples are (first quartile, median, third quartile)."""

    config: str
    variant: str
    precision: str
    batch: int
    ms: tuple[float, float, float]
    images_per_second: tuple[float, float, float]
    ratio: tuple[float, float, float] | None
    """The time of the variant `ratio_to` over this one's, of the same case; above 1 is faster."""
    ratio_to: str
    mfu: float | None
    """Share of the device's peak, by the operations of the network as improved-diffusion defines it."""
    mfu_measured: float | None
    """The same as a share of the rate of matrix products that was measured with the results."""
    peak_memory_gb: float | None
    start_seconds: float | None
    solver: str = ""
    """The solver of drawing, with its steps; empty for a training step."""
    evaluations_per_second: tuple[float, float, float] | None = None
    """Evaluations of the network while drawing: images times evaluations per image."""
    computes: str = ""
    """The precision in which this variant computes, where that isn't the case's `precision`."""
    executed_share: float | None = None
    """Operations that this variant executes, as a share of the network's."""
    host_ms: float | None = None
    """The time in which a GPU's host launches a step."""
    launches: dict[str, float] | None = None
    """The host's calls in a step, by kind."""

    @property
    def name(self) -> str:
        """The variant, with its precision in brackets where that isn't the case's."""
        return self.variant + (f" ({self.computes})" if self.computes else "")

    def executed(self, share: float | None) -> float | None:
        """A share of a peak by the network's operations, as one by the executed operations."""
        return None if share is None or self.executed_share is None else share * self.executed_share

    @property
    def rate(self) -> tuple[float, float, float]:
        """The rate in the chart: evaluations per second of drawing, else images per second."""
        return self.evaluations_per_second or self.images_per_second


@dataclass(frozen=True)
class Results:
    """A results file: the machine, the rows, and for drawing how the time is spent."""

    place: dict[str, Any]
    rows: list[Row]
    splits: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Variants without a row, and the reasons."""
    launches: list[dict[str, Any]] = field(default_factory=list)
    """Launches in a step of ours, counted without a GPU."""
    sustained: list[dict[str, Any]] = field(default_factory=list)
    loader: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sampling(self) -> bool:
        return any(row.evaluations_per_second for row in self.rows)

    def cases(self) -> dict[str, list[Row]]:
        """Rows by configuration, batch and precision, in the order of ORDER."""
        made: dict[str, list[Row]] = {}
        for row in self.rows:
            name = f"{row.config}, batch {row.batch}, {row.precision}" + (f", {row.solver}" if row.solver else "")
            made.setdefault(name, []).append(row)
        return {name: sorted(rows, key=_rank) for name, rows in made.items()}


def plain_name(variant: str) -> str:
    """A variant's name without the batch and precision in brackets that gpu_proof.py's rows may have."""
    return variant.split(" (")[0]


def _rank(row: Row) -> int:
    name = plain_name(row.variant)
    return ORDER.index(name) if name in ORDER else len(ORDER)


@dataclass(frozen=True)
class Bounds:
    """Images per second by the roofline: at all of both rates, and at 80% of the products' and 90% of the copies'."""

    ceiling: float
    target: float


def read(path: Path) -> Results:
    """Read a file that bench_train.py or bench_sampling.py wrote. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        rows = [row_of(entry) for entry in content["rows"]]
        place = {name: content[name] for name in ("device", "torch", "commit", "date", "command", "threads")}
        place |= {name: float(content[name]) for name in ("matmul_tflops", "copy_gbs")}
        others = {name: list(content.get(name, [])) for name in OTHERS}
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give a file of benchmarks/bench_train.py") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not what benchmarks/bench_train.py writes: {what}") from None
    if not rows:
        raise UserError(f"{path} has no rows; give a file of a benchmark that came to its end")
    return Results(place, rows, **others)


def row_of(entry: dict[str, Any]) -> Row:
    names = ["ms", "images_per_second", *([] if entry["ratio"] is None else ["ratio"])]
    names += ["evaluations_per_second"] if "evaluations_per_second" in entry else []
    triples: dict[str, Any] = {"ratio": None, **{name: tuple(float(v) for v in entry[name]) for name in names}}
    for name in names:
        if len(triples[name]) != 3:
            raise ValueError(f"{name} must be three numbers, not {entry[name]}")
    numbers: dict[str, Any] = {
        name: None if entry.get(name) is None else float(entry[name])
        for name in ("mfu", "mfu_measured", "peak_memory_gb", "start_seconds", "executed_share", "host_ms")
    }
    texts: dict[str, Any] = {name: str(entry[name]) for name in ("config", "variant", "precision")}
    computes = str(entry.get("computes", entry["precision"]))
    texts["computes"] = "" if computes == entry["precision"] else computes
    ratio_to = str(entry.get("ratio_to", "reference"))
    texts["solver"] = f"{entry['solver']} {entry['steps']}" if "solver" in entry else ""
    more = {"ratio_to": ratio_to, "launches": entry.get("launches")}
    return Row(**texts, batch=int(entry["batch"]), **more, **triples, **numbers)


def _quick() -> Config:
    """The benchmark's own configuration; it is imported here because that imports the whole trainer."""
    try:
        from bench_train import load
    except ImportError:
        from benchmarks.bench_train import load
    return load("quick")


@functools.cache
def _known(config: str, precision: str) -> tuple[list[Operation], int] | None:
    """A configuration's operations, and its optimiser's bytes per parameter."""
    try:
        settings = _quick() if config == "quick" else roofline.load_config(config)
    except UserError:
        return None
    return roofline.operations_of(settings, precision), roofline.optimiser_bytes_of(settings, precision)


def bounds(results: Results, row: Row) -> Bounds | None:
    """The roofline of a row's configuration, batch and precision.

    None for a configuration that isn't known, for drawing, and for fp32 on a GPU, whose rates are those of 16-bit
    products.
    """
    known = None if row.solver else _known(row.config, row.precision)  # the roofline is training's
    if known is None:
        return None
    ops, optimiser_bytes = known
    place = results.place
    gpu = find(place["device"])
    if gpu and row.precision == "fp32":
        return None
    if gpu:
        machine = roofline.machine_for(place["device"])
    else:
        machine = roofline.Machine(place["device"], place["matmul_tflops"] * 1e12, place["copy_gbs"] * 1e9, None)
    rates = [
        roofline.predict(
            ops,
            row.batch,
            machine,
            convolution_efficiency=products,
            copy_efficiency=copies,
            launch_us=2.0 if gpu else 0.0,  # a CPU launches nothing
            optimiser_bytes=optimiser_bytes,
        ).images_per_second
        for products, copies in ((1.0, 1.0), (0.8, 0.9))
    ]
    return Bounds(*rates)


def main_row(rows: Sequence[Row]) -> Row:
    """The row whose roofline stands for its case: ours, or the first."""
    return next((row for row in rows if row.variant == "ours"), rows[0])
