"""Cases of picture files: each must be read, or logged and replaced by its neighbour."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastdiff.images.image_files import plain_size
from fastdiff.images.listing import Listing
from fastdiff.images.open import open_images
from fastdiff.images.reader import Reader
from fastdiff.images.settings import DataSettings
from fuzz.cases import READ, REFUSED, Case, generator
from fuzz.damage import damage
from fuzz.picture_files import DAMAGEABLE, KINDS, bomb, encode, noise

SIZE = (32, 32)
CHANNELS = 3
EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "JPEG", "PNG")
_TOGETHER = 24
_log: list[str] = []


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log.append(record.getMessage())


def make(rng: random.Random) -> tuple[str, bytes]:
    """A picture file: odd, forged, or whole and then damaged."""
    if rng.random() < 0.5:
        return rng.choice(KINDS)(rng)
    name, data = rng.choice(DAMAGEABLE)(rng)
    way, data = damage(data, rng)
    return f"{way} {name}", data


def _listen() -> None:
    logger = logging.getLogger("fastdiff.images")
    logger.addHandler(_Log())
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """One file next to a valid one, read by the reference reader."""
    _listen()
    (folder / "good.png").write_bytes(encode(noise(random.Random(0), 40, 40), "PNG"))
    for index in range(start, stop):
        rng = generator(seed, "pictures", index)
        yield _case(folder, *make(rng), rng)


def bombs(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """The largest pictures that are decoded."""
    _listen()
    (folder / "good.png").write_bytes(encode(noise(random.Random(0), 40, 40), "PNG"))
    for index in range(start, stop):
        rng = generator(seed, "bombs", index)
        yield _case(folder, *bomb(rng), rng)


def _case(folder: Path, name: str, data: bytes, rng: random.Random) -> Case:
    file = folder / f"case.{rng.choice(EXTENSIONS)}"
    file.write_bytes(data)

    def run() -> tuple[str, str]:
        _log.clear()
        plain_size(data)
        listing = Listing(folder, [file.name, "good.png"], np.zeros(2, dtype=np.int64), ["a"])
        reader = Reader(listing, SIZE, CHANNELS)
        shown, pixels = reader.read(0, reader.reference)
        assert pixels.shape == (*SIZE, CHANNELS), pixels.shape
        assert pixels.dtype == np.uint8, pixels.dtype
        if shown == 0:
            assert not _log, _log
            return READ, ""
        assert len(_log) == 1, _log
        assert "MemoryError" not in _log[0], _log
        return REFUSED, _log[0]

    return Case(name, run, (str(file),))


def loader_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """A folder of such files and valid ones, read by both loaders."""
    _listen()
    for index in range(start, stop):
        rng = generator(seed, "loaders", index)
        place = folder / f"loaders{index}"
        place.mkdir()
        for i in range(_TOGETHER):
            (place / f"bad_{i:04d}.{rng.choice(EXTENSIONS)}").write_bytes(make(rng)[1])
        for i in range(101 * _TOGETHER):  # so that at most 1% can be unreadable
            (place / f"good_{i:04d}.png").write_bytes(encode(noise(rng, *SIZE), "PNG") if not i else b"")
            if i:
                (place / f"good_{i:04d}.png").unlink()
                (place / f"good_{i:04d}.png").hardlink_to(place / "good_0000.png")
        yield Case("loaders", lambda place=place: _both(place))


def _both(place: Path) -> tuple[str, str]:
    batches = {}
    for name in ("pillow", "dali"):
        _log.clear()
        settings = DataSettings(data_dir=str(place), loader=name, shuffle=False)
        with open_images(settings, size_hw=SIZE, channels=CHANNELS, batch_size=_TOGETHER + 8) as loader:
            (batch,) = itertools.islice(loader, 1)
            unreadable = loader.unreadable
        assert all(any(str(path) in line for line in _log) for path in unreadable), (unreadable, _log)
        assert all("\n" not in line for line in _log), _log
        batches[name] = batch.images[_TOGETHER:]
    assert torch.equal(batches["pillow"], batches["dali"]), "good pictures beside bad ones came out otherwise"
    return READ, ""
