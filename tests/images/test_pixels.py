from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastdiff.images.image_files import plain_size
from fastdiff.images.pixels import load_image, recipe_for


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halved(pixels: np.ndarray) -> np.ndarray:
    """Apply the box filter on even sides: means of pairs, .5 rounded up, along rows and then along columns."""
    rows = (pixels[:, 0::2].astype(int) + pixels[:, 1::2] + 1) // 2
    return (rows[0::2] + rows[1::2] + 1) // 2


def restated(image: Image.Image, side: int, mode: str) -> np.ndarray:
    """Resize and crop to a square as improved-diffusion does."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    factor = side / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.BICUBIC).convert(mode)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side))).reshape(side, side, -1)


def test_even_halvings_are_means(photo):
    image = photo(128, 160)
    expected = halved(halved(np.asarray(image)))[:, 4:36]
    np.testing.assert_array_equal(load_image(encoded(image), (32, 32), "RGB"), expected)


def test_a_picture_at_the_target_is_untouched(photo):
    image = photo(32, 32)
    np.testing.assert_array_equal(load_image(encoded(image), (32, 32), "RGB"), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(67, 45), (19, 23), (301, 203), (32, 64)])
def test_squares_follow_the_recipe_in_every_mode(photo, kind, mode, size):
    image = photo(*size).convert("L" if kind == "I;16" else kind)
    if kind == "I;16":  # only its high bytes are used
        low_bytes = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint16)
        data = encoded(Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + low_bytes))
        np.testing.assert_array_equal(load_image(data, (32, 32), mode), restated(image, 32, mode))
        return
    data = encoded(image, "JPEG" if kind == "CMYK" else "PNG")
    got = load_image(data, (32, 32), mode)
    assert got.dtype == np.uint8
    assert got.shape == (32, 32, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(got, restated(opened, 32, mode))


def test_jpeg_from_a_path(photo, tmp_path):
    photo(211, 307).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = restated(opened, 64, "RGB")
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg", (64, 64), "RGB"), expected)


def test_oblong_targets_are_covered_and_cropped_in_the_middle(photo):
    image = photo(100, 256)
    recipe = recipe_for(100, 256, (16, 48))
    assert recipe.halvings == ((50, 128), (25, 64))
    assert recipe.cover == (19, 48)
    assert recipe.corner == (1, 0)
    small = image.resize((128, 50), Image.BOX).resize((64, 25), Image.BOX).resize((48, 19), Image.BICUBIC)
    np.testing.assert_array_equal(load_image(encoded(image), (16, 48), "RGB"), np.asarray(small)[1:17])


def test_every_recipe_covers_its_target():
    generator = np.random.default_rng(0)
    for height, width, target_h, target_w in generator.integers(1, 500, (2000, 4)).tolist():
        recipe = recipe_for(height, width, (target_h, target_w))
        (cover_h, cover_w), (top, left) = recipe.cover, recipe.corner
        assert 0 <= top <= cover_h - target_h
        assert 0 <= left <= cover_w - target_w
        assert (cover_h - target_h) // 2 == top
        assert target_h == cover_h or target_w == cover_w
        last = recipe.halvings[-1] if recipe.halvings else (height, width)
        assert last[0] < 2 * target_h or last[1] < 2 * target_w


def test_rotation_in_exif_is_ignored(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(48, 32)
    turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
    np.testing.assert_array_equal(load_image(turned, (32, 32), "RGB"), load_image(plain, (32, 32), "RGB"))


def test_the_first_frame_of_an_animation_is_read(photo):
    frames = [photo(40, 40, seed).convert("P", palette=Image.Palette.ADAPTIVE) for seed in range(3)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(moving, (32, 32), "RGB"), restated(frames[0], 32, "RGB"))


@pytest.mark.parametrize("kind", ["gray", "colour"])
def test_16_bits_become_their_high_byte(kind, photo):
    """Gray is converted like colour, which Pillow converts."""
    wide = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    if kind == "gray":
        data = encoded(Image.fromarray(wide))
    else:
        data = png_16_bit_colour(np.stack([wide, wide.T, 65535 - wide], -1))
    got = load_image(data, (32, 32), "RGB")
    expected = wide[..., None] if kind == "gray" else np.stack([wide, wide.T, 65535 - wide], -1)
    np.testing.assert_array_equal(got, np.broadcast_to(expected >> 8, (32, 32, 3)))


def png_16_bit_colour(pixels: np.ndarray) -> bytes:
    """Encode uint16 [H, W, 3] as a PNG, which Pillow can't do."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_the_content_decides_and_not_the_name(photo, tmp_path):
    image = photo(32, 32)
    (tmp_path / "really_jpeg.png").write_bytes(encoded(image, "JPEG"))
    (tmp_path / "really_png.gif").write_bytes(encoded(image, "PNG"))
    expected = load_image(encoded(image, "JPEG"), (32, 32), "RGB")
    np.testing.assert_array_equal(load_image(tmp_path / "really_jpeg.png", (32, 32), "RGB"), expected)
    np.testing.assert_array_equal(load_image(tmp_path / "really_png.gif", (32, 32), "RGB"), np.asarray(image))


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PDF", "ICO", "JPEG2000"])
def test_other_kinds_are_named(kind, photo):
    with pytest.raises(ValueError, match=r"its content is .*; JPEG, PNG, GIF and WebP are read"):
        load_image(encoded(photo(40, 40), kind), (32, 32), "RGB")


def test_web_pages_and_heic_are_named():
    for data, name in ((b"<!DOCTYPE html><html>", "HTML"), (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC")):
        with pytest.raises(ValueError, match=f"its content is {name}"):
            load_image(data, (32, 32), "RGB")


def test_files_are_bounded_before_they_are_read(photo, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.png")  # reading it would block
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path / "a.png", (32, 32), "RGB")
    (tmp_path / "b.png").write_bytes(encoded(photo(32, 32)))
    monkeypatch.setattr("fastdiff.images.image_files.MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 are read"):
        load_image(tmp_path / "b.png", (32, 32), "RGB")


def test_webp_is_refused_by_its_canvas(photo):
    data = bytearray(encoded(photo(16, 16), "WEBP", exif=b"Exif\0\0II*\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xff\xff\x00\xff\xff\x00"
    with pytest.raises(ValueError, match="65536x65536 pixels"):
        load_image(bytes(data), (32, 32), "RGB")


def test_a_jpeg_of_countless_scans_is_refused(photo, monkeypatch):
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    many = data[:-2] + data[start:-2] * 300 + data[-2:]
    load_image(many, (32, 32), "RGB")  # 12 million pixels take no time
    assert plain_size(many) == (64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(ValueError, match="scans of 4096 pixels"):
        load_image(many, (32, 32), "RGB")
    assert plain_size(many) is None


def test_cut_off_files_are_refused(photo):
    for kind in ("PNG", "JPEG"):
        data = encoded(photo(64, 64), kind)
        with pytest.raises((OSError, SyntaxError)):
            load_image(data[: len(data) // 2], (32, 32), "RGB")


def test_bombs_are_refused(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        load_image(encoded(photo(64, 64)), (32, 32), "RGB")
    with pytest.raises(ValueError, match="strip of 1x60"):  # small as a file, huge once it covers the target
        load_image(encoded(Image.new("RGB", (1, 60))), (32, 32), "RGB")
