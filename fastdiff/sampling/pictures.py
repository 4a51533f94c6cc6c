"""Samples as pictures: 8-bit pixels, grids, and the way from noise to an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.runtime.files import atomic_write

CHANNELS = (1, 3, 4)
"""Channels of which a picture can be made: gray, RGB, RGBA."""
NAMED = 5
"""Images whose numbers an error gives."""


def non_finite(images: list[int]) -> str:
    """images 3, 7 and 12 came out with values that are not finite"""
    named = [str(image) for image in images[:NAMED]]
    if more := len(images) - len(named):
        named.append(f"{more} other{'s' * (more > 1)}")
    listed = f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else named[0]
    return f"image{'s' * (len(images) > 1)} {listed} came out with values that are not finite"


def to_uint8(samples: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] → [B, H, W, C] uint8; fractions are cut off, as improved-diffusion does."""
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def picture(pixels: np.ndarray) -> Image.Image:
    """[H, W, C] uint8 of 1, 3 or 4 channels."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images [N, H, W, C] uint8 side by side, row by row; `columns` defaults to the square root of N."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[y : y + height, x : x + width] = image
    small = picture(canvas)
    enlarge = max(1, 768 // max(small.size))  # small pictures would be unreadable on a screen
    return small.resize((small.width * enlarge, small.height * enlarge), Image.Resampling.NEAREST)


def save_grid(path: Path, images: np.ndarray, columns: int | None = None) -> None:
    """Write the grid as a PNG file, whole or not at all."""
    with atomic_write(path, sync=False) as file:
        grid(images, columns).save(file, format="PNG")


def steps_shown(steps: int, columns: int = 12) -> list[int]:
    """Up to columns - 1 of the steps' numbers, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(steps, columns - 1))})


def strip(frames: list[np.ndarray], final: np.ndarray) -> Image.Image:
    """A row per image, from noise to the image: up to 11 of the predictions and the final one.

    frames  predictions of x_0 over the steps, each [n, H, W, C] uint8; final [n, H, W, C] uint8.
    """
    columns = [*(frames[step] for step in steps_shown(len(frames))), final] if frames else [final]
    rows = np.stack(columns, axis=1)  # [n, columns, H, W, C]
    return grid(rows.reshape(-1, *rows.shape[2:]), columns=len(columns))


def save_animation(file: BinaryIO, frames: list[np.ndarray], final: np.ndarray) -> None:
    """A GIF of all images side by side over the steps, about 4 s long; the final images stand for 2 s more."""
    shown = [grid(frame).convert("RGB") for frame in [*frames, final]]
    durations = [max(20, 4000 // len(shown) // 10 * 10)] * len(frames) + [2000]  # GIF counts hundredths of a second
    shown[0].save(file, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0)


class Images(NamedTuple):
    """Images [n, H, W, C] uint8 and labels [n] int64 (None without classes), on the host."""

    images: np.ndarray
    labels: np.ndarray | None


Draw: TypeAlias = Callable[[np.ndarray, Callable[[float], None]], Images]
"""draw(index [n] int64, on_progress) → those images of the job. on_progress(images) is told fractions of images done, n
in all; an exception that it raises ends the drawing."""
