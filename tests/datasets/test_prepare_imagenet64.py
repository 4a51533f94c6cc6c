"""imagenet64.py prepares the official archives and class folders, and refuses wrong input."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.preparation_scripts import (
    fail,
    images,
    last_line,
    only_line,
    pixels,
    random_pixels,
    run_script,
    save,
    succeed,
)
from PIL import Image

from fastdiff.images.labels import index_images
from fastdiff.images.pixels import load_image
from fastdiff.runtime.files import ProcessId

CLASSES = {"n01440764": 12, "n01443537": 9, "n09999999": 3}


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_pixels(seed, 40 + seed, 60)).save(file, "JPEG")
    return file.getvalue()


def tar_of(files: dict[str, bytes], compression: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


PICTURES = {
    label: {f"{label}_{1000 - 7 * i}.JPEG": jpeg(i + len(label) + count) for i in range(count)}
    for label, count in CLASSES.items()
}


def expected(suffix: str = "png") -> dict[str, bytes]:
    """Return output name → content of the picture. The class archives list pictures in descending order."""
    return {
        f"{label}_{number:08d}.{suffix}": pictures[name]
        for label, pictures in PICTURES.items()
        for number, name in enumerate(sorted(pictures))
    }


def assert_whole(out: Path, size: tuple[int, int] = (64, 64)) -> None:
    assert images(out) == sorted(expected())
    for name, data in expected().items():
        np.testing.assert_array_equal(pixels(out / name), load_image(data, size, "RGB"))
    assert index_images(out, "auto").class_names == sorted(CLASSES)


@pytest.fixture
def train_tar(tmp_path: Path) -> Path:
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of({f"{label}.tar": tar_of(pictures) for label, pictures in PICTURES.items()}))
    return path


def test_train_archive_and_restart(train_tar: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = ["imagenet64.py", "--source", train_tar, "--out", out]
    last = last_line(run_script(*command, "--workers", 2))
    assert_whole(out)
    assert last.startswith(f"24 images of 3 classes in {out}; to train on them: ")
    assert last.endswith("--image_size 64 --class_cond True --num_classes 3")

    (out / "n01443537_00000004.png").unlink()
    left = out / f".n01443537_00000004.png.{ProcessId.own()._replace(started=1).tag}.partial"  # of an ended process
    left.write_bytes(b"half")
    assert "(23 were there already)" in succeed(*command)
    assert not left.exists()
    assert_whole(out)
    assert "another size" in fail(*command, "--size", 32)


def test_files_that_macos_adds_to_an_archive_are_no_classes(train_tar: Path, tmp_path: Path):
    with tarfile.open(train_tar, "a") as tar:
        for name in ("._n01440764.tar", "__MACOSX/._n01443537.tar", "__MACOSX/n01443537.tar"):
            member = tarfile.TarInfo(name)
            member.size = 8
            tar.addfile(member, io.BytesIO(b"\0\5\x16\7\0\2\0\0"))
    run_script("imagenet64.py", "--source", train_tar, "--out", tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_validation_archive(tmp_path: Path):
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i) for i in reversed(range(6))}
    (tmp_path / "val.tar").write_bytes(tar_of(files))
    labels = ["n02", "n01", "n02", "n02", "n01", "tiger_cat"]
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    command = ["imagenet64.py", "--source", tmp_path / "val.tar", "--out", tmp_path / "out", "--size", 32]
    assert "give --val_labels" in fail(*command)
    succeed(*command, "--val_labels", tmp_path / "labels.txt")
    made = {"n01": [1, 4], "n02": [0, 2, 3], "tiger-cat": [5]}
    assert images(tmp_path / "out") == [f"{c}_{n:08d}.png" for c, seeds in made.items() for n in range(len(seeds))]
    for label, seeds in made.items():
        for number, seed in enumerate(seeds):
            picture = pixels(tmp_path / "out" / f"{label}_{number:08d}.png")
            np.testing.assert_array_equal(picture, load_image(jpeg(seed), (32, 32), "RGB"))

    (tmp_path / "short.txt").write_text("n01\nn02\n")
    assert "6 in all; it has 2" in fail(*command, "--val_labels", tmp_path / "short.txt")
    assert "No such file" in fail(*command, "--val_labels", tmp_path / "absent.txt")


def test_folder_of_class_folders(tmp_path: Path):
    source = tmp_path / "source"
    for label, pictures in PICTURES.items():
        (source / label).mkdir(parents=True)
        for name, data in pictures.items():
            (source / label / name).write_bytes(data)
    succeed("imagenet64.py", "--source", source, "--out", tmp_path / "out", "--size", "32x48")
    assert_whole(tmp_path / "out", (32, 48))

    save(source / "loose.png", random_pixels(0, 8, 8))
    assert "lies in no class folder" in fail("imagenet64.py", "--source", source, "--out", tmp_path / "out")


def test_classes_that_would_share_a_prefix(tmp_path: Path):
    for label in ("tiger_cat", "tiger-cat"):
        save(tmp_path / "source" / label / "1.png", random_pixels(0, 8, 8))
    line = fail("imagenet64.py", "--source", tmp_path / "source", "--out", tmp_path / "out")
    assert "share the prefix tiger-cat" in line


def test_bad_archives(train_tar: Path, tmp_path: Path):
    def error(name: str, data: bytes, *flags: object) -> str:
        (tmp_path / name).write_bytes(data)
        return fail("imagenet64.py", "--source", tmp_path / name, "--out", tmp_path / "out", *flags)

    whole = train_tar.read_bytes()
    assert "truncated" in error("cut.tar", whole[: len(whole) // 2])
    assert "truncated" in error("junk.tar", b"junk" * 1000)
    assert "uncompressed" in error("packed.tar.gz", tar_of({"n01.tar": tar_of({})}, "gz"))
    assert "truncated" in error("inner_junk.tar", tar_of({"n01.tar": b"junk" * 1000}))
    assert "neither class archives nor images" in error("text.tar", tar_of({"readme.txt": b"text"}))
    assert "no images" in error("empty_classes.tar", tar_of({"n01.tar": tar_of({"a.txt": b"a"})}))
    assert "leave out --val_labels" in error("train.tar", whole, "--val_labels", "labels.txt")
    absent = run_script("imagenet64.py", "--source", tmp_path / "absent.tar", "--out", tmp_path / "out")
    assert "No such file" in only_line(absent)
    assert not (tmp_path / "out").exists()
