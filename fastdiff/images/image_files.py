"""Reads image files, recognises their formats, checks their sizes and parses their headers, all without decoding.

The format is determined by a file's content, not by its name. These limits are checked before decoding:

    file    a regular file of at most MAX_FILE_BYTES
    pixels  at most twice Pillow's MAX_IMAGE_PIXELS (178,956,970), according to the header
    scans   of a JPEG: together they write at most MAX_PASSES times the largest number of pixels
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
MAX_FILE_BYTES = 1 << 30
MAX_PASSES = 10
"""An ordinary progressive JPEG has 10 scans; thousands of scans of few bytes would keep a decoder busy for hours."""
_JPEG_SIGNATURE, _PNG_SIGNATURE = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are no start-of-frame markers
_JPEG_BASELINE, _JPEG_PROGRESSIVE, _JPEG_ADOBE, _JPEG_PADDING = 0xC0, 0xC2, 0xEE, 0xFF
_JPEG_BARE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_PNG_HARMLESS = (b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"bKGD")
"""Chunks that change no pixel in either decoder."""
# Offset, signature and name of other formats whose files are often named like images.
_OTHERS = (
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"BM", "BMP"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "video"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"PK\3\4", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"<", "HTML, SVG or XML"),
)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read. ValueError for other or too large files, OSError if it can't be opened."""
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # Windows has the last one only
    descriptor = os.open(path, sum(flags, os.O_RDONLY))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
            raise ValueError("it is not a regular file")
        check_length(found.st_size)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def check_length(length: int) -> None:
    """Raise ValueError for a file of more than MAX_FILE_BYTES."""
    if length > MAX_FILE_BYTES:
        raise ValueError(f"the file has {length} bytes, at most {MAX_FILE_BYTES} are read")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file. Raises ValueError for other or too large files, OSError if it can't be read."""
    with open_file(path) as file:
        return file.read(MAX_FILE_BYTES + 1)[:MAX_FILE_BYTES]


def other_kind(data: bytes) -> str:
    """The format of a file that is none of FORMATS, by its first bytes; empty if it is unknown."""
    return next((kind for at, start, kind in _OTHERS if data[at : at + len(start)] == start), "")


# --- limits ---


def max_pixels() -> float:
    """The largest number of pixels of an image; infinity if Pillow's limit is switched off."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS is not None else float("inf")


def check_canvas(data: bytes) -> None:
    """Raise ValueError for a WebP with too many pixels: Pillow allocates them as soon as it opens the file."""
    size = _webp_size(data)
    if size is not None and size[0] * size[1] > max_pixels():
        raise ValueError(f"it has {size[1]}x{size[0]} pixels, at most {max_pixels():.0f} are decoded")


def check_scans(data: bytes, pixels: int) -> None:
    """Raise ValueError for a JPEG whose scans would take much longer to decode than its pixels should."""
    scans = data.count(b"\xff\xda") if data.startswith(_JPEG_SIGNATURE) else 1  # never part of the pixel data
    if scans * pixels > MAX_PASSES * max_pixels():
        raise ValueError(f"its {scans} scans of {pixels} pixels each would take too long to decode")


# --- headers ---


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a file that DALI decodes as Pillow does; None for any other file or a broken header."""
    try:
        if data.startswith(_JPEG_SIGNATURE):
            size = _jpeg_size(data)
        else:
            size = _png_size(data) if data.startswith(_PNG_SIGNATURE) else None
        if size is None or 0 in size or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
            return None
        check_scans(data, size[0] * size[1])
    except (IndexError, ValueError):  # the header ends early, or there are too many scans
        return None
    return size


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a WebP's canvas (RFC 9649, sections 2.5 to 2.7); None for another or a broken file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if data[12:16] == b"VP8 ":
        return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit baseline or progressive JPEG, gray or YCbCr; None for any other."""
    if data[-2:] != b"\xff\xd9":  # truncated, or followed by other data, which Pillow handles
        return None
    at, adobe_transform = 2, 1
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _JPEG_PADDING or marker in _JPEG_BARE:
            at += 1 if marker == _JPEG_PADDING else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        body = data[at + 4 : at + 2 + length]
        if marker == _JPEG_ADOBE and body[:5] == b"Adobe":
            adobe_transform = body[11]
        if marker in _JPEG_FRAMES:
            components = body[5]
            plain = marker in (_JPEG_BASELINE, _JPEG_PROGRESSIVE) and body[0] == 8
            ycbcr = components == 3 and (body[6], body[9], body[12]) == (1, 2, 3) and adobe_transform == 1
            return (body[1] << 8 | body[2], body[3] << 8 | body[4]) if plain and (components == 1 or ycbcr) else None
        at += 2 + length
    return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit gray or RGB PNG without transparency or interlacing; None for any other."""
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
