"""Nobody reads: lines are lost, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import screen
from fastdiff.reporting import Reporter


def test_a_reader_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the line all the same, and later lines are lost without an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe, Reporter(tmp_path, 10, 0) as reporter:
        monkeypatch.setattr(sys, "stdout", pipe)
        for line in ("one", "two"):
            reporter.say(line)
        screen.show("three", pipe)
        screen.flush()
        monkeypatch.undo()
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


SCRIPT = """
import sys
from fastdiff.processes import StopWith, run_script

def main():
    for _ in range(1000):
        sys.stdin.readline()
    raise StopWith(75, "saved")

run_script(main, "train.py")
"""


@pytest.mark.parametrize("place", ["closed", "/dev/full"])
def test_exit_codes_need_no_reader(place: str) -> None:
    command = [sys.executable, "-c", SCRIPT]
    if place == "closed":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(place, os.O_WRONLY)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, timeout=100)
    os.close(writer)
    assert done.returncode == 75
