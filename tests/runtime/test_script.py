"""Scripts end with their exit codes and messages, and closed output costs only the lines that it loses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.images.settings import DataSettings
from fastdiff.runtime import script
from fastdiff.training.reporting import Reporter


def test_a_reader_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log file gets every line, and output to the closed pipe is lost without an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe, Reporter(tmp_path, 10, 0) as reporter:
        monkeypatch.setattr(sys, "stdout", pipe)
        with script.tolerate_closed_output():
            for line in ("one", "two"):
                reporter.log(line)
            print("three", flush=True)
        assert sys.stdout is pipe
        monkeypatch.undo()
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


SCRIPT = """
import sys
from fastdiff.errors import StopWith
from fastdiff.runtime.processes import current
from fastdiff.runtime.script import run_script

def main():
    current()
    print("drawn", flush=True)
    if sys.argv[1] == "75":
        raise StopWith(75, "saved")

run_script(main, "train.py")
"""


@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize("place", ["closed", "/dev/full"])
def test_exit_codes_need_no_reader(place: str, code: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(code)]
    if place == "closed":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(place, os.O_WRONLY)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, timeout=100)
    os.close(writer)
    assert done.returncode == code


def test_a_script_ends_with_the_code_and_sentence_it_gives() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "75"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, "drawn\n", "train.py: saved\n")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launchers_variable_that_is_no_number(name: str) -> None:
    env = {**os.environ, name: "abc"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, "0"], capture_output=True, text=True, env=env)
    sentence = f"train.py: error: the environment variable {name} is abc, not a whole number; correct or unset it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_names_that_are_no_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python represents each byte that is no valid UTF-8 by a surrogate, which is written with an escape."""
    images = str(tmp_path / os.fsdecode(b"b\xff"))
    assert DataSettings(data_dir=images).data_dir == images
    with script.tolerate_closed_output(), Reporter(tmp_path, 3, 0) as reporter:
        reporter.log(f"of {images}")
    assert capsys.readouterr().out.endswith("b\\udcff\n")
    assert (tmp_path / "log.txt").read_text().endswith("b\\udcff\n")
