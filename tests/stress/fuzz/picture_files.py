"""Picture files of all kinds, and bytes that only look like one."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Made = tuple[str, bytes]
"""A short description, and a file's bytes."""


def noise(rng: random.Random, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A picture of random blots."""
    small = np.frombuffer(rng.randbytes(5 * 5 * 3), np.uint8).reshape(5, 5, 3)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sides(rng: random.Random) -> tuple[int, int]:
    """Height and width: ordinary, tiny or a strip."""
    if rng.random() < 0.1:
        return rng.choice([(1, rng.randrange(1, 3000)), (rng.randrange(1, 3000), 1), (1, 1), (2, 3)])
    return rng.randrange(2, 90), rng.randrange(2, 90)


def jpeg(rng: random.Random) -> Made:
    mode = rng.choice(["RGB", "RGB", "L", "CMYK"])
    options: dict[str, object] = {"quality": rng.choice([5, 60, 95]), "progressive": rng.random() < 0.4}
    if mode == "RGB":
        options |= rng.choice([{}, {"subsampling": 0}, {"subsampling": 2}, {"keep_rgb": True}])
    turned = ""
    if rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = orientation = rng.randrange(1, 9)
        options["exif"] = exif
        turned = f" turned {orientation}"
    return f"jpeg {mode}{turned}", encode(noise(rng, *sides(rng), mode), "JPEG", **options)


def mpo(rng: random.Random) -> Made:
    frames = [noise(rng, 20, 30) for _ in range(2)]
    return "mpo", encode(frames[0], "MPO", save_all=True, append_images=frames[1:])


def png(rng: random.Random) -> Made:
    mode = rng.choice(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"])
    height, width = sides(rng)
    if mode == "I;16":
        image = Image.fromarray(np.frombuffer(rng.randbytes(2 * height * width), np.uint16).reshape(height, width))
    else:
        image = noise(rng, height, width, {"PA": "P"}.get(mode, mode))
    options: dict[str, object] = {}
    if mode == "PA":
        options["transparency"] = rng.choice([0, bytes(rng.randrange(256) for _ in range(9))])
    if mode in ("L", "RGB") and rng.random() < 0.3:
        options["transparency"] = 7 if mode == "L" else (1, 2, 300)
    return f"png {mode}", encode(image, "PNG", **options)


def moving(rng: random.Random) -> Made:
    kind = rng.choice(["GIF", "WEBP", "PNG"])
    mode = {"GIF": "P", "WEBP": "RGBA", "PNG": "RGB"}[kind]
    frames = [noise(rng, 20, 30, mode) for _ in range(rng.randrange(2, 5))]
    options = {"disposal": rng.randrange(4)} if kind == "GIF" else {}
    return f"moving {kind}", encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=9, **options)


def gif(rng: random.Random) -> Made:
    mode = rng.choice(["1", "L", "P", "RGB"])
    options = {"transparency": 3} if mode == "P" else {}
    return f"gif {mode}", encode(noise(rng, *sides(rng), mode), "GIF", **options)


def webp(rng: random.Random) -> Made:
    mode = rng.choice(["RGB", "RGBA"])
    options: dict[str, object] = {"lossless": rng.random() < 0.5}
    if rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(1, 9)
        options["exif"] = exif
    return f"webp {mode}", encode(noise(rng, *sides(rng), mode), "WEBP", **options)


def other_kinds(rng: random.Random) -> Made:
    """Formats that Pillow reads but fastdiff must reject."""
    if rng.random() < 0.4:
        values = np.frombuffer(rng.randbytes(4 * 64), np.int32 if rng.random() < 0.5 else np.float32).reshape(8, 8)
        return "other TIFF", encode(Image.fromarray(values), "TIFF")
    kind = rng.choice(["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF", "SGI"])
    return f"other {kind}", encode(noise(rng, 16, 16), kind)


def no_picture(rng: random.Random) -> Made:
    return "text", rng.choice(
        [
            b"",
            b"\n",
            b"\0" * rng.randrange(1, 5000),
            b"<!DOCTYPE html><html><body>404</body></html>",
            "Das ist kein Bild, sondern Text ä".encode(rng.choice(["utf-8", "utf-16", "latin-1"])),
            b"PK\x03\x04" + rng.randbytes(100),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            rng.randbytes(rng.randrange(1, 3000)),
        ]
    )


def headed(rng: random.Random) -> Made:
    """Noise after a valid header."""
    _, whole = rng.choice([jpeg, png, gif, webp])(rng)
    keep = rng.randrange(2, 60)
    return "headed", whole[:keep] + rng.randbytes(rng.randrange(3000))


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with a valid checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_BOMB = zlib.compress(bytes(30_000_000), 9)


def forged_png(rng: random.Random) -> Made:
    """PNG chunks with valid checksums and invalid contents."""
    height, width = rng.choice([(4, 4), (1, 1), (9, 300), (2**31 - 1, 1), (60000, 60000), (20000, 20000), (0, 5)])
    bits, colour = rng.choice([1, 2, 4, 8, 16, 3]), rng.choice([0, 2, 3, 4, 6, 1])
    head = struct.pack(">IIBBBBB", width, height, bits, colour, rng.choice([0, 0, 9]), 0, rng.choice([0, 0, 1, 7]))
    if height * width <= 3000 and rng.random() < 0.7:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
        lines = b"".join(b"\0" + rng.randbytes(-(-width * channels * bits // 8)) for _ in range(height))
    else:
        lines = rng.choice([b"", bytes(100), rng.randbytes(50)])
    more = [
        chunk(b"PLTE", rng.randbytes(3 * rng.choice([1, 200, 256, 300]))),
        chunk(b"tRNS", rng.randbytes(rng.choice([1, 2, 6, 300]))),
        chunk(b"iCCP", b"name\0\0" + _BOMB),
        chunk(b"zTXt", b"key\0\0" + _BOMB),
        chunk(b"iTXt", b"key\0\1\0\0\0" + _BOMB),
        chunk(b"tEXt", b"key\0" + bytes(100_000)),
        chunk(b"gAMA", bytes(rng.randrange(6))),
        chunk(b"cHRM", rng.randbytes(7)),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        chunk(b"acTL", struct.pack(">II", rng.choice([0, 2, 2**31]), 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 9, 0, 0, 1, 1, 0, 0)),
        chunk(b"fdAT", rng.randbytes(9)),
        chunk(b"IDAT", b""),
        chunk(b"IEND", b""),
        chunk(rng.choice([b"ABCD", b"abcd", b"\xff\0\0\0"]), rng.randbytes(9)),
    ]
    extra = b"".join(rng.sample(more, rng.randrange(4)))
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rng.choice([zlib.compress(lines), _BOMB]))
    )
    return "forged png", data + (chunk(b"IEND", b"") if rng.random() < 0.8 else b"")


def forged_jpeg(rng: random.Random) -> Made:
    """A frame of another size, other tables, scans without end."""
    data = bytearray(encode(noise(rng, 40, 50), "JPEG", progressive=rng.random() < 0.6))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    way = rng.choice(["size", "bits", "components", "kind", "scans", "segment", "exif"])
    if way == "size":
        data[frame + 5 : frame + 9] = struct.pack(">HH", *rng.choice([(65500, 65500), (0, 9), (9, 0), (3000, 9000)]))
    elif way == "bits":
        data[frame + 4] = rng.choice([0, 1, 12, 16])
    elif way == "components":
        data[frame + 9] = rng.choice([0, 2, 4, 255])
    elif way == "kind":
        data[frame + 1] = rng.choice([0xC1, 0xC3, 0xC5, 0xC9, 0xCA, 0xCF])
    elif way == "scans":
        start = data.find(b"\xff\xda")
        data[-2:-2] = bytes(data[start:-2]) * 60
        data[frame + 5 : frame + 9] = struct.pack(">HH", *rng.choice([(40, 50), (9000, 9000)]))
    else:
        kind = {"segment": rng.choice([0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0xDD, 0xDC, 0x01]), "exif": 0xE1}[way]
        body = b"Exif\0\0" + rng.randbytes(40) if way == "exif" else rng.randbytes(rng.choice([0, 9, 60000]))
        length = rng.choice([len(body) + 2, len(body) + 2, 0, 65535])
        data[2:2] = struct.pack(">BBH", 0xFF, kind, length) + body
    return f"forged jpeg {way}", bytes(data)


def forged_gif(rng: random.Random) -> Made:
    """A screen or a frame of another size or place."""
    data = bytearray(encode(noise(rng, 20, 20, "P"), "GIF"))
    frame = data.find(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    huge = rng.choice([65535, 20000, 0, 1])
    at = rng.choice([6, 8, frame + 1, frame + 5, frame + 7])
    data[at : at + 2] = struct.pack("<H", huge)
    if rng.random() < 0.5:
        data[rng.choice([6, 8]) :][:2] = b""
        data[6:10] = struct.pack("<HH", 65535, rng.choice([2, 65535]))
    return "forged gif", bytes(data)


def forged_webp(rng: random.Random) -> Made:
    """A canvas of another size, with lossy, lossless and extended heads."""
    image = noise(rng, 20, 20, rng.choice(["RGB", "RGBA"]))
    options = rng.choice([{"lossless": True}, {}, {"exif": b"Exif\0\0II*\0"}])
    data = bytearray(encode(image, "WEBP", **options))
    at = rng.randrange(20, 30)
    data[at : at + rng.randrange(1, 4)] = b"\xff\xff\xff"
    return "forged webp", bytes(data)


KINDS: tuple[Callable[[random.Random], Made], ...] = (
    *(jpeg, jpeg, mpo, png, png, moving, gif, webp, other_kinds, no_picture, headed),
    *(forged_png, forged_png, forged_jpeg, forged_gif, forged_webp),
)
DAMAGEABLE = (jpeg, mpo, png, moving, gif, webp)


def bomb(rng: random.Random) -> Made:
    """The largest number of pixels that is decoded, in a small file."""
    side = 13_000
    kind = rng.choice(["1", "L", "RGB", "GIF", "WEBP", "JPEG"])
    if kind == "GIF":
        return "bomb gif", encode(Image.new("P", (side, side)), "GIF")
    if kind == "WEBP":
        return "bomb webp", encode(Image.new("RGB", (side, side)), "WEBP", quality=1, method=0)
    if kind == "JPEG":
        return "bomb jpeg", encode(Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0)
    return f"bomb png {kind}", encode(Image.new(kind, (side, side)), "PNG", compress_level=1)
