"""pack.py packs images as the loaders decode them, and refuses wrong input."""

from pathlib import Path

import numpy as np
from helpers.preparation_scripts import (
    call_script,
    fail,
    last_line,
    only_line,
    random_pixels,
    run_script,
    save,
    succeed,
)

from fastdiff.images.open import open_images
from fastdiff.images.pixels import load_image
from fastdiff.images.settings import DataSettings


def source(folder: Path, count: int = 20) -> Path:
    for seed in range(count):
        save(folder / "source" / f"{'cat' if seed % 2 else 'dog'}_{seed:02d}.png", random_pixels(seed, 30, 24))
    return folder / "source"


def test_packs_beside_the_images(tmp_path: Path):
    images = source(tmp_path)
    place = tmp_path / "source.packed_16x16x3"
    done = run_script("pack.py", "--data_dir", images, "--size", 16, "--workers", 2)
    assert last_line(done) == (
        f"20 images in {place}, 1.54e-05 GB; to train on them: deepspeed fastdiff/train.py "
        f"--data_dir {place} --image_size 16 --class_cond True --num_classes 2"
    )
    assert "packing 16x16: 100%" in done.stderr
    pixels = np.load(place / "pixels.npy")
    for path, row in zip(sorted(images.iterdir()), pixels, strict=True):
        np.testing.assert_array_equal(row, load_image(path, (16, 16), "RGB"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", place.name]
    settings = DataSettings(data_dir=str(images), cache="disk")  # finds it there
    with open_images(settings, size_hw=(16, 16), channels=3, batch_size=4, build_cache=False) as loader:
        assert loader.loader_name == "packed"
    assert succeed("pack.py", "--data_dir", images, "--size", 16) == last_line(done)


def test_gray_strips_into_a_folder_of_ones_own(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    flags = ["--data_dir", source(tmp_path), "--size", "8x16", "--channels", 1, "--out", tmp_path / "mine"]
    assert (
        succeed("pack.py", *flags)
        .split("train.py ")[1]
        .startswith(f"--data_dir {tmp_path / 'mine'} --image_size 8x16 --in_channels 1 ")
    )
    assert np.load(tmp_path / "mine" / "pixels.npy").shape == (20, 8, 16, 1)


def test_unreadable_images_are_counted(tmp_path: Path):
    images = source(tmp_path)
    (images / "dog_00.png").write_bytes(b"")
    assert "(1 unreadable, each replaced by the next one)" in succeed("pack.py", "--data_dir", images)
    (images / "dog_02.png").write_bytes(b"")
    done = call_script("pack.py", "--data_dir", images, "--size", 16)
    assert done.returncode == 2
    assert "2 of 20 images can't be read" in done.stderr.splitlines()[-1]


def test_bad_input(tmp_path: Path):
    images = source(tmp_path)
    assert "does not exist" in fail("pack.py", "--data_dir", tmp_path / "nowhere")
    assert "is there already and no packed folder" in fail("pack.py", "--data_dir", images, "--out", images)
    assert "invalid choice: 2" in only_line(call_script("pack.py", "--data_dir", images, "--channels", 2))
    succeed("pack.py", "--data_dir", images, "--size", 8, "--out", tmp_path / "packed")
    assert "is packed already" in fail("pack.py", "--data_dir", tmp_path / "packed")
    message = fail("pack.py", "--data_dir", images, "--size", 16, "--out", tmp_path / "packed")
    assert "--out: " in message
    assert "holds images of 8x8 pixels in 3 channels, 16x16 pixels in 3 channels are wanted" in message
    (images / "dog_00.png").unlink()
    message = fail("pack.py", "--data_dir", images, "--size", 8, "--out", tmp_path / "packed")
    assert "--out: " in message
    assert "their number differed" in message
    assert message.endswith("delete that folder to have it made anew, or choose another")
