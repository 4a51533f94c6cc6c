"""The reference pixels: how a picture file becomes [H, W, C] uint8, with Pillow.

improved-diffusion's recipe, which its released models were trained with: halve with a box filter while the picture
stays at least twice the target, then one bicubic resize that just covers the target, then the colour conversion, then
a centre crop. The conversion comes after the resizing on purpose: palettes and 1-bit pictures are resized by nearest
neighbour and transparent ones premultiplied, as Pillow does for those modes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from os import PathLike

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdiff.images.image_files import FORMATS, check_canvas, check_scans, max_pixels, other_kind, read_file

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels that a batch can have."""


@dataclass(frozen=True)
class Recipe:
    """The sizes that a picture goes through, all (height, width) in pixels."""

    halvings: tuple[tuple[int, int], ...]
    """Size after each box halving."""
    cover: tuple[int, int]
    """Size after the bicubic resize: at least the target on both sides."""
    corner: tuple[int, int]
    """Top and left of the crop."""


def plan(height: int, width: int, size_hw: tuple[int, int]) -> Recipe:
    """The recipe for a picture of height x width. ValueError where its cover would be as large as a bomb."""
    target_h, target_w = size_hw
    halvings = []
    while height >= 2 * target_h and width >= 2 * target_w:
        height, width = height // 2, width // 2
        halvings.append((height, width))
    scale = max(target_h / height, target_w / width)
    cover = round(height * scale), round(width * scale)
    if cover[0] * cover[1] > max_pixels():
        raise ValueError(f"a strip of {width}x{height} pixels would have to grow to {cover[1]}x{cover[0]}")
    corner = (cover[0] - target_h) // 2, (cover[1] - target_w) // 2
    return Recipe(tuple(halvings), cover, corner)


def load_image(source: str | PathLike[str] | bytes, size_hw: tuple[int, int], mode: str) -> np.ndarray:
    """Read a picture (see above for what is taken of it) as uint8 [H, W, C], C by `mode` (L, RGB, RGBA).

    source is a path or the file's bytes. Whatever Pillow raises for a picture that it can't read or holds for a
    decompression bomb is passed on; ValueError for other kinds of files and for those that `files` refuses.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    check_canvas(data)
    with _open(data) as image:
        if data[:2] == b"\xff\xd8":
            check_scans(data, image.width * image.height)
        image.load()
        pixels = _resize_and_crop(_in_8_bits(image), size_hw, mode)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if kind := other_kind(data):
            raise ValueError(f"its content is {kind}; JPEG, PNG, GIF and WebP are read") from None
        raise


def _in_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray by its high byte, as Pillow itself reads 16-bit colour; any other picture as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _resize_and_crop(image: Image.Image, size_hw: tuple[int, int], mode: str) -> np.ndarray:
    recipe = plan(image.height, image.width, size_hw)
    for height, width in recipe.halvings:
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    image = image.resize(recipe.cover[::-1], resample=Image.Resampling.BICUBIC)
    top, left = recipe.corner
    image = image.crop((left, top, left + size_hw[1], top + size_hw[0]))  # first: a strip's cover is large
    return np.array(image.convert(mode))
