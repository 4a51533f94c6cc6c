"""choose_attention.py makes the table of measured choices from what gpu_proof.py has timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import refusal

from benchmarks import choose_attention
from fastdiff.attention_choices import WAYS, Entry, Key, read, write

NAME = "NVIDIA H100 80GB HBM3"
START = {"part": "all", "kind": "start", "at": 0, "command": "", "commit": "0", "date": "2026-01-02", "mode": "real"}
MACHINE = {"part": "machine", "kind": "machine", "at": 1, "device": NAME, "torch": "2.13.0", "triton": "3.6.0"}
MACHINE |= {"matmul_tflops": 1.0, "copy_gbs": 1.0}
SHAPE = "B128 L256 N4 D144"
KEYS = [Key(NAME, "bfloat16", 144, 256, work) for work in ("drawing", "training")]


def figures(direction: str, times: dict[str, float], shape: str = SHAPE, spread: float = 1.0) -> list[dict[str, Any]]:
    """Return one row for each way: its median with `spread` microseconds on both sides, or a refusal."""
    rows = []
    for way in WAYS:
        row = {"part": "attention", "kind": "figure", "at": 2, "section": "attention", "shape": shape, "way": way}
        row |= {"dtype": "bfloat16", "direction": direction}
        if way in times:
            quartiles = [times[way] - spread, times[way] + spread]
            row |= {"microseconds": times[way], "quartiles": quartiles, "launched": "graph"}
        rows.append(row if way in times else {**row, "left_out": "RuntimeError: refused"})
    return rows


def saved(path: Path, rows: list[dict[str, Any]], mode: str = "real") -> Path:
    file = path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [{**START, "mode": mode}, MACHINE, *rows]))
    return file


def ways(rows: list[dict[str, Any]], before: dict[Key, Entry] | None = None) -> list[str]:
    """Return the choices for drawing and for training."""
    return [entry.way for entry in choose_attention.entries_of([START, MACHINE, *rows], before or {})]


def test_the_fastest_way_for_each_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawing counts forward alone, training both; other entries stay, and the figures are kept."""
    rows = figures("forward", {"ours": 20, "sdpa": 40, "cudnn": 30})
    rows += figures("backward", {"ours": 90, "sdpa": 60, "cudnn": 60.5, "flash": 1})
    other = Entry(Key("another GPU", "bfloat16", 144, 256, "drawing"), "flash", {}, "2025-01-01", "2.11.0", "3.6.0")
    table = tmp_path / "table.json"
    write(table, [other])
    choose_attention.main([str(saved(tmp_path, rows)), "--to", str(table)])
    found = read(table)
    assert {key: entry.way for key, entry in found.items()} == {other.key: "flash", KEYS[0]: "ours", KEYS[1]: "cudnn"}
    training = {"ours": [108, 110, 112], "sdpa": [98, 100, 102], "cudnn": [88.5, 90.5, 92.5]}
    assert found[KEYS[1]] == Entry(KEYS[1], "cudnn", training, "2026-01-02", "2.13.0", "3.6.0")
    assert "flash" not in found[KEYS[1]].microseconds, "it refuses the forward pass"
    said = capsys.readouterr().out
    assert "D 144, L 256, training: cudnn (before: ours, by rule); microseconds: cudnn 90.5, sdpa 100, ours 110" in said


def test_a_gain_within_the_spread_changes_nothing() -> None:
    rows = figures("forward", {"ours": 20, "cudnn": 18.5}) + figures("backward", {"ours": 60, "cudnn": 40})
    assert ways(rows) == ["ours", "cudnn"]
    before = {KEYS[0]: Entry(KEYS[0], "cudnn", {}, "2025-01-01", "2.11.0", "3.6.0")}
    assert ways(rows, before) == ["cudnn", "cudnn"], "the present choice is the table's"
    before = {KEYS[0]: Entry(KEYS[0], "flash", {}, "2025-01-01", "2.11.0", "3.6.0")}
    assert ways(rows, before) == ["cudnn", "cudnn"], "the present choice is refused now"


def test_shapes_are_summed() -> None:
    """Shapes of one D and L share a choice; a way that refuses one of them is left out."""
    larger, smaller = {"ours": 50, "sdpa": 100}, {"ours": 40, "sdpa": 10, "cudnn": 1}
    rows = [
        row
        for way in ("forward", "backward")
        for row in figures(way, larger) + figures(way, smaller, "B8 L256 N1 D144")
    ]
    (drawing, _) = choose_attention.entries_of([START, MACHINE, *rows], {})
    assert (drawing.way, drawing.microseconds) == ("ours", {"ours": [88, 90, 92], "sdpa": [108, 110, 112]})


def test_rows_that_do_not_count() -> None:
    """Neither does a shape that wasn't timed in every way, nor a time with the host's in it."""
    rows = figures("forward", {"ours": 20, "cudnn": 1, "sdpa": 9}) + figures("backward", {"ours": 60})
    assert ways(rows) == ["cudnn", "ours"]
    assert ways(rows[:-1]) == []
    for row in rows:
        if row["way"] == "cudnn" and "launched" in row:
            row["launched"] = "plain: not permitted"
    assert ways(rows) == ["sdpa", "ours"]


def test_refusals(tmp_path: Path) -> None:
    table, rows = tmp_path / "table.json", figures("forward", {"ours": 1}) + figures("backward", {"ours": 1})
    assert "is of a rehearsal run" in refusal(choose_attention.main, [saved(tmp_path, rows, "rehearsal")])
    assert "no shape of attention" in refusal(choose_attention.main, [saved(tmp_path, []), "--to", table])
    good = saved(tmp_path, rows)
    assert "can't be written" in refusal(choose_attention.main, [good, "--to", tmp_path / "none" / "table.json"])
    table.write_text("[{")
    assert "table.json: is not JSON" in refusal(choose_attention.main, [good, "--to", table])
    assert table.read_text() == "[{"
