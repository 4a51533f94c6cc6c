"""Runs the data preparation scripts as a user does, and inspects their results."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from helpers import ROOT

SCRIPTS = ROOT / "datasets"


def run_script(name: str, *flags: object, pythonpath: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate process."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, flags)]
    environment = dict(os.environ, PYTHONPATH=pythonpath)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def call_script(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run a script in this process with one worker, which saves starting Python and importing libraries."""
    command = [str(SCRIPTS / name), *map(str, flags), "--workers", "1"]
    out, error = io.StringIO(), io.StringIO()
    code: object = None
    with patch.object(sys, "argv", command):  # noqa: SIM117
        with redirect_stdout(out), redirect_stderr(error):
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, out.getvalue(), error.getvalue())


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a run, and assert that it succeeded."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()[-1]


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line of a run, and assert that it is an error from before any work."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{Path(done.args[done.args[0] == sys.executable]).name}: error: ")
    return line


def succeed(name: str, *flags: object) -> str:
    return last_line(call_script(name, *flags))


def fail(name: str, *flags: object) -> str:
    return only_line(call_script(name, *flags))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def images(folder: Path) -> list[str]:
    """Return the names of the images in a finished folder, which contains only them and the record."""
    names = sorted(os.listdir(folder))
    assert names.pop(0) == ".preparation.json"
    return names


def random_pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
