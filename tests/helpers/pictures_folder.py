"""A small folder of pictures for tests of training."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny import pictures


def make_pictures(folder: Path, count: int = 13, size: int = 8, classes: int = 3, mode: str = "RGB") -> Path:
    """Write `count` lossless noise pictures named CLASS_NUMBER.png, and return the folder."""
    pictures(folder, [f"class{i % classes}_{i:03d}" for i in range(count)], size, len(mode))
    return folder
