"""Decodes an image file to its reference pixels, uint8 [H, W, C], with Pillow.

This is the recipe with which improved-diffusion's released models were trained: halve the image with a box filter
while both sides are at least twice the target's, resize it once (bicubic) to just cover the target, crop the centre and
convert the colours. Because the conversion comes last, Pillow resizes palette and 1-bit images by nearest neighbour and
premultiplies transparent ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdiff.images.image_files import FORMATS, check_canvas, check_scans, max_pixels, other_kind, read_file

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each possible number of channels."""
LEAST_CROP = 0.8
"""Least share of the resized image's shorter side that a random crop keeps."""


@dataclass(frozen=True)
class Recipe:
    """How an image is resized and cropped; sizes are (height, width) in pixels."""

    halvings: tuple[tuple[int, int], ...]
    """Size after each box halving."""
    cover: tuple[int, int]
    """Size after the bicubic resize: at least the target on both sides."""
    corner: tuple[int, int]
    """Top and left of the crop."""


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


def cropping_recipe_for(height: int, width: int, size_hw: tuple[int, int], crop: Sequence[float]) -> Recipe:
    """The recipe with a random crop, as guided-diffusion trains its classifiers, from three uniform numbers in [0, 1).

    The first number decides the length to which the shorter side is resized, from the target's to 1.25 times that, the
    others the place of the crop. ValueError as `recipe_for`.
    """
    target_h, target_w = size_hw
    longest = math.ceil(target_h / LEAST_CROP)
    enlarged_h = target_h + int(crop[0] * (longest - target_h + 1))
    whole = recipe_for(height, width, (enlarged_h, round(target_w * enlarged_h / target_h)))
    margins = (covering - side + 1 for covering, side in zip(whole.cover, size_hw, strict=True))
    top, left = (int(where * margin) for where, margin in zip(crop[1:], margins, strict=True))
    return replace(whole, corner=(top, left))


def load_image(
    source: str | PathLike[str] | bytes, size_hw: tuple[int, int], mode: str, crop: Sequence[float] | None = None
) -> np.ndarray:
    """Decode an image, given as a path or a file's bytes, to uint8 [H, W, C] in `mode` (L, RGB or RGBA).

    crop holds the numbers of a random crop (see `cropping_recipe_for`); None: the centre.

    Raises ValueError for other formats and for files beyond the limits of `image_files`. Pillow raises exceptions of
    many types for images that it can't read or considers a decompression bomb.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    check_canvas(data)
    with _open(io.BytesIO(data)) as image:
        check_scans(data, image.width * image.height)
        image.load()
        pixels = _resize_and_crop(_in_8_bits(image), size_hw, mode, crop)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resize_image(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize and crop decoded pixels, uint8 [H, W, C] with 1, 3 or 4 channels, as `load_image` does."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return _resize_and_crop(image, size_hw, MODES[channels]).reshape(*size_hw, channels)


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    size_hw: tuple[int, int]
    is_gray: bool
    """Whether its pixels are gray, of 1, 8 or 16 bits, without an alpha channel."""
    lossy: str
    """Name of its format if that is lossy: JPEG or WebP; else empty."""


def read_header(file: BinaryIO) -> Header:
    """Read the header of an image file. Raises the exceptions of `load_image`, but for those of damaged pixels."""
    head = file.read(30)
    check_canvas(head)
    file.seek(0)
    with _open(file) as image:
        lossy = {"WEBP": "" if head[12:16] == b"VP8L" else "WebP", "GIF": "", "PNG": ""}
        is_gray = image.mode in ("1", "L") or image.mode.startswith("I")
        return Header((image.height, image.width), is_gray, lossy.get(image.format or "", "JPEG"))


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if kind := other_kind(file.read(16)):
            raise ValueError(f"its content is {kind}; JPEG, PNG, GIF and WebP are read") from None
        raise


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit gray to its high byte, as Pillow itself does with 16-bit colour; other images stay unchanged."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _resize_and_crop(
    image: Image.Image, size_hw: tuple[int, int], mode: str, crop: Sequence[float] | None = None
) -> np.ndarray:
    size = image.height, image.width
    recipe = recipe_for(*size, size_hw) if crop is None else cropping_recipe_for(*size, size_hw, crop)
    for height, width in recipe.halvings:
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    image = image.resize(recipe.cover[::-1], resample=Image.Resampling.BICUBIC)
    top, left = recipe.corner
    image = image.crop((left, top, left + size_hw[1], top + size_hw[0]))  # before conversion: covers can be large
    return np.array(image.convert(mode))
