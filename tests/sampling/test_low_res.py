"""The small images of a super-resolution job, their classes and their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import flags, pictures, refusal, save, save_bare, super_res, unet
from PIL import Image

from fastdiff import sample, super_res_sample

CLASSES = ["ape", "cat", "dog"]


def run(out: Path, **settings: Any) -> dict[str, np.ndarray]:
    super_res_sample.main(flags({"out_dir": out, "batch_size": 3, "grid_images": 0, "steps": 2, **settings}))
    with np.load(next(out.glob("samples_*.npz"))) as content:
        return dict(content)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, Any]:
    """Flags for a class-conditional upsampler without names, as improved-diffusion's."""
    path = save_bare(super_res(class_cond=True, num_classes=9), tmp_path / "net.pt")
    return {
        "model_path": path,
        "large_size": 16,
        "small_size": 8,
        "noise_schedule": "cosine",
        "attention_resolutions": 8,
    }


def test_photos_have_no_classes(bare: dict[str, Any], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    pictures(photos, ["beach", "alps", "trip/lake"])
    out = tmp_path / "out"
    for place in (photos, photos / "alps.png"):
        given = flags({**bare, "base_samples": place, "out_dir": out})
        message = refusal(super_res_sample.main, given)
        assert message.startswith(f"--base_samples: {place} doesn't say which of the model's classes")
        assert "give --classes: numbers such as 0,5" in message
    assert not out.exists()
    got = run(out, **bare, base_samples=photos, classes="4,7", save_as="npz,png")
    np.testing.assert_array_equal(got["arr_1"], [4, 7, 4])
    assert sorted(file.name for file in (out / "images").iterdir()) == ["alps.png", "beach.png", "trip-lake.png"]
    with Image.open(out / "images" / "beach.png") as image:
        np.testing.assert_array_equal(np.asarray(image), got["arr_0"][1])
    one = run(tmp_path / "one", **bare, base_samples=photos / "beach.png", classes="7")
    assert one["arr_0"].shape == (1, 16, 16, 3)


def test_classes_are_part_of_the_job(bare: dict[str, Any], tmp_path: Path) -> None:
    pictures(tmp_path / "photos", ["beach"])
    run(tmp_path / "out", **bare, base_samples=tmp_path / "photos", classes="4")
    again = flags(
        {**bare, "base_samples": tmp_path / "photos", "classes": "5", "out_dir": tmp_path / "out", "steps": 2}
    )
    assert "holds another job: its classes" in refusal(super_res_sample.main, again)


def test_names_that_are_numbers_are_labels(
    bare: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the pictures of a job whose checkpoint has no names."""
    pictures(tmp_path / "small", ["7_000000", "2_000001", "7_000002"])
    got = run(tmp_path / "out", **bare, base_samples=tmp_path / "small")
    np.testing.assert_array_equal(got["arr_1"], [2, 7, 7])
    assert "labels: from prefixes: 2 1, 7 2\n" in capsys.readouterr().out
    pictures(tmp_path / "many", ["7_000000", "9_000001"])
    given = flags({**bare, "base_samples": tmp_path / "many", "out_dir": tmp_path / "x"})
    assert "'9'" in refusal(super_res_sample.main, given)


def test_the_folder_of_a_job_is_read_by_its_npz(tmp_path: Path) -> None:
    base = save(unet(class_cond=True, num_classes=3), tmp_path / "base.pt", CLASSES)
    large = save(super_res(class_cond=True, num_classes=3), tmp_path / "large.pt", CLASSES[::-1])
    small = tmp_path / "small"
    given = {"model_path": base, "num_samples": 4, "steps": 2, "classes": "0,1,2", "out_dir": small}
    sample.main(flags({**given, "save_as": "npz,png", "grid_images": 4}))
    got = run(tmp_path / "out", model_path=large, base_samples=small)
    assert got["arr_0"].shape == (4, 16, 16, 3)  # the grid is no fifth image
    np.testing.assert_array_equal(got["arr_1"], [2, 1, 0, 2])
    (small / "samples_4x8x8x3.npz").unlink()
    pngs = run(tmp_path / "pngs", model_path=large, base_samples=small)
    np.testing.assert_array_equal(pngs["arr_1"], [2, 2, 1, 0])  # in the order of their names
    shutil.rmtree(small / "images")
    message = refusal(super_res_sample.main, flags({"model_path": large, "base_samples": small, "out_dir": "x"}))
    assert "has no npz; give --save_as npz to sample.py" in message


def test_classes_by_folder_and_by_dataset_json(tmp_path: Path) -> None:
    large = save(super_res(class_cond=True, num_classes=3), tmp_path / "large.pt", CLASSES)
    pictures(tmp_path / "small", ["dog/1", "cat/2"])
    got = run(tmp_path / "out", model_path=large, base_samples=tmp_path / "small")
    np.testing.assert_array_equal(got["arr_1"], [1, 2])
    labels = {"labels": {"cat/2.png": "ape", "dog/1.png": "dog"}}
    (tmp_path / "small" / "dataset.json").write_text(json.dumps(labels))
    got = run(tmp_path / "listed", model_path=large, base_samples=tmp_path / "small")
    np.testing.assert_array_equal(got["arr_1"], [0, 2])


def test_labels_of_a_file_are_part_of_the_job(tmp_path: Path) -> None:
    """They can change while the pictures stay the same, and a finished job would keep those of other classes."""
    large = save(super_res(class_cond=True, num_classes=3), tmp_path / "large.pt", CLASSES)
    small, npz = tmp_path / "small", tmp_path / "small.npz"
    pictures(small, ["1", "2"])
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for number, classes in enumerate((["ape", "cat"], ["cat", "dog"])):
        (small / "dataset.json").write_text(json.dumps({"labels": {f"{i + 1}.png": classes[i] for i in range(2)}}))
        np.savez(npz, arr_0=images, arr_1=[0, 1], class_names=classes)
        for source in (small, npz):
            out = tmp_path / f"of_{source.suffix}"
            if number:
                given = {"model_path": large, "base_samples": source, "out_dir": out, "steps": 2}
                assert "holds another job: its base_samples" in refusal(super_res_sample.main, flags(given))
            else:
                assert run(out, model_path=large, base_samples=source)["arr_1"].tolist() == [0, 1]


def test_models_without_classes_need_none(tmp_path: Path) -> None:
    large = save(super_res(), tmp_path / "large.pt")
    pictures(tmp_path / "photos", ["beach", "my_alps"])
    assert "arr_1" not in run(tmp_path / "out", model_path=large, base_samples=tmp_path / "photos")
    given = flags({"model_path": large, "base_samples": tmp_path / "photos", "classes": "1", "out_dir": "x"})
    assert "--classes: the model is not class-conditional" in refusal(super_res_sample.main, given)


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    large = save(super_res(), tmp_path / "large.pt")
    pictures(tmp_path / "photos", ["beach"])
    (tmp_path / "photos" / "alps.png").symlink_to("nowhere.png")
    given = flags({"model_path": large, "base_samples": tmp_path / "photos", "out_dir": tmp_path / "x", "steps": 2})
    message = refusal(super_res_sample.main, given)
    assert message.startswith("--base_samples: 1 of 2 images can't be read")
    assert "alps.png (No such file or directory)" in message


@pytest.mark.parametrize("name", ["small.zip", "small.tar", "small.tar.gz"])
def test_archives_are_named(name: str, tmp_path: Path) -> None:
    large = save(super_res(), tmp_path / "large.pt")
    pictures(tmp_path / "photos", ["beach", "alps"])
    kind = {"small.zip": "zip", "small.tar": "tar", "small.tar.gz": "gztar"}[name]
    shutil.make_archive(str(tmp_path / "small"), kind, tmp_path / "photos")
    given = flags({"model_path": large, "base_samples": tmp_path / name, "out_dir": tmp_path / "x"})
    message = refusal(super_res_sample.main, given)
    assert f"--base_samples: {tmp_path / name} is " in message
    assert "unpack it (" in message
