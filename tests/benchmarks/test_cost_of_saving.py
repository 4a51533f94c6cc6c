"""The benchmark of the cost of checkpoints runs at a small size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny import DIFFUSION, MODEL, refusal

from benchmarks import bench_saving


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads, which the benchmark sets to all free cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    config, results = tmp_path / "small.json", tmp_path / "results.json"
    config.write_text(json.dumps({"model": MODEL, "diffusion": DIFFUSION}))
    argv = ["--config", str(config), "--batch", "2", "--rounds", "2", "--steps", "2", "--folder", str(tmp_path)]
    bench_saving.main([*argv, "--json", str(results)])
    shown = capsys.readouterr().out
    content = json.loads(results.read_text())
    for way in ("beside", "waiting"):
        assert f"\n{way}" in shown
        low, middle, high = content[way]["stood_still_ms"]
        assert 0 < low <= middle <= high
    assert 0 < content["guards_ms"][1] < content["step_ms"][1]
    assert content["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "small.json"]  # no checkpoint is left


def test_refusals() -> None:
    assert "--rounds must be at least 1, not 0" in refusal(bench_saving.main, ["--rounds", "0"])
    assert "--config: nothing is neither a file nor" in refusal(bench_saving.main, ["--config", "nothing"])
