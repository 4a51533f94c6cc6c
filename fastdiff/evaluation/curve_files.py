"""Writes the rows of `curves.Curves` as a Markdown table, a plot, and a picture of the first images of each row."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastdiff.runtime.files import atomic_write

Row = dict[str, Any]
SHARES = ("is", "precision", "recall")
"""Metrics of which more is better; they have a linear axis."""
_STYLES = {"uniform": "-o", "quadratic": "-.d", "logsnr": "--s", "karras": ":^"}
_LABEL, _GAP, _LEAST = 280, 4, 18
"""Pixels of a strip's names, between its lines, and the least height of a line."""


def name_of(row: Row) -> str:
    """What tables and pictures call a row, such as "dpmpp_2m 20 logsnr, guidance 1.5"."""
    steps = f"{row['steps']} {row['spacing']}" if row["steps"] else "all steps"
    guided = f", guidance {row['guidance']:g}" if row["guidance"] != 1 else ""
    return f"{row['solver']} {steps}{guided}"


def is_better_larger(metric: str) -> bool:
    """Whether more of a metric is better; it may be named with its network, as in precision[NETWORK]."""
    return metric.partition("[")[0] in SHARES


def ordered(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows by evaluations, and the best by the metric first among those with as many."""
    sign = -1 if is_better_larger(metric) else 1
    return sorted(rows, key=lambda row: (row["evaluations"], sign * row["scores"][metric]["value"], name_of(row)))


def shown(score: dict[str, float]) -> str:
    """A score and its spread with two digits of the spread, such as "7.5 ± 3.6"; without one, four digits."""
    value, spread = score["value"], score.get("spread")
    digits, least = (2, spread) if spread else (4, abs(value) or 1.0)
    decimals = max(0, digits - 1 - math.floor(math.log10(least)))
    return f"{value:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def table(content: dict[str, Any], finding: str) -> str:
    """The content of a JSON file of curves as Markdown: what was compared, the table, and `finding`."""
    rows, metrics, floor = content["rows"], content["metrics"], content["floor"]
    reference, features = content["reference"], content["features"]
    against = ""
    if reference:
        against = f" against {reference['path']} ({reference.get('count') or 'an unknown number of'} images)"
    devices = " and ".join(sorted({row["device"] for row in rows}))
    classes = any(row["of_its_class"] is not None for row in rows)
    heads = ["solver", "steps", "spacing", "guidance", "evaluations", *metrics]
    heads += [*(["of its class"] if classes else []), "seconds", "images/s"]
    text = {"solver", "spacing"}
    lines = [
        f"# Quality against evaluations: {Path(content['model']).name}",
        "",
        f"{content['num_samples']} samples each, drawn on {devices}{against}; features of {features['network']}, "
        f"{features['weights']}, {features['precision']}. Spreads are deviations over resamplings or subsets of the "
        "images. Guidance other than 1 runs the network on two inputs in an evaluation. Seconds are those of drawing, "
        "first batch included.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join('---' if head in text else '---:' for head in heads)}|",
    ]
    for row in rows:
        cells = [row["solver"], str(row["steps"]) if row["steps"] else "all", row["spacing"] if row["steps"] else "–"]
        cells += [f"{row['guidance']:g}" if row["guidance"] != 1 else "–", str(row["evaluations"])]
        cells += [shown(row["scores"][metric]) for metric in metrics]
        if classes:
            cells.append("–" if row["of_its_class"] is None else f"{row['of_its_class']:.1%}")
        cells += [f"{row['seconds']:.3g}", f"{row['images_per_second']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    if floor:
        values = ", ".join(f"{metric} {shown(score)}" for metric, score in floor.items())
        lines += ["", f"The reference against itself, as many images against the others: {values}."]
    return "\n".join([*lines, "", f"{finding[:1].upper()}{finding[1:]}."]) + "\n"


def write_plots(paths: Sequence[Path], content: dict[str, Any]) -> list[str]:
    """Draw each metric against evaluations, a line per solver, spacing and guidance, into files by their endings.

    Without matplotlib nothing is drawn, and a line says so.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return ["there is no plot: it needs matplotlib (pip install 'matplotlib>=3.8')"]
    rows, metrics = content["rows"], content["metrics"]
    lines: dict[str, list[Row]] = {}
    for row in rows:  # all steps of a chain are spread uniformly
        spacing = row["spacing"] or "uniform"
        guided = f", guidance {row['guidance']:g}" if row["guidance"] != 1 else ""
        lines.setdefault(f"{row['solver']} {spacing}{guided}", []).append(row)
    colours = {solver: f"C{i % 10}" for i, solver in enumerate(sorted({row["solver"] for row in rows}))}
    weights = sorted({row["guidance"] for row in rows} - {1.0})
    # Text stays text in an SVG, and equal results make equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdiff", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(9, 0.7 + 3.8 * len(metrics)), facecolor="white", layout="constrained")
        panels = figure.subplots(len(metrics), squeeze=False)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            for name, line in sorted(lines.items()):
                first, scores = line[0], [row["scores"][metric] for row in line]
                paleness = weights.index(first["guidance"]) + 1 if first["guidance"] != 1 else 0
                axes.errorbar(
                    [row["evaluations"] for row in line],
                    [score["value"] for score in scores],
                    [score.get("spread") or 0.0 for score in scores],
                    fmt=_STYLES[first["spacing"] or "uniform"],
                    color=colours[first["solver"]],
                    label=name,
                    alpha=1 - 0.7 * paleness / (len(weights) + 1),
                    markerfacecolor="white" if paleness else None,
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                )
            if metric in content["floor"]:
                value = content["floor"][metric]["value"]
                axes.axhline(value, color="#6b7280", linewidth=1, linestyle=(0, (1, 1.6)), label="reference itself")
            least = min(row["scores"][metric]["value"] for row in rows)
            log = not is_better_larger(metric) and least > 0
            axes.set(xscale="log", yscale="log" if log else "linear")
            axes.set_ylabel(metric, parse_math=False)  # a file's name may hold a $
            ticks = _spaced([row["evaluations"] for row in rows])
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.grid(color="#e6e8eb", linewidth=0.8)
        panels[-1].set_xlabel("evaluations of the network per image")
        figure.suptitle(Path(content["model"]).name, x=0.02, ha="left", weight="bold", parse_math=False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5, frameon=False)
        for path in paths:
            buffer = io.BytesIO()
            kind = path.suffix[1:]
            figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            with atomic_write(path) as file:
                file.write(buffer.getvalue())
    return []


def _spaced(values: Sequence[int]) -> list[int]:
    """Numbers with room for their labels on a logarithmic axis, of close ones those that occur most."""
    kept: list[int] = []
    for value, _ in Counter(values).most_common():
        if all(max(value, other) > 1.15 * min(value, other) for other in kept):
            kept.append(value)
    return sorted(kept)


def write_strip(path: Path, rows: Sequence[Row], images: dict[str, np.ndarray]) -> None:
    """Write a PNG of the first images [n, H, W, C] uint8 of every row that has some, a line each, by `name_of`."""
    names = [name for name in map(name_of, rows) if name in images]
    if not names:
        return
    count, height, width, channels = images[names[0]].shape
    scale = max(1, 32 // height)
    pitch = max(scale * height, _LEAST) + _GAP
    mode, white = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    canvas = Image.new(mode, (_LABEL + count * scale * width, len(names) * pitch), white)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, name in enumerate(names):
        draw.text((4, i * pitch), name, fill=0 if channels == 1 else (0, 0, 0), font=font)
        line = np.concatenate(list(images[name]), axis=1).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas.paste(Image.fromarray(line[:, :, 0] if channels == 1 else line), (_LABEL, i * pitch))
    about = PngInfo()
    about.add_text("rows", json.dumps({"names": names, "shape": [count, height, width, channels]}))
    with atomic_write(path) as file:
        canvas.save(file, "PNG", pnginfo=about)


def read_strip(path: Path) -> dict[str, np.ndarray]:
    """The images by `name_of` in a picture of `write_strip`; empty where there is none, or another."""
    try:
        with Image.open(path) as picture:
            about = json.loads(picture.text["rows"])  # type: ignore[attr-defined]
            pixels = np.asarray(picture)
        count, height, width, channels = about["shape"]
        scale = max(1, 32 // height)
        pitch = max(scale * height, _LEAST) + _GAP
        found = {}
        for i, name in enumerate(about["names"]):
            line = pixels[i * pitch : i * pitch + scale * height : scale, _LABEL::scale]
            found[str(name)] = line.reshape(height, count, width, channels).transpose(1, 0, 2, 3)
        return found
    except (OSError, SyntaxError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError):
        return {}
    except Image.DecompressionBombError:  # more pixels than Pillow reads
        return {}
