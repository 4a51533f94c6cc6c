"""Makes tables and charts of the results of benchmarks/bench_train.py and bench_sampling.py, beside the roofline.

    python benchmarks/report.py benchmarks/results/train.json
    python benchmarks/report.py train.json --markdown train.md --chart train.svg --chart train.png
    python benchmarks/report.py results.jsonl --keep benchmarks/results          what gpu_proof.py found

Of gpu_proof.py's results --keep copies the file to gpu_NAME_DATE.jsonl, by the GPU and the day, with tables and charts
beside it. Drawing has a chart of its own there (NAME_sampling.svg), and a table of all parts follows the others.

Every row is one variant's training step, or its drawing (docs/benchmarks.md). Times are medians with quartiles. A
variant that computes in another precision than its case, as improved-diffusion does, has that in brackets.
There is a table and a panel for each configuration, precision and batch, and for each solver of drawing. Training has
the roofline of benchmarks/roofline.py, by the rates of the GPU that the results name, or else by the rates measured
with them. A configuration that isn't known here gets none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import proof_report
from benchmarks.report_rows import Results, Row, bounds, main_row, plain_name, read, row_of
from fastdiff.errors import UserError
from fastdiff.runtime.script import run_script

COLOURS = {
    "reference": "#8c939c",
    "reference+channels-last": "#a0a6ae",
    "reference+compile": "#b4bac2",
    "reference+max-autotune": "#c8cdd3",
    "diffusers": "#d9a441",
    "diffusers+max-autotune": "#e6c382",
    "ours": "#1f6f8b",
}
LEVER_OFF, INK, PALE = "#8fbccb", "#22272e", "#6b7280"


# --- Markdown ---


def markdown(results: Results) -> str:
    """The results as Markdown: a heading, the machine, and a table for each case."""
    place = results.place
    threads = f", {place['threads']} threads" if place["threads"] else ""
    lines = [
        f"# {_title(results)}",
        "",
        f"{place['device']}{threads}, torch {place['torch']}, {place['date']}, commit {str(place['commit'])[:10]}. "
        f"Matrix products reach {place['matmul_tflops']:.4g} TFLOP/s, copies {place['copy_gbs']:.4g} GB/s. "
        f"`{place['command']}`",
    ]
    if "note" in place:
        lines += ["", place["note"]]
    for name, rows in results.cases().items():
        lines += ["", f"## {name}", "", *_table(results, rows)]
    for entry in results.left_out:
        case = f"{entry['config']}, batch {entry['batch']}, {entry['precision']}"
        lines += ["", f"Left out: {entry['variant']} ({case}): {entry['reason']}"]
    lines += [*_split_table(results), *_more_tables(results)]
    return "\n".join(lines) + "\n"


def _title(results: Results) -> str:
    return "Sampling throughput" if results.sampling else "Training throughput"


def _split_table(results: Results) -> list[str]:
    """The table of how our time is spent while drawing; empty if that was not measured."""
    if not results.splits:
        return []
    lines = [
        "",
        "## Where our time goes",
        "",
        "| case | ms per evaluation | network | sampler's step | to the host | GPU idle | job of | files' share |",
        "|---|" + "---:|" * 7,
    ]
    for entry in results.splits:
        parts, job = entry["split"], entry["job"]
        shares = [f"{parts[name] / parts['all']:.1%}" for name in ("network", "step", "to_host")]
        idle = "–" if parts["gaps"] is None else f"{parts['gaps'] / parts['all']:.1%}"
        case = f"{entry['config']}, batch {entry['batch']}, {entry['precision']}, {entry['solver']}"
        cells = [case, _short(1e3 * parts["all"]), *shares, idle, f"{job['images']} images", f"{job['overhead']:.2%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _table(results: Results, rows: Sequence[Row]) -> list[str]:
    """The table of one case. A column without a single value is left out."""
    columns = [_cells(results, row) for row in rows]
    heads = [head for head in columns[0] if any(cells[head] != "–" for cells in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(cells[head] for head in heads) + " |" for cells in columns]
    others = dict.fromkeys(row.computes for row in rows if row.computes)
    if others:
        lines += ["", f"In brackets: a variant that computes in {' or '.join(others)}, not in {rows[0].precision}."]
    bound = bounds(results, main_row(rows))
    if bound:
        lines += [
            "",
            f"Roofline, a prediction: {_short(bound.ceiling)} images/s at all of both rates, {_short(bound.target)} at "
            "80% of the products' and 90% of the copies'.",
        ]
    return lines


def _cells(results: Results, row: Row) -> dict[str, str]:
    """A row's cells by the heads of their columns; "–" where a value is not known."""
    bound = bounds(results, row)
    low, middle, high = row.ms
    spread = f"{_short(middle)} ({_short(low)} to {_short(high)})"
    cells = {"variant": f"**{row.name}**" if row.variant == "ours" else row.name}
    if results.sampling:
        cells |= {"ms per evaluation": spread, "evaluations/s": _short(row.rate[1])}
    else:
        cells["ms per step"] = spread
    cells |= {
        "images/s": _short(row.images_per_second[1]),
        "× reference": _ratio(row),
        "MFU, model operations": _percent(row.mfu),
        "MFU, executed": _percent(row.executed(row.mfu)),
        "of matmul, model operations": _percent(row.mfu_measured),
        "of matmul, executed": _percent(row.executed(row.mfu_measured)),
        "of roofline": _percent(row.images_per_second[1] / bound.ceiling if bound else None),
        "host ms": "–" if row.host_ms is None else _short(row.host_ms),
        "launches": _launched(row.launches),
        "peak GB": "–" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.2f}",
        "start s": "–" if row.start_seconds is None else f"{row.start_seconds:.1f}",
    }
    return cells


