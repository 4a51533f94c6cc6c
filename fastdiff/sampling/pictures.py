"""Converts samples to 8-bit pixels, and those to image files, grids, and strips and animations of trajectories."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.runtime.files import atomic_write

CHANNELS = (1, 3, 4)
"""Numbers of channels that a picture can have: gray, RGB, RGBA."""
NAMED = 5
"""The most images that an error message lists by number."""


class Images(NamedTuple):
    """Images [n, H, W, C] uint8 and labels [n] int64 (None without classes), on the host."""

    images: np.ndarray
    labels: np.ndarray | None


Draw: TypeAlias = Callable[[np.ndarray, Callable[[float], None]], Images]
"""draw(index [n] int64, on_progress) → the images of the job with these numbers. After each step it calls
on_progress(images) with the work done in units of an image, n in total. An exception from on_progress stops it."""


def non_finite(images: list[int]) -> str:
    """The sentence "images 3, 7 and 12 came out with values that are not finite"."""
    named = [str(image) for image in images[:NAMED]]
    if more := len(images) - len(named):
        named.append(f"{more} other{'s' * (more > 1)}")
    listed = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    return f"image{'s' * (len(images) > 1)} {listed} came out with values that are not finite"


def to_uint8(samples: Tensor) -> Tensor:
    """Turn samples [B, C, H, W] in [-1, 1] into pixels [B, H, W, C] uint8, rounding down as improved-diffusion does."""
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def picture(pixels: np.ndarray) -> Image.Image:
    """The picture of pixels [H, W, C] uint8 with 1, 3 or 4 channels."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Put images [N, H, W, C] uint8 side by side, row by row; `columns` defaults to the square root of N."""
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
    """Up to columns - 1 step numbers from 0 to steps - 1, evenly spread, including the first and the last."""
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(steps, columns - 1))})


def strip(frames: list[np.ndarray], final: np.ndarray) -> Image.Image:
    """Draw a row per image with up to 11 of its predictions, and the image itself at the end.

    frames are the predictions of x_0 over the steps, each [n, H, W, C] uint8; final is [n, H, W, C] uint8.
    """
    columns = [*(frames[step] for step in steps_shown(len(frames))), final] if frames else [final]
    rows = np.stack(columns, axis=1)  # [n, columns, H, W, C]
    return grid(rows.reshape(-1, *rows.shape[2:]), columns=len(columns))


def save_animation(file: BinaryIO, frames: list[np.ndarray], final: np.ndarray) -> None:
    """Write a GIF of all images side by side over the steps, about 4 s long, and the final images for 2 s more."""
    shown = [grid(frame).convert("RGB") for frame in [*frames, final]]
    durations = [max(20, 4000 // len(shown) // 10 * 10)] * len(frames) + [2000]  # GIF counts hundredths of a second
    shown[0].save(file, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0)


# --- picture files ---


def class_words(class_names: list[str]) -> list[str]:
    """Turn class names into distinct prefixes of file names, of letters, digits and '-'.

    The data loader takes the part of a file name before the first underscore as its class.
    """
    words: list[str] = []
    for label, name in enumerate(class_names):
        word = plain = "".join(c if c.isalnum() or c == "-" else "-" for c in name) or str(label)
        suffix = label
        while word in words:
            word, suffix = f"{plain}-{suffix}", suffix + 1
        words.append(word)
    return words


class FileNames:
    """The names of the files of a job's images: cat_000012.png, 5_000012.png without names, 000012.png without labels.

    names  Paths of the pictures that the images were made from, in turn, without endings. Their files keep these
           names, with - for slashes: alps.png. Later rounds have the number too.
    """

    def __init__(self, class_names: Sequence[str] = (), names: Sequence[str] = ()) -> None:
        self.words = class_words(list(class_names))
        self._names: dict[str, int] = {}
        for index, name in enumerate(names):
            plain = name.replace("/", "-")
            while plain in self._names:  # a.png beside a.jpg
                plain += f"-{index}"
            self._names[plain] = index
        self._listed = list(self._names)

    def __call__(self, index: int, label: int | None) -> str:
        """The name of image `index`'s file."""
        if self._listed:
            name = self._listed[index % len(self._listed)]
            while index >= len(self._listed) and (name := f"{name}_{index:06d}") in self._names:
                continue
            return f"{name}.png"
        if label is None:
            return f"{index:06d}.png"
        return f"{self.words[label] if 0 <= label < len(self.words) else label}_{index:06d}.png"

    def index_of(self, file_name: str) -> int | None:
        """The number of the image in a file of that name; None for other names."""
        stem = file_name.removesuffix(".png")
        if stem in self._names and file_name.endswith(".png"):
            return self._names[stem]
        return index_in(file_name)


def index_in(name: str) -> int | None:
    """The image's number at the end of a picture file's name; None for other names."""
    stem = name.removesuffix(".png").rpartition("_")[2]
    return int(stem) if name.endswith(".png") and len(stem) >= 6 and stem.isascii() and stem.isdecimal() else None


def encode(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG file with pixels [H, W, C] uint8."""
    buffer = io.BytesIO()
    picture(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
