"""Measures how far the images of each solver, in few steps and many, are from real ones, with one checkpoint.

    python benchmarks/sampling_quality.py --model_path .demo/run --data_dir .demo/digits/train --json quality.json \\
        --markdown quality.md --chart quality.svg --strip quality.png

A small classifier is trained on the data. The distance of a row is Fréchet's (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500) between the classifier's 64 features of the drawn images and of the real ones, the
mean over random subsets of --compare images, because the distance of a sample falls with its size; its spread is the
standard deviation over resamplings with replacement. The floor is that of as many real images from the others.
`of its class` is the share of drawn images that the classifier assigns to the class that was requested.

All rows draw the same images by number. Each row is written when it is done, and rows that --json holds are not drawn
again. For a network of 0.1 GFLOP, all rows take half an hour of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.image_features import (
    FEATURES,
    Classifier,
    Moments,
    distance_and_spread,
    noise_floor,
    seen,
    train_classifier,
)
from fastdiff.config.checkpoint import Network, open_checkpoint, open_network
from fastdiff.config.load import describe
from fastdiff.errors import UserError, blaming
from fastdiff.images.labels import index_images
from fastdiff.images.pixels import MODES, load_image
from fastdiff.runtime.machine import device_name, use_free_cores
from fastdiff.runtime.processes import current
from fastdiff.runtime.script import run_script
from fastdiff.sampling.labels import Labels
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import SampleSettings

SHOWN = 10  # images of each row in the strip


@dataclass(frozen=True)
class Row:
    """A way to draw: steps 0 is the whole chain; a guidance other than 1 needs a weaker checkpoint or a null class."""

    solver: str
    steps: int
    spacing: str = "uniform"
    guidance: float = 1.0

    @property
    def name(self) -> str:
        steps = f" {self.steps}" if self.steps else ""
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.solver}{steps}{f' {self.spacing}' if self.steps else ''}{guided}"


ROWS = (
    *(Row("dpmpp_2m", steps, spacing) for steps in (20, 10) for spacing in ("uniform", "logsnr", "karras")),
    *(Row("dpmpp_3m", 20, spacing) for spacing in ("uniform", "logsnr")),
    *(Row("dpmpp_2m_sde", 20, spacing) for spacing in ("uniform", "logsnr", "karras")),
    *(Row("dpmpp_2m_sde", 10, spacing) for spacing in ("uniform", "logsnr")),
    *(Row("unipc", steps, spacing) for steps in (20, 10) for spacing in ("uniform", "logsnr")),
    Row("heun", 10),  # 19 evaluations
    Row("heun", 10, "karras"),
    *(Row("ddim", steps) for steps in (20, 10)),
    *(Row("ddpm", steps) for steps in (20, 10)),
    *(Row("dpmpp_2m", 20, "logsnr", weight) for weight in (1.5, 2.5)),
    *(Row(solver, 50) for solver in ("ddim", "ddpm")),
    *(Row("ddpm", steps) for steps in (250, 0, 100)),
)


# --- drawing ---


@dataclass
class Study:
    """A checkpoint, the real images, and the classifier that judges."""

    network: Network
    guide: Network | None
    device: torch.device
    judge: Classifier
    real: Moments
    args: argparse.Namespace

    def sampler(self, row: Row, count: int) -> Sampler:
        settings = SampleSettings(
            solver=row.solver,  # type: ignore[arg-type]
            steps=row.steps,
            spacing=row.spacing,  # type: ignore[arg-type]
            guidance=row.guidance,
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            precision=self.args.precision,
            compile=False,
        )
        guide = self.guide if row.guidance != 1 else None
        labels = Labels(tuple(range(self.network.known_classes))) if self.network.settings.class_cond else None
        return Sampler(self.network, settings, self.device, labels=labels, guide=guide, count=count)

    def measure(self, row: Row) -> dict[str, Any]:
        """Draw and judge one row."""
        evaluations = self.sampler(row, 1).table.num_evaluations
        count = self.args.num_samples if evaluations <= 60 else self.args.slow_samples
        sampler = self.sampler(row, count)
        start = time.perf_counter()
        drawn = sampler.draw(np.arange(count))
        seconds = time.perf_counter() - start
        features, classes = seen(self.judge, drawn.images, self.device)
        distance, spread = distance_and_spread(features, self.real, self.args.compare)
        asked = drawn.labels
        return {
            **asdict(row),
            "evaluations": evaluations,
            "images": count,
            "distance": distance,
            "spread": spread,
            "accuracy": None if asked is None else float((classes == asked).mean()),
            "seconds": seconds,
            "evaluations_per_second": count * evaluations / seconds,
        }


def read_network(model_path: str, precision: str, device: torch.device, flag: str = "--model_path") -> Network:
    """Open a checkpoint that stores its kind, which must be a plain network."""
    with blaming(flag):
        checkpoint = open_checkpoint(model_path)
        if checkpoint.info.get("kind") != "unet":
            raise UserError(f"{checkpoint.file} does not say that it is a plain network; give a checkpoint of train.py")
        config = describe(checkpoint)
        whole = config.diffusion.model_copy(update={"timestep_respacing": ""})
        return open_network(config.model, whole, checkpoint, precision, device)


def read_images(folder: Path, network: Network) -> tuple[np.ndarray, np.ndarray, int]:
    """(images [N, H, W, C] uint8, labels [N], how many classes) of a folder, as the network is trained on them."""
    listing = index_images(folder, "auto", network.class_names or None)
    settings = network.settings
    mode = MODES[settings.in_channels]
    images = [load_image(listing.path(i), settings.size_hw, mode) for i in range(len(listing.names))]
    return np.stack(images), listing.labels, len(listing.class_names)


def measure_all(study: Study, report: dict[str, Any], save: Any) -> None:
    """Measure every row that the report lacks, in order."""
    done = {Row(**{name: row[name] for name in asdict(ROWS[0])}) for row in report["rows"]}
    for row in wanted(study):
        if row not in done:
            report["rows"].append(study.measure(row))
            print(line_of(report["rows"][-1]), flush=True)
            save()


def wanted(study: Study) -> Iterator[Row]:
    """The rows that are possible with this checkpoint."""
    null_class = study.network.settings.class_cond and getattr(study.network.settings, "null_class", False)
    for row in study.args.rows:
        if row.guidance != 1 and study.guide is None and not null_class:
            print(f"{row.name}: left out, the model has no null class; name a weaker checkpoint by --guide_model_path")
        else:
            yield row


# --- tables and pictures ---


def name_of(row: dict[str, Any]) -> str:
    return Row(**{name: row[name] for name in asdict(ROWS[0])}).name


def line_of(row: dict[str, Any]) -> str:
    accuracy = "" if row["accuracy"] is None else f"  of its class {row['accuracy']:6.1%}"
    return (
        f"{name_of(row):34}{row['evaluations']:5} evaluations  distance {row['distance']:8.2f} ± {row['spread']:.2f}"
        f"{accuracy}  {row['images']} images in {row['seconds']:.0f} s"
    )


def finding(report: dict[str, Any]) -> str:
    """A sentence with the best distance within 20 evaluations, the whole chain's and that of real images."""
    few = [row for row in report["rows"] if row["evaluations"] <= 20 and row["guidance"] == 1]
    whole = [row for row in report["rows"] if not row["steps"]]
    floor = f"real images {report['floor']['distance']:.2f} ± {report['floor']['spread']:.2f}"
    parts = [f"{name_of(row)} {row['distance']:.2f} ± {row['spread']:.2f}" for row in whole]
    if few:
        best = min(few, key=lambda row: row["distance"])
        parts.insert(0, f"best within 20 evaluations {name_of(best)} {best['distance']:.2f} ± {best['spread']:.2f}")
    return "distances: " + ", ".join([*parts, floor])


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: a heading, the model and machine, and the table."""
    floor, judge = report["floor"], report["classifier"]
    lines = [
        "# Few steps against many",
        "",
        f"{report['model']}, trained on {report['real_images']} images of {report['size']}; {report['device']}, "
        f"{report['threads']} threads, torch {report['torch']}, {report['date']}, commit {report['commit'][:10]}. "
        f"`{report['command']}`",
        "",
        f"Distance: Fréchet's, in {FEATURES} features of a classifier that is right on {judge['accuracy']:.1%} of "
        f"{judge['images']} {judge['of']}; the mean over subsets of {report['compare']} images, ± the deviation over "
        f"resamplings. As many real images are {floor['distance']:.2f} ± {floor['spread']:.2f} away from the others.",
        "",
        "| solver | steps | spacing | guidance | evaluations | distance | of its class | images | s | evaluations/s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(report["rows"], key=lambda row: (row["evaluations"], row["distance"])):
        cells = [
            row["solver"],
            str(row["steps"]) if row["steps"] else "all",
            row["spacing"] if row["steps"] else "–",
            f"{row['guidance']:g}" if row["guidance"] != 1 else "–",
            str(row["evaluations"]),
            f"{row['distance']:.2f} ± {row['spread']:.2f}",
            "–" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
            str(row["images"]),
            f"{row['seconds']:.0f}",
            f"{row['evaluations_per_second']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", finding(report).capitalize() + "."]) + "\n"


def chart(report: dict[str, Any], file: Path) -> None:
    """Draw distance against evaluations, a line per solver and spacing."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        guided = f", guidance {row['guidance']:g}" if row["guidance"] != 1 else ""
        spacing = "" if row["solver"] == "ddpm" else f" {row['spacing']}"
        lines.setdefault(f"{row['solver']}{spacing}{guided}", []).append(row)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdiff", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(9, 5), facecolor="white", layout="constrained")
        axes = figure.subplots()
        colours = {solver: f"C{i}" for i, solver in enumerate(dict.fromkeys(row["solver"] for row in report["rows"]))}
        styles = {"uniform": "-o", "logsnr": "--s", "karras": ":^", "quadratic": "-.d"}
        for label, rows in lines.items():
            rows = sorted(rows, key=lambda row: row["evaluations"])
            x = [row["evaluations"] for row in rows]
            y, spread = ([row[name] for row in rows] for name in ("distance", "spread"))
            style = "x" if rows[0]["guidance"] != 1 else styles[rows[0]["spacing"]]
            axes.errorbar(
                x, y, spread, fmt=style, color=colours[rows[0]["solver"]], label=label, ms=4, lw=1.2, capsize=2
            )
        floor = report["floor"]["distance"]
        axes.axhline(floor, color="#6b7280", lw=1, ls=(0, (1, 1.6)), label="real images")
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network per image", ylabel="Fréchet distance")
        ticks = sorted({row["evaluations"] for row in report["rows"]})
        axes.set_xticks([tick for tick in ticks if tick != 19], [str(tick) for tick in ticks if tick != 19])
        axes.minorticks_off()
        axes.grid(color="#e6e8eb", lw=0.8)
        axes.set_title("Few steps against many", loc="left", weight="bold")
        axes.legend(fontsize=7.5, ncols=2, frameon=False)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def strip(study: Study, rows: list[Row], file: Path) -> None:
    """Write a picture of the first images of every row, a line per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 0.42 * len(rows) + 0.1), facecolor="white")
    for i, row in enumerate(rows):
        images = study.sampler(row, SHOWN).draw(np.arange(SHOWN)).images
        axes = figure.add_axes((0.36, 1 - (i + 0.97) / len(rows), 0.63, 0.94 / len(rows)))
        axes.imshow(np.concatenate(images, axis=1).squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        figure.text(0.01, 1 - (i + 0.5) / len(rows), row.name, size=8, va="center")
    figure.savefig(file, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="a checkpoint of train.py, or a run's folder")
    parser.add_argument("--data_dir", type=Path, required=True, help="the labelled images it was trained on")
    parser.add_argument("--test_dir", type=Path, help="others, to try the classifier on")
    parser.add_argument("--guide_model_path", default="", help="a weaker checkpoint, for the rows with guidance")
    parser.add_argument("--solvers", default="", help="rows of these solvers only, e.g. dpmpp_2m,ddpm")
    parser.add_argument("--num_samples", type=int, default=200, help="images per row of up to 60 evaluations")
    parser.add_argument("--slow_samples", type=int, default=200, help="images per row of more")
    parser.add_argument("--compare", type=int, default=200, help="images per distance")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("sampling_quality.json"),
        help="results; rows in it are not measured again (default: sampling_quality.json)",
    )
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--chart", type=Path, help=".svg or .png")
    parser.add_argument("--strip", type=Path, help=".png: the same images by every row")
    args = parser.parse_args(argv)
    if not 2 <= args.compare <= min(args.num_samples, args.slow_samples):
        parser.error(f"--compare {args.compare}: must be 2 to --num_samples and --slow_samples, so that rows compare")
    solvers = [word for word in args.solvers.split(",") if word]
    for word in solvers:
        if word not in {row.solver for row in ROWS}:
            parser.error(f"--solvers: {word} is not one of {', '.join(dict.fromkeys(row.solver for row in ROWS))}")
    args.rows = [row for row in ROWS if not solvers or row.solver in solvers]
    return args


def begin(study: Study, report: dict[str, Any]) -> dict[str, Any]:
    """The report in --json if it is of the same study, else the new one."""
    file = study.args.json
    if not file.is_file():
        return report
    before = json.loads(file.read_text())
    for name in ("digest", "seed", "compare", "precision", "real_images"):
        if before.get(name) != report[name]:
            raise UserError(f"--json: {file} is of another study ({name} {before.get(name)}, now {report[name]})")
    return {**report, "rows": before["rows"]}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = current().device
    if device.type == "cpu":
        use_free_cores()
    network = read_network(args.model_path, args.precision, device)
    guide = None
    if args.guide_model_path:
        guide = read_network(args.guide_model_path, args.precision, device, "--guide_model_path")
    images, labels, classes = read_images(args.data_dir, network)
    print(f"{len(images)} images of {classes} classes; training the classifier", flush=True)
    judge = train_classifier(images, labels, classes, device)
    features, _ = seen(judge, images, device)
    tried, truth = read_images(args.test_dir, network)[:2] if args.test_dir else (images, labels)
    right = float((seen(judge, tried, device)[1] == truth).mean())
    floor, floor_spread = noise_floor(features, labels, args.compare)
    print(f"classifier right on {right:.1%}; real images' distance {floor:.2f} ± {floor_spread:.2f}", flush=True)
    study = Study(network, guide, device, judge, Moments.of(features), args)
    model = network.settings
    given = {"num_samples": args.num_samples, "slow_samples": args.slow_samples, "compare": args.compare}
    report: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": date.today().isoformat(),
        "command": "python benchmarks/sampling_quality.py " + " ".join(f"--{name} {n}" for name, n in given.items()),
        "threads": torch.get_num_threads(),
        "model": f"{network.file.name}: {model.num_channels} channels, {network.diffusion.noise_schedule} chain of "
        f"{network.diffusion.diffusion_steps}",
        "digest": network.digest,
        "size": "x".join(map(str, (*model.size_hw, model.in_channels))),
        "seed": args.seed,
        "precision": args.precision,
        "compare": args.compare,
        "real_images": len(images),
        "classifier": {"accuracy": right, "images": len(tried), "of": "others" if args.test_dir else "of them"},
        "floor": {"distance": floor, "spread": floor_spread},
        "rows": [],
    }
    report = begin(study, report)

    def save() -> None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")

    measure_all(study, report, save)
    save()
    if args.markdown:
        args.markdown.write_text(markdown(report))
    if args.chart:
        chart(report, args.chart)
    if args.strip:
        strip(study, list(wanted(study)), args.strip)
    print(finding(report))


if __name__ == "__main__":
    run_script(main, "sampling_quality.py")
