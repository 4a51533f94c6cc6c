"""Which files DALI decodes to the very pixels that Pillow does, told from their first bytes.

That is plain JPEG (baseline or progressive, gray or YCbCr) and plain PNG (8-bit gray or RGB, opaque). What is rarer is
left to the reference, for decoders differ on it: CMYK, palettes, transparency, 16 bits, interlacing, animation.
"""

from __future__ import annotations

from PIL import Image

from fastdiff.images.image_files import MAX_PASSES, max_pixels, scans_of

_JPEG_FRAMES = range(0xC0, 0xD0)
_JPEG_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # Huffman tables, an extension, arithmetic-coding tables
_JPEG_BASELINE, _JPEG_PROGRESSIVE, _JPEG_ADOBE = 0xC0, 0xC2, 0xEE
_JPEG_BARE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HARMLESS = (b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"bKGD")
"""Chunks that change no pixel in either decoder."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a file that DALI decodes as Pillow does; None for any other, or for a broken header."""
    try:
        if data[:2] == b"\xff\xd8":
            size = _jpeg_size(data)
        elif data[:8] == _PNG_SIGNATURE:
            size = _png_size(data)
        else:
            return None
    except IndexError:  # the header ends early
        return None
    if size is None or 0 in size or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
        return None
    if data[:2] == b"\xff\xd8" and scans_of(data) * size[0] * size[1] > MAX_PASSES * max_pixels():
        return None
    return size


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if data[-2:] != b"\xff\xd9":  # cut off, or something after the picture: Pillow tells which
        return None
    at = 2
    adobe_transform = None
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _JPEG_BARE:
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        body = data[at + 4 : at + 2 + length]
        if marker == _JPEG_ADOBE and body[:5] == b"Adobe":
            adobe_transform = body[11]
        if marker in _JPEG_FRAMES and marker not in _JPEG_NOT_FRAMES:
            bits, components = body[0], body[5]
            plain = marker in (_JPEG_BASELINE, _JPEG_PROGRESSIVE) and bits == 8
            ycbcr = components == 3 and (body[6], body[9], body[12]) == (1, 2, 3) and adobe_transform in (None, 1)
            return (body[1] << 8 | body[2], body[3] << 8 | body[4]) if plain and (components == 1 or ycbcr) else None
        at += 2 + length
    return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bits, colour, interlaced = data[24], data[25], data[28]
    if data[12:16] != b"IHDR" or bits != 8 or colour not in (0, 2) or interlaced:
        return None
    at = 33
    while (kind := data[at + 4 : at + 8]) != b"IDAT":
        if kind not in _PNG_HARMLESS:
            return None
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return height, width
