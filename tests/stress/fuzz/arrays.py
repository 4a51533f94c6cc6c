"""Cases of arrays in files: npz of small images and for metrics, parts of jobs, packed folders, and CIFAR's pickles."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastdiff.datasets import array_pickle
from helpers.tiny import SUPER_RES, pictures

from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.evaluation.image_sets import open_image_set
from fastdiff.evaluation.metrics import SquareRoot
from fastdiff.evaluation.statistics import holds_statistics, read_statistics
from fastdiff.images.cache.build import pack
from fastdiff.images.labels import index_images
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings
from fastdiff.models import SuperResSettings
from fastdiff.sampling.job.chunks import DamagedFile, Range, Store
from fastdiff.sampling.job.manifest import Manifest, digest
from fastdiff.sampling.low_res import BaseImages
from fuzz.cases import READ, REFUSED, Case, generator
from fuzz.checkpoints import code
from fuzz.damage import damage

COUNT, SHAPE = 5, (8, 8, 3)


def npy(shape: tuple[int, ...], descr: str = "|u1", data: bytes = b"", version: int = 1, order: bool = False) -> bytes:
    """The bytes of an .npy file with an arbitrary header and data."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of .npy members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def strange_npy(rng: random.Random) -> bytes:
    """An array of another shape or type, or with an invalid header."""
    images = np.zeros((COUNT, *SHAPE), np.uint8)
    ways: list[Callable[[], bytes]] = [
        lambda: saved(images.astype(rng.choice([np.float32, np.int8, np.uint16, np.complex64, bool]))),
        lambda: saved(np.array([code(rng)], dtype=object)),
        lambda: saved(images[: rng.randrange(3), : rng.randrange(9)]),
        lambda: saved(np.asfortranarray(images)),
        lambda: saved(np.array("text")),
        lambda: saved(np.zeros(COUNT, dtype=[("a", "u1"), ("b", "f4")])),
        lambda: npy((10**12, *SHAPE)),
        lambda: npy((10**9, *SHAPE), data=bytes(5000)),
        lambda: npy((2**63, 2**63)),
        lambda: npy((-1, *SHAPE), data=bytes(5000)),
        lambda: npy((COUNT, *SHAPE), "|O", pickle.dumps(code(rng))),
        lambda: npy((COUNT, *SHAPE), rng.choice(["<f9", "x", "|V0", "<M8[s]", "|S5", "<U100000"]), bytes(960)),
        lambda: npy((COUNT, *SHAPE), data=bytes(COUNT * 192), version=rng.choice([1, 2, 3, 9])),
        lambda: b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + bytes(1000),
        lambda: b"\x93NUMPY\x01\0\x10\0" + b"(" * 16,
        lambda: b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"[" * 9000,
        lambda: b"",
        lambda: damage(saved(images), rng)[1],
    ]
    return rng.choice(ways)()


@lru_cache
def bomb(name: str, count: int) -> bytes:
    """A zip of less than one megabyte that unpacks to 384 MB."""
    return zipped({name: npy((count, *SHAPE), data=bytes(2_000_000 * 192))}, zipfile.ZIP_DEFLATED)


