"""Picture files before they are decoded: how large they may be, and what kinds are read.

A file's content decides on its kind, not its name. What may come is bounded before any of it is decoded:

    a file          a regular one of at most MAX_FILE_BYTES
    its pixels      at most twice Pillow's MAX_IMAGE_PIXELS (178,956,970), by its header
    a JPEG's scans  so many that its pixels are gone over MAX_PASSES times that often at most
"""

from __future__ import annotations

import os
import stat

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
MAX_FILE_BYTES = 1 << 30
MAX_PASSES = 10
"""An ordinary progressive JPEG has 10 scans; thousands, of few bytes each, would keep a decoder busy for hours."""
# First bytes → what files are often given a picture's name. (ISO media: at byte 4.)
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


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A picture file's bytes. ValueError for what is no regular file or too large, OSError for what can't be read."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
            raise ValueError("it is no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file has {found.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        return file.read(MAX_FILE_BYTES + 1)[:MAX_FILE_BYTES]


def max_pixels() -> float:
    """Pixels that a picture may have; infinity where Pillow's limit was switched off."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS is not None else float("inf")


def scans_of(data: bytes) -> int:
    """Scans of a JPEG: their marker stands nowhere in compressed pixels."""
    return data.count(b"\xff\xda")


def check_scans(data: bytes, pixels: int) -> None:
    """ValueError for a JPEG that would keep the decoder busy far longer than its pixels should."""
    scans = scans_of(data)
    if scans * pixels > MAX_PASSES * max_pixels():
        raise ValueError(f"its {scans} scans of {pixels} pixels each would take too long to decode")


def check_canvas(data: bytes) -> None:
    """ValueError for a WebP of too many pixels, for its decoder makes room for them when the file is opened."""
    size = _webp_size(data)
    if size is not None and size[0] * size[1] > max_pixels():
        raise ValueError(f"it has {size[1]}x{size[0]} pixels, at most {max_pixels():.0f} are decoded")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a WebP's canvas (RFC 9649, sections 2.5 to 2.7); None for another file, or a broken one."""
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


def other_kind(data: bytes) -> str:
    """What a file is that is none of FORMATS, where its first bytes tell; else empty."""
    return next((kind for at, start, kind in _OTHERS if data[at : at + len(start)] == start), "")


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
