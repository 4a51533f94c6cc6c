"""Runs the preparation scripts as a user does, and looks at what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *flags: object, pythonpath: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=pythonpath)
    command = [sys.executable, str(ROOT / "datasets" / name), *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def succeed(name: str, *flags: object) -> str:
    """Runs the script; returns the last line of its output."""
    done = run_script(name, *flags)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()[-1]


def fail(name: str, *flags: object, pythonpath: str = str(ROOT)) -> str:
    """Runs the script, which must fail before it starts to work; returns its one line of error."""
    done = run_script(name, *flags, pythonpath=pythonpath)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: error: ")
    return line


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def images(folder: Path) -> list[str]:
    """Names in a finished folder, in which nothing but images and the record may lie."""
    names = sorted(os.listdir(folder))
    assert names.pop(0) == ".preparation.json"
    return names


def random_pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