def _launched(launches: dict[str, float] | None) -> str:
    if launches is None:
        return "–"
    return f"{launches['kernels']:.0f}" + (f" and {launches['graphs']:.0f} graphs" if launches["graphs"] else "")


def _more_tables(results: Results) -> list[str]:
    """The tables of sustained rates, of ours with its loader, and of launches counted without a GPU."""
    case = lambda entry: f"{entry['config']}, batch {entry['batch']}, {entry['precision']}"
    lines: list[str] = []
    if results.sustained:
        heads = ["case", "variant", "seconds", "images/s", "at first", "at last", "MHz, °C, W at first", "at last"]
        lines += ["", "## Rates in one go", "", "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * 6]
        for entry in results.sustained:
            numbers = [_short(entry[name]) for name in ("seconds", "images_per_second", "first", "last")]
            clocks = ["–" if said is None else ", ".join(f"{x:.0f}" for x in said) for said in entry["clocks"]]
            lines.append("| " + " | ".join([case(entry), entry["variant"], *numbers, *clocks]) + " |")
        windows = dict.fromkeys(f"{entry['window_seconds']:.3g}" for entry in results.sustained)
        lines += ["", f"At first and at last: of {' or '.join(windows)} seconds each."]
    if results.loader:
        heads = ["case", "loader", "images/s from files", "from memory", "waiting"]
        lines += ["", "## Ours, fed with JPEG files", "", "| " + " | ".join(heads) + " |", "|---|---|---:|---:|---:|"]
        for entry in results.loader:
            numbers = [_short(entry[name]) for name in ("images_per_second", "from_memory")]
            lines.append("| " + " | ".join([case(entry), entry["loader"], *numbers, f"{entry['waiting']:.2%}"]) + " |")
    for entry in results.launches:
        lines += ["", f"A GPU's launches in a step of ours ({case(entry)}), counted without one: "
                  f"{entry['fastdiff kernels']} of our kernels, {entry['library products']} products of cuDNN and "
                  "cuBLAS. What torch.compile makes of the rest isn't counted."]  # fmt: skip
    return lines


def _ratio(row: Row) -> str:
    """The ratio's median and quartiles, and the variant that it refers to if that isn't the reference."""
    if row.ratio is None:
        return "–"
    low, middle, high = row.ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" + ("" if row.ratio_to == "reference" else f" × {row.ratio_to}")


def _short(value: float) -> str:
    """A number with three significant digits, or without decimals from 100 on: 0.123, 12.3, 1234."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


# --- chart ---


def chart(results: Results, files: Sequence[Path]) -> None:
    """Draw images per second of every variant, a panel for each case, into files by their endings (svg, png, pdf).

    Raises UserError without matplotlib, or for a file that can't be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--chart needs matplotlib; pip install -e '.[benchmark]'") from error
    panels = results.cases()
    bars = [0.36 * len(rows) + 0.1 for rows in panels.values()]  # inches
    height = 1.65 + sum(bars) + 0.7 * (len(panels) - 1)
    longest = max(len(row.name) for row in results.rows)
    width, left = 6.7 + 0.074 * longest, 0.2 + 0.074 * longest
    # Text stays text in an SVG, and equal results make equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdiff", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(width, height), facecolor="white")
        grid = figure.add_gridspec(
            len(panels),
            1,
            height_ratios=bars,
            left=left / width,
            right=1 - 0.55 / width,
            top=1 - 1.05 / height,
            bottom=0.6 / height,
            hspace=0.7 * len(panels) / sum(bars),
        )
        lined = [_panel(figure.add_subplot(grid[i]), results, *panel) for i, panel in enumerate(panels.items())]
        place = results.place
        head = 1 - 0.28 / height
        unit = "evaluations of the network" if results.sampling else "images"
        title = f"{_title(results)}, {unit} per second"
        figure.text(0.15 / width, head, title, size=13, weight="bold", color=INK, va="center")
        where = (
            f"{place['device']}, torch {place['torch']}, {place['date']}; medians and quartiles, × the reference's rate"
        )
        figure.text(0.15 / width, head - 0.24 / height, where, size=8.5, color=PALE, va="center")
        if any(lined):
            note = (
                "Lines are predictions by benchmarks/roofline.py: the roofline (solid) at all of\n"
                "the matmul and copy rates, the target (dotted) at 80% and 90% of them."
            )
            figure.text(0.15 / width, 0.2 / height, note, size=8, color=PALE, va="center")
        for file in files:
            try:
                figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
            except (OSError, ValueError) as error:
                raise UserError(f"--chart {file} can't be written ({error}); name a .svg, .png or .pdf") from error


def _panel(axes: Any, results: Results, name: str, rows: Sequence[Row]) -> bool:
    """Draw the bars of one case; returns whether it has a roofline."""
    bound = bounds(results, main_row(rows))
    reach = max(max(row.rate[2] for row in rows), bound.ceiling if bound else 0)
    for i, row in enumerate(rows):
        low, middle, high = row.rate
        axes.barh(i, middle, height=0.68, color=COLOURS.get(plain_name(row.variant), LEVER_OFF), zorder=2)
        whiskers = [[max(0, middle - low)], [max(0, high - middle)]]
        axes.errorbar(middle, i, xerr=whiskers, color=INK, elinewidth=0.9, capsize=2.2, zorder=3)
        ratio = "" if row.ratio is None or plain_name(row.variant) == row.ratio_to else f"  {row.ratio[1]:.2f}×"
        ratio += f" {row.ratio_to}" if ratio and row.ratio_to != "reference" else ""
        axes.annotate(
            f"{_short(middle)}{ratio}",
            (high, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            weight="bold" if row.variant == "ours" else "normal",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
        )
    if bound:
        axes.axvline(bound.ceiling, color=INK, linewidth=1.3, zorder=1.5)
        axes.axvline(bound.target, color=INK, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1.5)
        shown = f"roofline {_short(bound.ceiling)}, target {_short(bound.target)}"
        axes.set_title(shown, loc="right", size=8, color=PALE, pad=5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.variant == "ours" else "normal")
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.16 * reach)
    axes.set_title(name, loc="left", size=10, weight="bold", color=INK, pad=5)
    axes.tick_params(length=0, colors=INK)
    axes.tick_params(axis="x", labelcolor=PALE, labelsize=8)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#c3c8cf")
    return bound is not None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file of bench_train.py, bench_sampling.py or gpu_proof.py")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of gpu_proof.py's results, keep all of it there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", action="append", default=[], help="write a bar chart, .svg or .png"
    )
    args = parser.parse_args(argv)
    if args.results.suffix == ".jsonl":
        report_proof(args)
    elif args.keep:
        raise UserError(f"--keep is for results.jsonl of gpu_proof.py, not for {args.results}; use --markdown, --chart")
    else:
        show([read(args.results)], "", args)


