"""Decodes an image file to its reference pixels, uint8 [H, W, C], with Pillow.

This is the recipe with which improved-diffusion's released models were trained: halve the image with a box filter
while both sides are at least twice the target's, resize it once (bicubic) to just cover the target, crop the centre and
convert the colours. Because the conversion comes last, Pillow resizes palette and 1-bit images by nearest neighbour and
premultiplies transparent ones.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from os import PathLike

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdiff.images.image_files import FORMATS, check_canvas, check_scans, max_pixels, other_kind, read_file

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each possible number of channels."""


@dataclass(frozen=True)
class Recipe:
    """How an image is resized and cropped; sizes are (height, width) in pixels."""

    halvings: tuple[tuple[int, int], ...]
    """Size after each box halving."""
    cover: tuple[int, int]
    """Size after the bicubic resize: at least the target on both sides."""
    corner: tuple[int, int]
    """Top and left of the centre crop."""


def recipe_for(height: int, width: int, size_hw: tuple[int, int]) -> Recipe:
    """The recipe for an image of height x width. ValueError if it would have to grow beyond `max_pixels`."""
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
    """Decode an image, given as a path or a file's bytes, to uint8 [H, W, C] in `mode` (L, RGB or RGBA).

    Raises ValueError for other formats and for files beyond the limits of `image_files`. Pillow raises exceptions of
    many types for images that it can't read or considers a decompression bomb.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    check_canvas(data)
    with _open(data) as image:
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
    """Reduce 16-bit gray to its high byte, as Pillow itself does with 16-bit colour; other images stay unchanged."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _resize_and_crop(image: Image.Image, size_hw: tuple[int, int], mode: str) -> np.ndarray:
    recipe = recipe_for(image.height, image.width, size_hw)
    for height, width in recipe.halvings:
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    image = image.resize(recipe.cover[::-1], resample=Image.Resampling.BICUBIC)
    top, left = recipe.corner
    image = image.crop((left, top, left + size_hw[1], top + size_hw[0]))  # before conversion: covers can be large
    return np.array(image.convert(mode))
