"""Tables and charts show the numbers of an invented results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import refusal
from PIL import Image

from benchmarks import report, report_rows, roofline
from fastdiff.errors import UserError

VARIANTS = {"ours -graph": 3.0, "ours": 4.0, "reference": 1.0, "diffusers": 1.5, "reference+compile": 2.0}
VARIANTS |= {"reference+channels-last": 1.25, "reference+max-autotune": 2.25, "diffusers+max-autotune": 1.75}


def entry(config: str, variant: str, rate: float, precision: str = "bf16", batch: int = 64) -> dict[str, Any]:
    ratio = VARIANTS[variant]
    images = rate * ratio
    return {
        "config": config,
        "variant": variant,
        "precision": precision,
        "batch": batch,
        "ms": [1e3 * batch / images * share for share in (0.98, 1, 1.03)],
        "images_per_second": [images * share for share in (0.97, 1, 1.02)],
        "computes": "fp16" if variant == "reference" and precision == "bf16" else precision,
        "executed_share": 0.9 if variant == "ours" else 1.0,
        "host_ms": 2.5,
        "launches": {"kernels": 3.0, "graphs": 2.0, "copies and fills": 1.0, "waits": 0.0},
        "ratio": [ratio * share for share in (0.97, 1, 1.02)],
        "mfu": 0.1 * ratio,
        "mfu_measured": None,
        "peak_memory_gb": 12.5,
        "start_seconds": 30.25,
    }


def content(device: str = "NVIDIA H200", **changes: Any) -> dict[str, Any]:
    rows = [entry(config, variant, 400.0) for config in ("imagenet64_uncond", "my own") for variant in VARIANTS]
    return {
        "device": device,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
        "date": "2026-01-02",
        "command": "python benchmarks/bench_train.py",
        "threads": 8,
        "matmul_tflops": 1.5,
        "copy_gbs": 20.0,
        "rows": rows,
        **changes,
    }


def saved(folder: Path, **changes: Any) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(content(**changes)))
    return path


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(saved(tmp_path)), "--markdown", str(tmp_path / "train.md")])
    text = (tmp_path / "train.md").read_text()
    assert capsys.readouterr().out == text
    assert "NVIDIA H200, 8 threads, torch 2.13.0, 2026-01-02, commit 0123456789." in text
    assert text.index("## imagenet64_uncond, batch 64, bf16") < text.index("## my own, batch 64, bf16")
    tables = text.split("## ")[1:]
    for table in tables:
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
        assert len({len(row) for row in cells}) == 1
        assert [row[0] for row in cells[2:]] == [
            "reference (fp16)",
            "reference+channels-last",
            "reference+compile",
            "reference+max-autotune",
            "diffusers",
            "diffusers+max-autotune",
            "**ours**",
            "ours -graph",
        ]
        ours = dict(zip(cells[0], cells[8], strict=True))
        assert ours["ms per step"] == "40.0 (39.2 to 41.2)"
        assert ours["images/s"] == "1600"
        assert ours["× reference"] == "4.00 (3.88 to 4.08)"
        assert ours["MFU, model operations"] == "40.0%"
        assert ours["MFU, executed"] == "36.0%"
        assert "of matmul, executed" not in ours, "a column without values is left out"
        assert ours["host ms"] == "2.50"
        assert ours["launches"] == "3 and 2 graphs"
        assert ours["peak GB"] == "12.50"
        assert ours["start s"] == "30.2"
        assert "a variant that computes in fp16, not in bf16" in table
    assert "Roofline, a prediction" in tables[0]
    assert "Roofline" not in tables[1]  # there is no prediction for a configuration that isn't shipped


def test_bounds_are_the_rooflines(tmp_path: Path) -> None:
    """Bounds of a GPU are found by its name, and those of other machines by the rates measured with the results."""
    results = report_rows.read(saved(tmp_path))
    row = report_rows.main_row(results.rows)
    assert row.variant == "ours"
    ops = roofline.operations_of(roofline.load_config(row.config), "bf16")
    floor = roofline.predict(ops, 64, roofline.machine_for("H200"))
    found = report_rows.bounds(results, row)
    assert found is not None
    assert found.ceiling == pytest.approx(floor.images_per_second)
    assert found.target < found.ceiling
    here, twice = (
        report_rows.bounds(report_rows.read(saved(tmp_path, device="AMD EPYC", **rates)), row)
        for rates in ({}, {"matmul_tflops": 3.0, "copy_gbs": 40.0})
    )
    assert here is not None
    assert twice is not None
    assert twice.ceiling == pytest.approx(2 * here.ceiling)
    assert here.ceiling < found.ceiling / 50
    single = report_rows.Row(**{**row.__dict__, "precision": "fp32"})
    assert report_rows.bounds(results, single) is None


def test_charts(tmp_path: Path) -> None:
    """Every bar has a name and a figure, and equal results make equal files."""
    png, svg, again = tmp_path / "chart.png", tmp_path / "chart.svg", tmp_path / "again.svg"
    path = saved(tmp_path)
    report.main([str(path), "--chart", str(png), "--chart", str(svg), "--chart", str(again)])
    with Image.open(png) as image:
        assert image.width > 1000
        colours = image.convert("RGB").getcolors(image.width * image.height)
    drawn = {"#" + bytes(colour).hex() for _, colour in colours}
    assert drawn >= {*report.COLOURS.values(), report.LEVER_OFF}
    text = svg.read_text()
    assert text == again.read_text()
    names = {"reference (fp16)", *VARIANTS} - {"reference"}
    for shown in (*names, "imagenet64_uncond, batch 64, bf16", "1600  4.00×", "NVIDIA H200, torch 2.13.0"):
        assert shown in text, shown
    bound = report_rows.bounds(report_rows.read(path), report_rows.main_row(report_rows.read(path).rows))
    assert bound is not None
    assert text.count(f"roofline {bound.ceiling:.0f}") == 1
    assert text.count("target ") == 2  # at its line and in the note, but not for the other configuration


def test_cases_and_what_ratios_are_to(tmp_path: Path) -> None:
    """Batches and precisions are separate cases, ratios are to the reference, and those of levers are to ours."""
    rows = [entry("quick", "ours", 9.0, precision, batch) for precision, batch in (("fp32", 8), ("bf16", 16))]
    rows[1]["ratio"] = None
    rows.append({**entry("quick", "ours -graph", 9.0, "fp32", 8), "ratio": [0.9, 0.95, 1.0], "ratio_to": "ours"})
    results = report_rows.read(saved(tmp_path, device="AMD EPYC", rows=rows))
    assert list(results.cases()) == ["quick, batch 8, fp32", "quick, batch 16, bf16"]
    text = report.markdown(results)
    assert "| 0.95 (0.90 to 1.00) × ours |" in text
    assert text.count("Roofline, a prediction") == 2
    report.chart(results, [tmp_path / "chart.svg"])
    drawn = (tmp_path / "chart.svg").read_text()
    assert "27.0  0.95× ours" in drawn
    assert "quick, batch 16, bf16" in drawn


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not what"),
        ('{"rows": [{}]}', "'ratio' is missing"),
        (json.dumps({**content(), "rows": []}), "has no rows"),
        (json.dumps({k: v for k, v in content().items() if k != "copy_gbs"}), "'copy_gbs' is missing"),
        (json.dumps(content(rows=[{**entry("demo", "ours", 1.0), "ratio": [1, 2]}])), "ratio must be three numbers"),
    ],
)
def test_files_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    assert says in refusal(report.main, [path])


def test_other_refusals(tmp_path: Path) -> None:
    assert "can't be read" in refusal(report.main, [tmp_path / "nowhere.json"])
    with pytest.raises(UserError, match="can't be written"):
        report.chart(report_rows.read(saved(tmp_path)), [tmp_path / "chart.txt2"])


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    entry = {"config": "my own", "precision": "bf16", "batch": 64, "variant": "diffusers", "reason": "no memory"}
    text = report.markdown(report_rows.read(saved(tmp_path, left_out=[entry])))
    assert "Left out: diffusers (my own, batch 64, bf16): no memory" in text


def test_what_stands_beside_the_rows(tmp_path: Path) -> None:
    """Sustained rates, the loader's share and counted launches have their tables."""
    case = {"config": "my own", "precision": "bf16", "batch": 64}
    sustained = {**case, "variant": "ours, sustained", "seconds": 60.2, "window_seconds": 10.0, "first": 410.0}
    sustained |= {"images_per_second": 402.0, "last": 400.0, "clocks": [[1980.0, 45.0, 600.0], None]}
    loader = {**case, "loader": "dali", "images_per_second": 395.0, "from_memory": 400.0, "waiting": 0.0123}
    launches = {**case, "fastdiff kernels": 272, "library products": 400}
    made = report_rows.read(saved(tmp_path, sustained=[sustained], loader=[loader], launches=[launches]))
    text = report.markdown(made)
    assert "| my own, batch 64, bf16 | ours, sustained | 60.2 | 402 | 410 | 400 | 1980, 45, 600 | – |" in text
    assert "of 10 seconds each" in text
    assert "| my own, batch 64, bf16 | dali | 395 | 400 | 1.23% |" in text
    assert "272 of our kernels, 400 products" in text
