"""`fastdiff.load` opens a model in one line and draws the same images as the scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import flags, save, super_res, unet
from PIL import Image

import fastdiff
from fastdiff import api, sample
from fastdiff.diffusion import create_diffusion
from fastdiff.diffusion.samplers import ddim_reverse_loop
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.errors import UserError
from fastdiff.ops import start_map

CLASSES = ["ape", "bee", "cat"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = unet(class_cond=True, num_classes=3, null_class=True)
    return save(model, tmp_path / "model.pt", CLASSES, predict_xstart=True)


def test_the_same_images_as_the_script(checkpoint: Path, tmp_path: Path) -> None:
    given = {"solver": "dpmpp_2m", "steps": 4, "seed": 2, "guidance": 2.0}
    sample.main(flags({"model_path": checkpoint, "num_samples": 6, "classes": "cat,0", "out_dir": tmp_path, **given}))
    with np.load(tmp_path / "samples_6x8x8x3.npz") as content:
        script = dict(content)
    model = fastdiff.load(checkpoint, precision="fp32")  # the script's default; load chooses bf16 on a GPU
    assert model.class_names == CLASSES
    samples = model.sample(6, classes=["cat", 0], **given)
    np.testing.assert_array_equal(samples.labels, script["arr_1"])
    assert np.abs(samples.images.astype(int) - script["arr_0"]).max() <= 1
    later = model.sample(2, classes="cat,0", start=4, **given)
    assert np.abs(later.images.astype(int) - samples.images[4:]).max() <= 1
    np.testing.assert_array_equal(later.index, [4, 5])


def test_paths_are_expanded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    monkeypatch.chdir(tmp_path)
    samples = fastdiff.load("~/model.pt").sample(2, steps=2)
    samples.save("$HOME/a.npz")
    samples.save(Path("~/a.png"))
    with pytest.raises(UserError, match=r"^save: a\.jpg must end in \.npz or \.png$"):
        samples.save("~/a.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "a.npz", "a.png"}
    with pytest.raises(UserError, match=r"^load: \$FD_NONE: the environment variable FD_NONE is not set"):
        fastdiff.load("$FD_NONE")


@pytest.mark.parametrize("n", [0, -1, 2.5, 2.0, True, "3", None, np.float64(2), np.bool_(True), [2], 2**70])
def test_numbers_of_images_that_are_none(n: Any, checkpoint: Path) -> None:
    with pytest.raises(UserError) as caught:
        fastdiff.load(checkpoint).sample(n, steps=2)
    assert str(caught.value).startswith("sample: n must be a whole number of at least 1, not ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"start": -1}, "start must be a whole number of at least 0, not -1"),
        ({"start": 0.5}, "start must be a whole number of at least 0, not 0.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, not True"),
        ({"seed": 2**32}, "seed: must be less than 4294967296, not 4294967296"),
        ({"steps": -3}, "steps must be a whole number of at least 0, not -3"),
        ({"steps": "many"}, "steps must be a whole number of at least 0, not 'many'"),
        ({"steps": 7}, "steps 7"),
        ({"guide": 3, "guidance": 2}, "guide must be a model that load has returned, not 3"),
        ({"foo": 1}, "foo is not a setting here; those are batch_size, classes, "),
        ({"out_dir": "x"}, "out_dir is not a setting here"),
    ],
)
def test_settings_that_are_none(given: dict[str, Any], sentence: str, checkpoint: Path) -> None:
    with pytest.raises(UserError) as caught:
        fastdiff.load(checkpoint).sample(2, **{"steps": 2, **given})
    assert str(caught.value).startswith(f"sample: {sentence}")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "mps"}, "device must be "),
        ({"device": 99}, "device must be "),
        ({"device": "cuda:99"}, "device must be "),
        ({"device": "no such"}, "device must be "),
        ({"precision": "bf17"}, "precision: must be 'fp32', 'bf16' or 'fp16', not 'bf17'"),
        ({"precision": "fp16", "device": "cpu"}, "precision fp16 needs a GPU"),
        ({"kernels": "cuda"}, "kernels: must be "),
        ({"compile": "maybe"}, "compile: must be auto, True or False, not 'maybe'"),
        ({"allow_tf32": "perhaps"}, "allow_tf32: must be True or False"),
        ({"preset": "nonsense"}, "preset: nonsense is not a preset"),
    ],
)
def test_loading_that_is_refused(given: dict[str, Any], sentence: str, checkpoint: Path) -> None:
    with pytest.raises(UserError) as caught:
        fastdiff.load(checkpoint, **given)
    assert str(caught.value).startswith(f"load: {sentence}")


def test_numpys_numbers(checkpoint: Path) -> None:
    model = fastdiff.load(checkpoint)
    given = {"steps": 3, "seed": 5, "start": 1, "batch_size": 2, "eta": 0.5, "solver": "ddim"}
    want = model.sample(3, **given)
    of_numpy = {name: np.array(value)[()] if name != "solver" else value for name, value in given.items()}
    got = model.sample(np.uint8(3), **of_numpy)
    np.testing.assert_array_equal(got.images, want.images)
    np.testing.assert_array_equal(got.index, [1, 2, 3])
    assert got.seed == 5


def test_lists_are_no_images(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"^encode: images are int64 \(1,\), the model takes uint8 \(n, \d+, \d+, 3\)$"):
        fastdiff.load(checkpoint).encode([1], [0])


def test_saving(checkpoint: Path, tmp_path: Path) -> None:
    samples = fastdiff.load(checkpoint).sample(4, steps=2)
    samples.save(tmp_path / "a.npz")
    samples.save(tmp_path / "a.png")
    with np.load(tmp_path / "a.npz") as content:
        np.testing.assert_array_equal(content["arr_0"], samples.images)
        assert set(content) == {"arr_0", "arr_1", "class_names", "seed", "index"}
        assert content["class_names"].tolist() == CLASSES
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == samples.grid().size


def test_whole_numbers_are_labels_and_texts_are_names(tmp_path: Path) -> None:
    """Also where the names are numbers, of which "2" is class 1 here."""
    names = ["1", "2", "3", "10"]
    model = fastdiff.load(save(unet(class_cond=True, num_classes=4), tmp_path / "model.pt", names))
    numbers = np.array([2, 0, 3])
    for classes in ([2, 0, 3], (2, 0, 3), numbers, numbers.astype(np.uint8), torch.tensor(numbers), range(2, 3)):
        want = numbers if len(classes) == 3 else [2, 2, 2]
        np.testing.assert_array_equal(model.sample(3, classes=classes, steps=2).labels, want)
    for named in (["3", "1", "10"], "3,1,10", ["3", 0, "10"], np.array(["3", "1", "10"])):
        np.testing.assert_array_equal(model.sample(3, classes=named, steps=2).labels, numbers)
    assert model.sample(2, classes=1, steps=2).labels.tolist() == model.sample(2, classes="2", steps=2).labels.tolist()
    samples = model.sample(3, classes=np.int64(3), steps=2)
    assert samples.labels.tolist() == [3, 3, 3]
    assert samples.class_names == tuple(names)
    again = model.sample(3, classes=samples.labels, steps=2)
    np.testing.assert_array_equal(again.images, samples.images)
    for every in ([], None, ""):
        assert set(model.sample(9, classes=every, steps=2).labels) <= {0, 1, 2, 3}
    for wrong in ([4], -1, [0.5], 1.0, True, [None], np.array([0.0]), {"1": 2}, ["4"]):
        with pytest.raises(UserError, match="^sample: classes: "):
            model.sample(1, classes=wrong)


def test_labels_of_images_may_be_names(checkpoint: Path) -> None:
    model = fastdiff.load(checkpoint, device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    want = model.encode(images, np.array([2, 0, 1]), steps=2)
    for labels in ([2, 0, 1], ["cat", "ape", "bee"], torch.tensor([2, 0, 1])):
        torch.testing.assert_close(model.encode(images, labels, steps=2), want)
    for wrong in (["cat", "ape", "cow"], [2, 0], "cat", [0.0, 1.0, 2.0]):
        with pytest.raises(UserError, match="^encode: "):
            model.encode(images, wrong, steps=2)


def test_a_sampler_is_kept_for_the_same_settings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    build = api.Sampler
    monkeypatch.setattr(api, "Sampler", lambda *given, **named: made.append(named["count"]) or build(*given, **named))
    model = fastdiff.load(checkpoint)
    first, again = (model.sample(3, steps=2) for _ in range(2))
    np.testing.assert_array_equal(first.images, again.images)
    assert made == [3]
    model.sample(3, steps=3)
    assert made == [3, 3]


def test_autoguidance(checkpoint: Path) -> None:
    model = fastdiff.load(checkpoint)
    plain = model.sample(3, steps=3)
    guided = model.sample(3, steps=3, guidance=2.0, guide=fastdiff.load(checkpoint))
    assert np.abs(guided.images.astype(int) - plain.images).max() <= 1  # the model is its own guide


def test_enlarging(tmp_path: Path) -> None:
    model = fastdiff.load(save(super_res(), tmp_path / "large.pt", predict_xstart=True))
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    large = model.enlarge(small, steps=3)
    assert large.images.shape == (3, 16, 16, 3)
    other = model.enlarge(255 - small, steps=3)
    assert (other.images != large.images).any()
    with pytest.raises(UserError, match="the model takes uint8"):
        model.enlarge(small[:, :4])
    with pytest.raises(UserError, match="call enlarge"):
        model.sample(1)


def test_encoding_is_the_reverse_flow(checkpoint: Path) -> None:
    model = fastdiff.load(checkpoint, device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    labels = np.array([2, 0])
    noise = model.encode(images, labels, steps=4)
    process = create_diffusion(model.network.diffusion, False, keep_steps(model.network.diffusion, 4, "uniform", 1e9))
    y = {"y": torch.from_numpy(labels)}
    with torch.no_grad():
        for step in ddim_reverse_loop(process, model.network.model, start_map(torch.from_numpy(images)), True, y):
            want = step.sample
    torch.testing.assert_close(noise, want)
    assert (noise - start_map(torch.from_numpy(images))).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "euler"}, ["solver", "dpmpp_2m"]),
        ({"steps": 99}, ["steps 99", "6"]),
        ({"guidance": -1}, ["guidance"]),
        ({"colour": 1}, ["colour"]),
        ({"out_dir": "x"}, ["out_dir", "guidance"]),
        ({"sr_model_path": "x"}, ["sr_model_path"]),
        ({"classes": "cow"}, ["classes: cow"]),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, object], words: list[str], checkpoint: Path) -> None:
    model = fastdiff.load(checkpoint)
    with pytest.raises(UserError) as caught:
        model.sample(2, **settings)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(UserError, match="guide needs"):
        model.sample(2, guide=model)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for labels, steps in ((None, 4), (np.array([0]), 4), (np.array([0, 9]), 4), (np.array([0, 1]), 99)):
        with pytest.raises(UserError, match="^encode: "):
            model.encode(images, labels, steps=steps)
    with pytest.raises(UserError, match="the model takes uint8"):
        model.encode(images[:, :4], np.array([0, 1]))
    with pytest.raises(UserError, match="does not exist"):
        fastdiff.load("no/such/file.pt")


def test_unknown_keywords_of_load_and_encode(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="^load: dtype is not a setting here; did you mean precision"):
        fastdiff.load(checkpoint, dtype="fp16")
    with pytest.raises(UserError, match="^load: colour is not a setting here; those are allow_tf32, compile"):
        fastdiff.load(checkpoint, colour=1)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="^encode: num_inference_steps is not a setting here; those are steps"):
        fastdiff.load(checkpoint).encode(images, [0], num_inference_steps=4)


def test_importing_is_cheap() -> None:
    """`import fastdiff` alone does not import torch."""
    code = "import fastdiff, sys; assert 'torch' not in sys.modules; assert not hasattr(fastdiff, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)
