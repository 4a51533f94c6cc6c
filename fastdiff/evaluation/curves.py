"""Quality against evaluations: the scores of several solvers, steps, spacings and guidances in one table and plot."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastdiff.config.checkpoint import Checkpoint
from fastdiff.config.sections import EvaluateConfig
from fastdiff.errors import UserError
from fastdiff.evaluation.collect import OUTPUT_OF
from fastdiff.evaluation.curve_files import (
    Row,
    is_better_larger,
    name_of,
    ordered,
    read_strip,
    shown,
    table,
    write_plots,
    write_strip,
)
from fastdiff.evaluation.drawing import Drawn, base_of
from fastdiff.evaluation.judge import Judge, label
from fastdiff.evaluation.moments import Moments
from fastdiff.evaluation.report import protocol_of, short_stem, writing_to
from fastdiff.evaluation.statistics import Described
from fastdiff.runtime.files import FileLock, LocksUnsupported, read_json, write_json, write_text
from fastdiff.runtime.processes import Processes
from fastdiff.sampling.build import Cascade
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import SampleSettings
from fastdiff.settings import affecting

FEW = 20
"""Evaluations within which the last line looks for the best row."""
HALVINGS = 4
"""Random choices of reference images over which the value of the reference against itself is averaged."""
_VARIED = {"solver", "steps", "spacing", "guidance", "model_path"}
_OF_CASCADES = {"sr_model_path", "sr_preset", "sr_steps", "sr_timestep_respacing"}


class Curves:
    """The rows of one model, reference, feature network and number of samples, and their files.

    Files are NAME-HASH.json, .md, .svg, .png and -strip.png, written after each row. Rows that the JSON file holds are
    not drawn again, so that the same command goes on, and one with further steps adds its rows, also at the same time.
    """

    def __init__(
        self,
        folder: Path,
        config: EvaluateConfig,
        checkpoint: Checkpoint,
        judge: Judge | None,
        processes: Processes,
    ) -> None:
        """judge is None on all ranks but 0. Collective. Raises UserError for a damaged JSON file."""
        self.judge = judge
        self.images: dict[str, np.ndarray] = {}
        self.content: dict[str, Any] = {"rows": []}
        if judge:
            names = affecting(SampleSettings, "images", "network") - _VARIED - {"classifier_scale"} | _OF_CASCADES
            self._common: dict[str, Any] = {
                "num_samples": config.sample.num_samples,
                "metrics": [label(metric, judge.network) for metric in judge.metrics],
                "reference": judge.reference.summary() if judge.reference else None,
                "features": judge.network.describe(),
                "protocol": protocol_of(judge.settings),
            }
            drawing = {"model": checkpoint.digest, **config.sample.model_dump(mode="json", include=names)}
            drawing |= config.diffusion.model_dump(mode="json")
            if config.sample.guiding_classifier:
                drawing |= {name: getattr(config.sample, name) for name in ("classifier_path", "classifier_scale")}
            self.base = folder / f"{short_stem(checkpoint.file)}-{_hash([self._common, drawing])[:8]}"
            self.content = {"model": str(checkpoint.file), **self._common, "floor": self._read(judge), **self.content}
        found: list[Any] = [[row["identity"] for row in self.content["rows"]]]
        if processes.world_size > 1:
            dist.broadcast_object_list(found)
        self._known = set(found[0])
        if judge and self._known:
            print(f"{self.path('.json')} holds {len(self._known)} rows, which are not drawn again", flush=True)

    def path(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def holds(self, sampler: Sampler | Cascade) -> bool:
        """Whether there is a row of the images that this sampler draws."""
        return _hash(sampler.identity()) in self._known

    def add(self, sampler: Sampler | Cascade, drawn: Drawn, result: dict[str, Any] | None) -> None:
        """Add the row of a result, which is None on all ranks but 0, and write the files."""
        base, identity = base_of(sampler), sampler.identity()
        self._known.add(_hash(identity))
        if result is None:
            return
        row: Row = {
            "solver": base.settings.solver,
            "steps": base.settings.steps,
            "spacing": identity.get("spacing", ""),
            "guidance": base.settings.guidance,
            "evaluations": base.table.num_evaluations,
            "scores": result["scores"],
            "of_its_class": drawn.of_its_class,
            "seconds": drawn.seconds,
            "images_per_second": drawn.described.count / drawn.seconds,
            "device": result["device"],
            "time": result["time"],
            "identity": _hash(identity),
        }
        rows = [each for each in self.content["rows"] if name_of(each) != name_of(row)]
        self.content["rows"] = ordered([*rows, row], self.content["metrics"][0])
        self.content["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
        if drawn.first is not None:
            self.images[name_of(row)] = drawn.first
        self._write()

    def finish(self) -> list[str]:
        """Write the files; returns lines with the best row of few evaluations and with the files. For rank 0."""
        missing = self._write()
        endings = [".json", ".md", *([] if missing else [".svg", ".png"]), *(["-strip.png"] if self.images else [])]
        return [*missing, self._best(), f"curves in {self.base}{', '.join(endings)}"]

    def _write(self) -> list[str]:
        """Write all files, with rows that another command has added meanwhile; returns a line if there is no plot."""
        with writing_to(self.base.parent), ExitStack() as stack:
            with suppress(LocksUnsupported):
                stack.enter_context(FileLock(self.base.with_name(f".{self.base.name}.lock"), remove=True))
            names = {name_of(row) for row in self.content["rows"]}
            if others := [row for row in self._rows_of_file()[0] if name_of(row) not in names]:
                self.content["rows"] = ordered([*self.content["rows"], *others], self.content["metrics"][0])
                self.images = read_strip(self.path("-strip.png")) | self.images
            write_json(self.path(".json"), self.content)
            write_text(self.path(".md"), table(self.content, self._best()))
            write_strip(self.path("-strip.png"), self.content["rows"], self.images)
            return write_plots([self.path(".svg"), self.path(".png")], self.content)

    def _best(self) -> str:
        metric = self.content["metrics"][0]
        few = [row for row in self.content["rows"] if row["evaluations"] <= FEW]
        if not few:
            return f"no row has {FEW} evaluations or fewer"
        sign = -1 if is_better_larger(metric) else 1
        best = min(few, key=lambda row: sign * row["scores"][metric]["value"])
        return f"best within {FEW} evaluations: {name_of(best)}, {metric} {shown(best['scores'][metric])}"

    def _read(self, judge: Judge) -> dict[str, Any]:
        """Take over the rows of an earlier command; returns the value of the reference against itself by metric."""
        if not self.path(".json").is_file():
            return floor_of(judge, self._common["num_samples"])
        self.content["rows"], floor = self._rows_of_file()
        self.images = read_strip(self.path("-strip.png"))
        return floor

    def _rows_of_file(self) -> tuple[list[Row], dict[str, Any]]:
        """The rows in the JSON file and its floor; none where there is no file. Raises UserError for a damaged one."""
        path = self.path(".json")
        if not path.is_file():
            return [], {}
        before = read_json(path)
        try:
            rows = [row for row in before["rows"] if row["identity"] and row["evaluations"] >= 0]
            floor = dict(before["floor"])
            table({"model": "", **self._common, "rows": rows, "floor": floor}, "")  # looks at all entries
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path} holds no rows of a comparison; remove it, or give another --results_dir") from None
        return rows, floor


def floor_of(judge: Judge, num_samples: int) -> dict[str, dict[str, float]]:
    """The value of the reference against itself: metric → mean and deviation over HALVINGS random choices.

    As many reference images as there are samples, but at most half of them, are compared with the others. Empty where
    the features of the reference's images are not in memory.
    """
    reference = judge.reference
    metrics = tuple(name for name in judge.metrics if OUTPUT_OF[name] == "pool")
    if reference is None or not metrics or len(features := reference.features.get("pool", torch.zeros(0))) < 8:
        return {}
    size = min(num_samples, len(features) // 2)
    update = {"metrics": metrics, "resamplings": 0, "kid_subset_size": min(size, judge.settings.kid_subset_size)}
    settings = judge.settings.model_copy(update=update)
    generator = torch.Generator().manual_seed(settings.metric_seed)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(HALVINGS):
        order = torch.randperm(len(features), generator=generator)
        some, others = (
            Described(what, len(rows), {"pool": Moments.of(rows)}, {"pool": rows})
            for what, rows in (("some", features[order[:size]]), ("others", features[order[size:]]))
        )
        for name, score in Judge(settings, judge.network, others).score(some).scores.items():
            values[name].append(score.value)
    return {
        label(name, judge.network): {"value": float(np.mean(each)), "spread": float(np.std(each, ddof=1))}
        for name, each in values.items()
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
