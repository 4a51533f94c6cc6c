"""Samples as pictures: 8-bit pixels and PNG grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(samples: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] → [B, H, W, C] uint8; fractions are cut off, as improved-diffusion does."""
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images [N, H, W, C] uint8 side by side, row by row; `columns` defaults to the square root of N."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[y : y + height, x : x + width] = image
    picture = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    enlarge = max(1, 768 // max(picture.size))  # small pictures would be unreadable on a screen
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def save_grid(path: Path, images: np.ndarray, columns: int | None = None) -> None:
    """Write the grid as a PNG file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    grid(images, columns).save(partial, format="PNG")
    partial.replace(path)