def report_proof(args: argparse.Namespace) -> None:
    """Show and, with --keep, keep what gpu_proof.py found."""
    found = proof_report.read(args.results)
    place = proof_report.place_of(found)
    if args.keep and place["mode"] != "real":
        raise UserError(f"--keep: {args.results} is of a {place['mode']} run, whose figures mean nothing")
    results = [Results(place, [row_of(entry) for entry in rows]) for rows in proof_report.cases_of(found)]
    base = Path(f"{args.keep}/{proof_report.name_of(found)}")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        Path(f"{base}.jsonl").write_text(args.results.read_text())
        args.markdown = args.markdown or Path(f"{base}.md")
        args.chart = args.chart or [Path(f"{base}.svg")]
    show(results, "\n" + proof_report.parts_table(found) + proof_report.figures_tables(found), args)
    if args.keep:
        print(f"\nkept as {base}.jsonl, .md and .svg")


def show(found: Sequence[Results], more: str, args: argparse.Namespace) -> None:
    """Print the tables, and write them and the charts to the files of the flags; drawing has a chart of its own."""
    text = "\n".join(map(markdown, found)) + more
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text)
    for results in found:
        second = "_sampling" if more and results.sampling else ""
        if args.chart:
            chart(results, [file.with_stem(file.stem + second) for file in args.chart])


if __name__ == "__main__":
    run_script(main, "report.py")
