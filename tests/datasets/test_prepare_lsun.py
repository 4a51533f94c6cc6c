"""lsun.py extracts an LMDB database of LSUN, and refuses wrong input."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from helpers.preparation_scripts import (
    call_script,
    fail,
    images,
    last_line,
    only_line,
    pixels,
    random_pixels,
    run_script,
    succeed,
)
from PIL import Image

from fastdiff.images.labels import index_images
from fastdiff.images.pixels import load_image

lmdb = pytest.importorskip("lmdb")

COUNT = 40


def webp(seed: int, lossless: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_pixels(seed, 32 + seed, 40)).save(file, "WEBP", lossless=lossless)
    return file.getvalue()


def write_lmdb(folder: Path, values: list[bytes]) -> Path:
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 23) as environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number * 7919:040x}".encode(), value)
    return folder


@pytest.fixture(scope="module")
def values() -> list[bytes]:
    return [webp(seed, lossless=seed % 2 == 0) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def database(values: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lmdb(tmp_path_factory.mktemp("lsun") / "bedroom_train_lmdb", values)


def test_pixels_names_and_labels(database: Path, values: list[bytes], tmp_path: Path):
    out = tmp_path / "out"
    last = succeed("lsun.py", "--lmdb", database, "--out", out, "--size", 16)
    assert images(out) == [f"bedroom_{number:07d}.png" for number in range(COUNT)]
    for number, value in enumerate(values):
        np.testing.assert_array_equal(pixels(out / f"bedroom_{number:07d}.png"), load_image(value, (16, 16), "RGB"))
    assert last.startswith(f"{COUNT} images of 1 class in {out}; to train on them: ")
    assert last.endswith(f"--data_dir {out} --image_size 16")
    assert index_images(out, "auto").class_names == ["bedroom"]


def test_picture_of_the_right_size_is_copied_exactly(database: Path, tmp_path: Path):
    succeed("lsun.py", "--lmdb", database, "--out", tmp_path, "--size", "32x40", "--limit", 1)
    np.testing.assert_array_equal(pixels(tmp_path / "bedroom_0000000.png"), random_pixels(0, 32, 40))


def test_limit_restart_and_other_size(database: Path, tmp_path: Path):
    def command(*more: object) -> list[object]:
        return ["lsun.py", "--lmdb", database, "--out", tmp_path, *more]

    succeed(*command("--size", 16, "--limit", 5))
    assert len(images(tmp_path)) == 5
    assert "(5 were there already)" in succeed(*command("--size", 16))
    assert len(images(tmp_path)) == COUNT
    assert "another size ([16, 16], now [24, 24])" in fail(*command("--size", 24))
    assert "another name (bedroom, now church)" in fail(*command("--size", 16, "--name", "church"))


def test_output_is_the_same_with_any_number_of_workers(database: Path, tmp_path: Path):
    one, two = tmp_path / "1", tmp_path / "2"
    succeed("lsun.py", "--lmdb", database, "--out", one, "--size", 16)
    last_line(run_script("lsun.py", "--lmdb", database, "--out", two, "--size", 16, "--workers", 2))
    assert images(one) == images(two)
    for name in images(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_underscore_in_the_category(values: list[bytes], tmp_path: Path):
    folder = write_lmdb(tmp_path / "dining_room_val_lmdb", values[:2])
    succeed("lsun.py", "--lmdb", folder, "--out", tmp_path / "out", "--size", 16)
    assert images(tmp_path / "out") == ["dining-room_0000000.png", "dining-room_0000001.png"]


def test_unreadable_images_are_named_and_counted(values: list[bytes], tmp_path: Path):
    broken = list(values)
    broken[3], broken[30] = b"no picture", values[30][: len(values[30]) // 2]
    few = write_lmdb(tmp_path / "bedroom_lmdb", broken)
    done = call_script("lsun.py", "--lmdb", few, "--out", tmp_path / "out", "--size", 16)
    assert done.returncode == 2
    assert "left out, unreadable: image 3 (key 0" in done.stderr
    assert "left out, unreadable: image 30 (key 0" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lsun.py: error: 2 of 40 images are unreadable, more than 1%")
    assert "Traceback" not in done.stderr
    assert len(images(tmp_path / "out")) == COUNT - 2

    many = write_lmdb(tmp_path / "church_lmdb", [values[0]] * 199 + [b"no picture"])
    last = succeed("lsun.py", "--lmdb", many, "--out", tmp_path / "many", "--size", 8)
    assert last.startswith("199 images of 1 class in ")
    assert "(1 unreadable ones were left out)" in last


def test_bad_input(database: Path, tmp_path: Path):
    out = ["--out", tmp_path / "out"]
    assert "not an LMDB folder" in fail("lsun.py", "--lmdb", tmp_path / "absent", *out)
    zipped = tmp_path / "bedroom_train_lmdb.zip"
    zipped.write_bytes(b"PK")
    assert "unzip it" in fail("lsun.py", "--lmdb", zipped, *out)
    empty = write_lmdb(tmp_path / "empty_lmdb", [])
    assert "no images" in fail("lsun.py", "--lmdb", empty, *out)
    assert "is not a size such as 64" in fail("lsun.py", "--lmdb", database, *out, "--size", "big")

    junk = tmp_path / "junk_lmdb"
    junk.mkdir()
    (junk / "data.mdb").write_bytes(b"junk" * 5000)
    assert "can't read" in fail("lsun.py", "--lmdb", junk, *out)

    cut = tmp_path / "cut_lmdb"
    cut.mkdir()
    data = (database / "data.mdb").read_bytes()
    (cut / "data.mdb").write_bytes(data[: len(data) // 2])
    assert "truncated" in fail("lsun.py", "--lmdb", cut, *out)


def test_lmdb_that_is_not_installed(database: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['lmdb'] = None\n")
    root = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_script("lsun.py", "--lmdb", database, "--out", tmp_path / "out", pythonpath=root)
    assert "pip install lmdb" in only_line(done)
