"""A small folder of pictures for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(folder: Path, count: int = 13, size: int = 8, classes: int = 3, mode: str = "RGB") -> Path:
    """Write `count` lossless noise pictures named CLASS_NUMBER.png, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size, size) if mode == "L" else (size, size, len(mode))
    for i in range(count):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % classes}_{i:03d}.png")
    return folder