def strange_npz(rng: random.Random, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """A damaged npz, or one with an invalid array."""
    way = rng.choice(["damaged", "damaged", "array", "array", "array", "missing", "plain", "other", "bomb"])
    if way == "bomb":
        return way, bomb(next(iter(whole)), rng.choice([COUNT, 2_000_000]))
    if way == "damaged":
        data = zipped(whole, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        name, data = damage(data, rng)
        return f"damaged {name}", data
    if way == "plain":
        return way, rng.choice([saved(np.zeros((COUNT, *SHAPE), np.uint8)), pickle.dumps(code(rng)), b"", b"PK\5\6"])
    if way == "other":
        return way, rng.choice([zipped({}), rng.randbytes(900), b"PK\x03\x04" + rng.randbytes(60)])
    members = dict(whole)
    chosen = rng.choice(list(members))
    if way == "missing":
        del members[chosen]
    else:
        members[chosen] = strange_npy(rng)
    return way, zipped(members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def npz_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Small images for enlarging."""
    settings = SuperResSettings(**SUPER_RES, class_cond=True, num_classes=3)
    labels = np.arange(COUNT, dtype=np.int64) % 3
    whole = {"arr_0": saved(np.zeros((COUNT, *SHAPE), np.uint8)), "arr_1": saved(labels)}
    file = folder / "base.npz"

    def run() -> tuple[str, str]:
        BaseImages(str(file), settings, [])(torch.arange(COUNT))
        return READ, ""

    for index in range(start, stop):
        name, data = strange_npz(generator(seed, "npz", index), whole)
        file.write_bytes(data)
        yield Case(name, run, (str(file),))


def evaluation_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Images and statistics for metrics."""
    network = FeatureNetwork("network", "", {"pool": 12}, lambda images, outputs, precision: {}, torch.device("cpu"))
    images = {"arr_0": saved(np.zeros((COUNT, *SHAPE), np.uint8))}
    statistics = {"mu": saved(np.zeros(12)), "sigma": saved(np.eye(12)), "features": saved(np.zeros((COUNT, 12)))}
    statistics |= {"count": saved(np.array(COUNT)), "about": saved(np.array(json.dumps({"network": "network"})))}
    file = folder / "reference.npz"

    def run() -> tuple[str, str]:
        if holds_statistics(file):
            SquareRoot(read_statistics(file, ("pool",), network).moments["pool"], network.device)
        else:
            for _ in open_image_set(str(file), device="cpu").batches(4096):
                pass
        return READ, ""

    for index in range(start, stop):
        name, data = strange_npz(generator(seed, "evaluation", index), statistics if index % 2 else images)
        file.write_bytes(data)
        yield Case(name, run, (str(file),))


def part_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Chunks of a job, and merged npz files."""
    images, labels = np.zeros((COUNT, *SHAPE), np.uint8), np.zeros(COUNT, np.int64)
    part = {"images": saved(images), "labels": saved(labels), "job": saved(np.array(digest({})))}
    merged = {
        "arr_0": saved(images),
        "arr_1": saved(labels),
        "seed": saved(np.int64(0)),
        "index": saved(np.arange(COUNT)),
    }
    for index in range(start, stop):
        rng = generator(seed, "parts", index)
        place = folder / f"job{index}"
        (place / "parts").mkdir(parents=True)
        is_part = rng.random() < 0.5
        held = Range(0, COUNT)
        file = place / "parts" / f"{held.name}.npz" if is_part else place / f"samples_{COUNT}x8x8x3.npz"
        name, data = strange_npz(rng, part if is_part else merged)
        file.write_bytes(data)
        yield Case(f"{name} part", lambda place=place, file=file: _read_job(place, file), (str(file),))
        shutil.rmtree(place)


def _read_job(place: Path, file: Path) -> tuple[str, str]:
    manifest: Manifest = {"identity": {}, "shape": list(SHAPE), "labelled": True, "seed": 0, "part_size": 2}
    store = Store(place, manifest, COUNT)
    try:
        if store.missing():
            return REFUSED, f"{file} is not one of this job"
        for _, drawn in store.images():
            assert drawn.images.dtype == np.uint8
        assert sum(len(labels) for labels in store.labels()) == COUNT
    except DamagedFile as error:
        return REFUSED, str(error)
    return READ, ""


def packed_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """A packed folder with one damaged file."""
    pictures(folder / "pictures", ["a_1", "a_2", "b_1"])
    shutil.rmtree(folder / "packed", ignore_errors=True)
    pack(index_images(folder / "pictures"), (8, 8), 3, folder / "packed", workers=1)
    whole = {path.name: path.read_bytes() for path in (folder / "packed").iterdir()}
    for index in range(start, stop):
        rng = generator(seed, "packed", index)
        name = rng.choice(sorted(whole))
        data = whole[name]
        if name.endswith(".json") and rng.random() < 0.5:
            data = _strange_json(data, rng)
        elif name.endswith(".npy") and rng.random() < 0.5:
            data = strange_npy(rng)
        else:
            data = damage(data, rng)[1]
        (folder / "packed" / name).write_bytes(data)
        yield Case(f"{name} damaged", lambda: _read_packed(folder / "packed"), (str(folder / "packed"), "--"))
        (folder / "packed" / name).write_bytes(whole[name])


def _strange_json(data: bytes, rng: random.Random) -> bytes:
    content = json.loads(data)
    value = rng.choice(
        [None, 5, -1, 2**70, 1.5, "x", [], [1], {}, [None], [[1]], [{"index": 9}], ["../../x"], "\ud800"]
    )
    if isinstance(content, dict):
        content[rng.choice(list(content))] = value
    else:
        content[rng.randrange(len(content))] = value
    return json.dumps(rng.choice([content, content, content, value])).encode()


def _read_packed(folder: Path) -> tuple[str, str]:
    settings = DataSettings(data_dir=str(folder), shuffle=False)
    with open_images(settings, size_hw=(8, 8), channels=3, batch_size=3) as loader:
        assert next(loader).images.shape == (3, 8, 8, 3)
    return READ, ""


def pickle_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Pickles of dictionaries and arrays, the format of CIFAR."""
    batch = {b"labels": [1, 2], b"data": np.zeros((2, 3072), np.uint8), b"filenames": [b"a.png", b"b.png"]}

    def run(data: bytes) -> tuple[str, str]:
        array_pickle.read(data, "batch_1")
        return READ, ""

    for index in range(start, stop):
        rng = generator(seed, "pickles", index)
        protocol = rng.choice([0, 2, 4, 5])
        way = rng.choice(["whole", "damaged", "damaged", "damaged", "code", "code", "memory"])
        if way == "code":
            data = pickle.dumps(rng.choice([code(rng), {b"data": code(rng)}, {b"labels": [code(rng)]}]), protocol)
        elif way == "memory":
            data = rng.choice(
                [
                    b"\x80\x02]r\xff\xff\xff\x7f.",  # memo index 2 billion
                    b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".",
                    b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
                    b"c_codecs\nencode\nq\0(X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"X\6\0\0\0latin1tq\1"
                    b"0" + b"(" + b"h\0h\1R" * 5000 + b"l.",
                    b"\x80\x02" + b"(" * 10**6 + b".",
                    b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
                    b"L" + b"9" * 10**6 + b"\n.",
                ]
            )
        else:
            data = pickle.dumps(batch, protocol)
            data = data if way == "whole" else damage(data, rng)[1]
        yield Case(f"{way} {protocol}", lambda data=data: run(data), ("batch_1",))
