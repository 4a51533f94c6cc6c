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


def test_metrics_join_the_row_of_their_step(tmp_path: Path) -> None:
    """Metrics that come after a step's row are added to it; a step that was not logged gets a row of its own."""
    with Reporter(tmp_path, 9, 0) as reporter:
        assert reporter.lacks(0, ["fid"])
        reporter.write(2, 9, {"loss": 0.5}, seconds_left=1.0)
        reporter.add(2, {"fid": 10.0})
        reporter.add(3, {"fid": 9.0, "kid": 0.1})
        reporter.write(4, 9, {"loss": 0.25}, seconds_left=1.0)
        assert not reporter.lacks(3, ["fid", "kid"])
        assert reporter.lacks(2, ["fid", "kid"])
        assert reporter.lacks(4, ["fid"])
    expected = "step,loss,fid,kid\n2,0.5,10,\n3,,9,0.1\n4,0.25,,\n"
    assert (tmp_path / "progress.csv").read_text().replace("\r", "") == expected
    with Reporter(tmp_path, 9, 2) as reporter:  # resumed: later rows are written again
        assert not reporter.lacks(2, ["fid"])
        assert reporter.lacks(3, ["fid"])
    nowhere = Reporter(None, 9, 0)
    nowhere.add(1, {"fid": 1.0})
    assert not nowhere.lacks(1, ["fid"])
