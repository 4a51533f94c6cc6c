"""Ctrl-C keeps what the preparation scripts have done, says so in one line, and their workers say nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.preparation_scripts import SCRIPTS, run_script
from PIL import Image


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures that take longer to decode than the tests wait."""
    folder = tmp_path_factory.mktemp("source")
    Image.fromarray(np.zeros((900, 1100, 3), dtype=np.uint8)).save(folder / "0.png")
    for i in range(1, 2500):
        os.link(folder / "0.png", folder / f"{i}.png")
    return folder


def interrupted(command: list[str], ready: Path) -> tuple[int, list[str]]:
    """Run a script and send SIGINT to it and its workers once `ready` exists; returns exit code and lines of stderr."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not ready.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, [line for line in said.splitlines() if line.strip() and "img/s" not in line]


@pytest.mark.parametrize("ready", [".preparation.json", "image_00000000.png"])  # before workers started, and after
def test_folder(source: Path, tmp_path: Path, ready: str) -> None:
    flags = ["--source", str(source), "--out", str(tmp_path / "out"), "--size", "8", "--workers", "2"]
    code, lines = interrupted([sys.executable, str(SCRIPTS / "folder.py"), *flags], tmp_path / "out" / ready)
    assert (code, lines) == (
        130,
        ["folder.py: stopped by Ctrl-C; what is done is kept, and the same command goes on from there"],
    )
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".partial")]


def test_pack(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data_dir", str(source), "--out", str(out), "--size", "8", "--workers", "1"]
    code, lines = interrupted(
        [sys.executable, str(SCRIPTS / "pack.py"), *flags], tmp_path / ".out.partial" / "state.json"
    )
    assert code == 130
    assert len(lines) == 1
    assert lines[0].startswith("pack.py: stopped by Ctrl-C; ")


def test_digits(tmp_path: Path) -> None:
    code, lines = interrupted([sys.executable, str(SCRIPTS / "digits.py"), "--out", str(tmp_path)], tmp_path / "train")
    assert code == 130
    assert len(lines) == 1
    assert lines[0].startswith("digits.py: stopped by Ctrl-C; ")
    assert run_script("digits.py", "--out", tmp_path).returncode == 0
    assert len(list(tmp_path.glob("*/*.png"))) == 1797
