"""The lines and tables of a run's progress."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fastdiff.training.reporting import Reporter


def test_an_interval_without_timed_steps_has_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run whose only step compiles has no images/s; its column comes with the first rate."""
    with Reporter(tmp_path, 9, 7) as reporter:
        reporter.write(8, 9, {"loss": 0.5}, seconds_left=1.0)
        reporter.write(9, 9, {"loss": 0.25, "images_per_second": 40.0}, seconds_left=0.0)
    assert capsys.readouterr().out == "step 8/9  loss 0.5\nstep 9/9  loss 0.25  40 images/s  ETA 0:00:00\n"
    with (tmp_path / "progress.csv").open(newline="") as file:
        assert [row["images_per_second"] for row in csv.DictReader(file)] == ["", "40"]
