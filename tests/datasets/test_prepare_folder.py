"""folder.py resizes and names a folder's images by class, and refuses wrong input."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fastdiff.datasets import digits
from helpers.preparation_scripts import (
    call_script,
    fail,
    images,
    last_line,
    pixels,
    random_pixels,
    run_script,
    save,
    succeed,
)
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.images.labels import index_images
from fastdiff.images.pixels import load_image


def test_class_folders(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    paths = [source / "big_cats" / "lion" / f"{i}.png" for i in range(20)] + [source / "dog" / "1.webp"]
    for seed, path in enumerate(paths):
        save(path, random_pixels(seed, 70, 50 + seed))
    (source / "notes.txt").write_text("no image")
    command = ["folder.py", "--source", source, "--out", out, "--size", 16]
    last = last_line(run_script(*command, "--workers", 2))
    assert last.startswith(f"21 images of 2 classes in {out}; to train on them: deepspeed fastdiff/train.py ")
    assert images(out) == [f"big-cats-lion_{i:08d}.png" for i in range(20)] + ["dog_00000020.png"]
    for i, path in enumerate(sorted(paths)):
        label = "dog" if i == 20 else "big-cats-lion"
        np.testing.assert_array_equal(pixels(out / f"{label}_{i:08d}.png"), load_image(path, (16, 16), "RGB"))
    assert index_images(out, "auto").class_names == ["big-cats-lion", "dog"]

    (out / "dog_00000020.png").unlink()
    assert "(20 were there already)" in succeed(*command)
    save(source / "dog" / "2.png", random_pixels(0, 8, 8))
    assert "was begun with another listing" in fail(*command)


def test_a_class_whose_name_is_almost_as_long_as_file_systems_allow(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("k" * 230, "dog"):
        save(source / name / "1.png", random_pixels(0, 8, 8))
    succeed("folder.py", "--source", source, "--out", out, "--size", 8)
    assert images(out) == ["dog_00000000.png", f"{'k' * 230}_00000001.png"]


def test_prefixes_and_exact_copy(tmp_path: Path):
    for seed, name in enumerate(["cat_1.png", "deep/er/cat_1.png", "dog_x_2.png"]):
        save(tmp_path / "source" / name, random_pixels(seed, 24, 24))
    succeed("folder.py", "--source", tmp_path / "source", "--out", tmp_path / "out", "--size", 24)
    assert images(tmp_path / "out") == ["cat_00000000.png", "cat_00000001.png", "dog_00000002.png"]
    for seed, name in enumerate(images(tmp_path / "out")):
        np.testing.assert_array_equal(pixels(tmp_path / "out" / name), random_pixels(seed, 24, 24))


def test_unlabelled_and_jpg(tmp_path: Path):
    for seed in range(3):
        save(tmp_path / "source" / f"{seed}.png", random_pixels(seed, 30, 30))
    flags = ["--source", tmp_path / "source", "--out", tmp_path / "out", "--size", 16, "--format", "jpg"]
    last = succeed("folder.py", *flags)
    assert last.startswith("3 images of 1 class in ")
    assert "--class_cond" not in last
    assert images(tmp_path / "out") == [f"image_{i:08d}.jpg" for i in range(3)]
    with Image.open(tmp_path / "out" / "image_00000000.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))


def test_gray_palette_and_transparent_pictures_become_rgb(tmp_path: Path):
    (tmp_path / "source").mkdir()
    picture = Image.fromarray(random_pixels(0, 20, 20))
    for mode in ("L", "P", "RGBA", "1"):
        picture.convert(mode).save(tmp_path / "source" / f"a_{mode}.png")
    succeed("folder.py", "--source", tmp_path / "source", "--out", tmp_path / "out", "--size", 8)
    for number, path in enumerate(sorted((tmp_path / "source").iterdir())):
        picture_out = pixels(tmp_path / "out" / f"a_{number:08d}.png")
        np.testing.assert_array_equal(picture_out, load_image(path, (8, 8), "RGB"))


def test_images_beside_class_folders(tmp_path: Path):
    save(tmp_path / "pets" / "1.png", random_pixels(0, 8, 8))
    save(tmp_path / "pets" / "cat" / "1.png", random_pixels(1, 8, 8))
    succeed("folder.py", "--source", tmp_path / "pets", "--out", tmp_path / "out", "--labels", "folder")
    assert images(tmp_path / "out") == ["cat_00000001.png", "pets_00000000.png"]


def test_unreadable_images(tmp_path: Path):
    for i in range(4):
        save(tmp_path / "source" / f"a_{i}.png", random_pixels(i, 8, 8))
    broken = tmp_path / "source" / "a_1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "source" / "a_2.png").write_text("no picture")
    done = call_script("folder.py", "--source", tmp_path / "source", "--out", tmp_path / "out", "--size", 8)
    assert done.returncode == 2
    assert f"unreadable: {broken}: " in done.stderr
    assert f"unreadable: {tmp_path}/source/a_2.png: not a picture, or of an unknown kind" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("folder.py: error: 2 of 4 images are unreadable")
    assert images(tmp_path / "out") == ["a_00000000.png", "a_00000003.png"]
    listed = tmp_path / "out.unreadable_images.txt"
    assert listed.read_text().splitlines() == [str(broken), str(tmp_path / "source" / "a_2.png")]
    assert done.stderr.rstrip().endswith(f"xargs -d '\\n' rm < {listed}")
    broken.unlink()
    (tmp_path / "source" / "a_2.png").unlink()
    again = ["--source", tmp_path / "source", "--out", tmp_path / "again", "--size", 8]
    assert succeed("folder.py", *again).startswith("2 images")


def test_paths_are_expanded(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "in" / "1.png", random_pixels(1, 9, 9))
    summary = succeed("folder.py", "--source=~/in", "--out", "${HOME}/out", "--size", 8)
    assert images(tmp_path / "out") == ["image_00000000.png"]
    assert f"--data_dir {tmp_path}/out" in summary
    assert succeed("pack.py", "--data_dir=~/in", "--out", "~/packed", "--size", 8)
    assert (tmp_path / "packed" / "pixels.npy").is_file()
    message = fail("folder.py", "--source", "$FD_NONE/in", "--out", tmp_path / "other")
    assert "argument --source: $FD_NONE/in: the environment variable FD_NONE is not set" in message


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("cifar10", "archive"),
        ("lsun", "lmdb"),
        ("imagenet64", "source"),
        ("imagenet64", "val_labels"),
        ("digits", "out"),
    ],
)
def test_every_script_expands_paths(script: str, flag: str):
    done = call_script(f"{script}.py", f"--{flag}", "$FD_NONE/x")
    assert done.returncode == 2
    assert f"argument --{flag}: $FD_NONE/x: the environment variable FD_NONE is not set" in done.stderr


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(sys, "argv", ["digits.py", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="pip install scikit-learn$"):
        digits.main()
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    assert "is empty" in fail("folder.py", "--source", source, "--out", tmp_path / "out")
    assert "does not exist" in fail("folder.py", "--source", tmp_path / "absent", "--out", tmp_path / "out")
    save(source / "a_1.png", random_pixels(0, 8, 8))
    assert "lies in" in fail("folder.py", "--source", source, "--out", source / "small")
    assert "can't write to" in fail("folder.py", "--source", source, "--out", "/dev/null/out")
    assert "is not a size" in fail("folder.py", "--source", source, "--out", tmp_path / "out", "--size", 0)
    assert "--format" in fail("folder.py", "--source", source, "--out", tmp_path / "out", "--format", "bmp")


def test_damaged_record(tmp_path: Path):
    save(tmp_path / "source" / "a_1.png", random_pixels(0, 8, 8))
    (tmp_path / "out").mkdir()
    for text in ("{", "[1]"):
        (tmp_path / "out" / ".preparation.json").write_text(text)
        assert "is damaged" in fail("folder.py", "--source", tmp_path / "source", "--out", tmp_path / "out")
