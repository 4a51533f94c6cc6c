"""sample.py, super_res_sample.py and nll.py run from a checkpoint to files, on tiny networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HELPERS
from helpers.ranks import run_ranks
from helpers.tiny import DIFFUSION, MODEL, flags, pictures, save, save_bare, super_res, unet
from PIL import Image

from fastdiff import nll, ops, sample, super_res_sample
from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import BOUND
from fastdiff.errors import StopWith, UserError
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings
from fastdiff.models import UNet
from fastdiff.models.unet import DTYPES
from fastdiff.runtime.processes import current
from fastdiff.scoring import score

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learn_sigma": {"learn_sigma": True},
    "class_cond": {"class_cond": True, "num_classes": 5},
    "both": {"learn_sigma": True, "class_cond": True, "num_classes": 5},
}
CLASSES = ["ape", "bee", "cat", "dog", "eel"]


def read(folder: Path) -> Arrays:
    """Read images and labels from the only npz of a folder, which holds only a grid and the manifest besides."""
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) <= 3, f"left behind: {names}"
    assert all(re.fullmatch(r"job\.json|samples_\d+x\d+x\d+x\d+\.(npz|png)", name) for name in names), names
    with np.load(next(folder.glob("*.npz")), allow_pickle=False) as content:
        arrays = dict(content)
    np.testing.assert_array_equal(arrays.pop("index"), np.arange(len(arrays["arr_0"])))
    assert arrays.pop("seed").shape == ()
    return arrays


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Arrays]:
    """A function that runs sample.py, or another script, and returns its arrays."""
    count = 0

    def run(model_path: Path, main: Callable[[list[str]], None] = sample.main, **settings: Any) -> Arrays:
        nonlocal count
        count += 1
        folder = tmp_path / f"out{count}"
        given = {"model_path": model_path, "out_dir": folder, "grid_images": 0, "batch_size": 7, **settings}
        if main is sample.main:
            given.setdefault("num_samples", 7)
        main(flags(given))
        return read(folder)

    return run


def assert_same_images(got: np.ndarray, want: np.ndarray) -> None:
    """Assert equality but for one level of 255 in at most 1% of the pixels.

    The order of a convolution's sums may depend on the batch, which changes its float32 results by about 1e-6. That
    shows only where a value lies that close to the border of two levels.
    """
    assert got.shape == want.shape
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# --- what is written ---


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(unet(class_cond=True, num_classes=5), tmp_path / "model000001.pt")
    out = tmp_path / "deep" / "out"
    sample.main(flags({"model_path": checkpoint, "num_samples": 7, "batch_size": 3, "out_dir": out}))
    assert sorted(path.name for path in out.iterdir()) == ["job.json", "samples_7x8x8x3.npz", "samples_7x8x8x3.png"]
    arrays = read(out)
    assert set(arrays) == {"arr_0", "arr_1"}
    assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (7, 8, 8, 3))
    assert (arrays["arr_1"].dtype, arrays["arr_1"].shape) == (np.int64, (7,))
    assert len({image.tobytes() for image in arrays["arr_0"]}) == 7
    assert 5 < arrays["arr_0"].std() < 127
    with Image.open(out / "samples_7x8x8x3.png") as grid:  # 3 x 3 places of 8 pixels with gaps of 2, enlarged
        side = 3 * (8 + 2) + 2
        assert grid.size == (side * (768 // side),) * 2
        small = np.asarray(grid.resize((side, side), Image.Resampling.NEAREST))
    order = np.argsort(arrays["arr_1"], kind="stable")
    for place, index in enumerate(order):
        top, left = 2 + place // 3 * 10, 2 + place % 3 * 10
        np.testing.assert_array_equal(small[top : top + 8, left : left + 8], arrays["arr_0"][index])
    shown = capsys.readouterr()
    assert str(out / "samples_7x8x8x3.npz") in shown.out
    assert shown.err == ""


def test_without_classes_and_without_a_grid(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    checkpoint = save(unet(), tmp_path / "model000001.pt")
    assert set(run(checkpoint)) == {"arr_0"}
    assert sorted(path.name for path in (tmp_path / "out1").iterdir()) == ["job.json", "samples_7x8x8x3.npz"]


def test_grid_of_some(tmp_path: Path) -> None:
    """The grid has a row for each of the chosen classes."""
    checkpoint = save(unet(class_cond=True, num_classes=5), tmp_path / "model000001.pt", CLASSES)
    out = tmp_path / "out"
    given = {"model_path": checkpoint, "num_samples": 10, "grid_images": 8, "classes": "cat,0", "out_dir": out}
    sample.main(flags(given))
    with Image.open(out / "samples_10x8x8x3.png") as grid:
        assert grid.width * (2 * 10 + 2) == grid.height * (4 * 10 + 2)


def test_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go to --out_dir, else to OPENAI_LOGDIR, else to a new folder in runs/samples."""
    monkeypatch.chdir(tmp_path)
    words = flags({"model_path": save(unet(), tmp_path / "model000001.pt"), "num_samples": 1, "grid_images": 0})
    for seed in (0, 1, 0):
        sample.main([*words, "--seed", str(seed)])
    found = list((tmp_path / "runs" / "samples").glob("model000001-*/samples_1x8x8x3.npz"))
    assert len(found) == 2
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logdir"))
    sample.main(words)
    assert (tmp_path / "logdir" / "samples_1x8x8x3.npz").is_file()
    sample.main([*words, "--out_dir", "named"])
    assert (tmp_path / "named" / "samples_1x8x8x3.npz").is_file()


def test_gray_and_not_square(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    gray = save(unet(in_channels=1, image_size="8x12"), tmp_path / "model000001.pt")
    assert run(gray, grid_images=7)["arr_0"].shape == (7, 8, 12, 1)
    with Image.open(tmp_path / "out1" / "samples_7x8x12x1.png") as grid:
        assert grid.mode == "L"
    rgba = save(unet(in_channels=4), tmp_path / "model000002.pt")
    assert run(rgba, grid_images=7)["arr_0"].shape == (7, 8, 8, 4)


# --- image i depends on the seed and i alone ---


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        *[({}, name) for name in MODELS],
        *[({"use_ddim": True}, name) for name in ("plain", "both")],
        ({"use_ddim": True, "eta": 0.5}, "both"),
    ],
    ids=str,
)
def test_batch_size(sampler: dict[str, Any], name: str, tmp_path: Path, run: Callable[..., Arrays]) -> None:
    # A random network that predicts noise would drive DDIM to black and white; one that predicts x_0 draws grays.
    checkpoint = save(unet(**MODELS[name]), tmp_path / "model000001.pt", predict_xstart=bool(sampler))
    whole = run(checkpoint, **sampler, batch_size=7)
    assert ((whole["arr_0"] > 0) & (whole["arr_0"] < 255)).mean() > 0.4
    for batch_size in (1, 3):
        parts = run(checkpoint, **sampler, batch_size=batch_size)
        assert_same_images(parts["arr_0"], whole["arr_0"])
        assert set(parts) == set(whole)
        if "arr_1" in whole:
            np.testing.assert_array_equal(parts["arr_1"], whole["arr_1"])
    fewer = run(checkpoint, **sampler, num_samples=4)
    assert_same_images(fewer["arr_0"], whole["arr_0"][:4])


def test_seed(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    checkpoint = save(unet(**MODELS["class_cond"]), tmp_path / "model000001.pt")
    first, again, other = (run(checkpoint, seed=seed, num_samples=40, batch_size=40) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["arr_0"], again["arr_0"])
    np.testing.assert_array_equal(first["arr_1"], again["arr_1"])
    assert (first["arr_0"] != other["arr_0"]).mean() > 0.5
    assert (first["arr_1"] != other["arr_1"]).any()
    assert set(first["arr_1"]) == set(range(5))  # 40 draws miss one of 5 classes with probability 5 * 0.8^40 = 7e-4


def test_eta(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """A larger eta adds more noise."""
    checkpoint = save(unet(), tmp_path / "model000001.pt")
    images = {eta: run(checkpoint, use_ddim=True, eta=eta)["arr_0"].astype(int) for eta in (0.0, 0.1, 1.0)}
    near, far = (np.abs(images[eta] - images[0.0]).mean() for eta in (0.1, 1.0))
    assert 0 < near < far


# --- classes ---


def test_chosen_classes(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    checkpoint = save(unet(**MODELS["class_cond"]), tmp_path / "model000001.pt", CLASSES)
    named = run(checkpoint, classes="dog, bee")
    np.testing.assert_array_equal(named["arr_1"], [3, 1, 3, 1, 3, 1, 3])
    numbered = run(checkpoint, classes="3,1", batch_size=2)
    np.testing.assert_array_equal(numbered["arr_1"], named["arr_1"])
    assert_same_images(numbered["arr_0"], named["arr_0"])
    other = run(checkpoint, classes="0")
    np.testing.assert_array_equal(other["arr_1"], [0] * 7)
    assert (other["arr_0"] != named["arr_0"]).any()  # the network gets the class


def test_random_classes_are_those_of_the_training(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """A network for 100 classes that was trained on three draws only those."""
    checkpoint = save(unet(class_cond=True, num_classes=100), tmp_path / "model000001.pt", CLASSES[:3])
    assert set(run(checkpoint, num_samples=30, batch_size=30)["arr_1"]) == {0, 1, 2}


# --- checkpoints ---


def test_bare_checkpoint_with_flags(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """A bare checkpoint needs flags only for settings that its shapes don't show."""
    model = unet(**MODELS["both"])
    known = run(save(model, tmp_path / "model000001.pt"))
    bare = save_bare(model, tmp_path / "model000002.pt")
    unseen = {"image_size": MODEL["image_size"], **DIFFUSION}
    np.testing.assert_array_equal(run(bare, **unseen)["arr_0"], known["arr_0"])
    every = {**MODEL, **MODELS["both"], **DIFFUSION}
    np.testing.assert_array_equal(run(bare, **every)["arr_0"], known["arr_0"])


def test_run_folder(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """Any folder of a run stands for its newest EMA of the highest rate."""
    models = {seed: unet() for seed in range(5)}
    for seed, model in models.items():
        torch.manual_seed(seed)
        with torch.no_grad():
            model.out[2].bias.normal_()
    steps = tmp_path / "run" / "checkpoints"
    save(models[0], steps / "step_000009" / "model000009.pt")
    save(models[1], steps / "step_000009" / "ema_0.9999_000009.pt")
    save(models[2], steps / "step_000010" / "model000010.pt")
    save(models[3], steps / "step_000010" / "ema_0.9_000010.pt")
    newest = save(models[4], steps / "step_000010" / "ema_0.999_000010.pt")
    save(models[0], steps / ".step_000011.partial" / "ema_0.9999_000011.pt")  # a save that was cut off
    (steps / "step_000010" / "opt000010.pt").write_bytes(b"")
    want = run(newest)["arr_0"]
    for place in (tmp_path / "run", steps, steps / "step_000010"):
        np.testing.assert_array_equal(run(place)["arr_0"], want)
    assert (run(steps / "step_000009")["arr_0"] != want).any()


def test_bf16(tmp_path: Path, run: Callable[..., Arrays], monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is close to fp32, but not equal: only the body has 8 bits of mantissa, x_t and the sampler have fp32."""
    monkeypatch.setattr("fastdiff.config.checkpoint.body_dtype", lambda precision, device: DTYPES[precision])
    checkpoint = save(unet(), tmp_path / "model000001.pt")
    full, half = (run(checkpoint, precision=p, use_ddim=True)["arr_0"].astype(int) for p in ("fp32", "bf16"))
    difference = np.abs(full - half)
    assert 0 < difference.mean() < 8


def test_sampling_steps(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """A respacing on the command line overrides the checkpoint's."""
    checkpoint = save(unet(), tmp_path / "model000001.pt", diffusion_steps=100)
    few = run(checkpoint, timestep_respacing="ddim4", use_ddim=True, num_samples=2)
    other = run(checkpoint, timestep_respacing="5", use_ddim=True, num_samples=2)
    assert (few["arr_0"] != other["arr_0"]).any()


# --- super-resolution ---


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An npz of five small images in three classes, as sample.py writes it."""
    images = pictures(tmp_path / "small", ["cat_0", "cat_1", "dog_2", "eel_3", "eel_4"])
    np.savez(tmp_path / "small.npz", images, np.array([0, 0, 1, 2, 2]))
    return tmp_path / "small.npz"


@pytest.mark.parametrize("sizes", [(8, 16), (8, 32)], ids=str)
@pytest.mark.parametrize("use_ddim", [False, True], ids=["ddpm", "ddim"])
def test_super_resolution(sizes: tuple[int, int], use_ddim: bool, small: Path, run: Callable[..., Arrays]) -> None:
    """The images of an npz, or the same images as files, are each enlarged once, in their order."""
    given = {"small_size": sizes[0], "large_size": sizes[1]}
    checkpoint = save(super_res(**given), small.parent / "model000001.pt")
    job = {"main": super_res_sample.main, "use_ddim": use_ddim}
    whole = run(checkpoint, **job, base_samples=small)
    assert set(whole) == {"arr_0"}
    assert whole["arr_0"].shape == (5, sizes[1], sizes[1], 3)
    assert_same_images(run(checkpoint, **job, base_samples=small, batch_size=2)["arr_0"], whole["arr_0"])
    assert_same_images(run(checkpoint, **job, base_samples=small.with_suffix(""))["arr_0"], whole["arr_0"])
    more = run(checkpoint, **job, base_samples=small, num_samples=6)["arr_0"]
    assert_same_images(more[:5], whole["arr_0"])
    assert (more[5] != more[0]).any()  # the first small image once more, with other noise
    assert_same_images(run(checkpoint, **job, base_samples=small, num_samples=2)["arr_0"], whole["arr_0"][:2])


def test_super_resolution_from_printed_settings(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--print_config does not fix the number of images: there is still one for each small image."""
    given = {"model_path": save(super_res(), small.parent / "model000001.pt"), "base_samples": small}
    words = flags({**given, "out_dir": small.parent / "out"})
    with pytest.raises(SystemExit):
        super_res_sample.main([*words, "--print_config"])
    printed = small.parent / "printed.json"
    printed.write_text(capsys.readouterr().out)
    super_res_sample.main(["--config", str(printed)])
    assert read(small.parent / "out")["arr_0"].shape == (5, 16, 16, 3)


def test_super_resolution_sees_the_small_image(small: Path, run: Callable[..., Arrays]) -> None:
    checkpoint = save(super_res(), small.parent / "model000001.pt")
    before = run(checkpoint, super_res_sample.main, base_samples=small)["arr_0"]
    with np.load(small) as content:
        images = content["arr_0"].copy()
    images[1] = 255 - images[1]
    np.savez(small, images)
    after = run(checkpoint, super_res_sample.main, base_samples=small)["arr_0"]
    assert (before[1] != after[1]).any()
    np.testing.assert_array_equal(before[[0, 2, 3, 4]], after[[0, 2, 3, 4]])


def test_super_resolution_keeps_labels(small: Path, run: Callable[..., Arrays]) -> None:
    model = super_res(class_cond=True, num_classes=3)
    checkpoint = save(model, small.parent / "model000001.pt", CLASSES[2:])
    whole = run(checkpoint, super_res_sample.main, base_samples=small)
    np.testing.assert_array_equal(whole["arr_1"], [0, 0, 1, 2, 2])
    files = run(checkpoint, super_res_sample.main, base_samples=small.with_suffix(""))
    np.testing.assert_array_equal(files["arr_1"], whole["arr_1"])
    assert_same_images(files["arr_0"], whole["arr_0"])


# --- bits per dimension ---


def save_for_nll(folder: Path) -> tuple[UNet, Path, Path]:
    model = unet(learn_sigma=True, class_cond=True, num_classes=3)
    images = folder / "images"
    pictures(images, ["cat_0", "cat_1", "dog_2", "dog_3", "eel_4", "eel_5", "eel_6"])
    return model, save(model, folder / "model000001.pt", CLASSES[2:]), images


def direct(model: UNet, images: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Compute the bound by one call over all images."""
    files = sorted(images.iterdir())
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    x_start = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([CLASSES[2:].index(file.name.split("_")[0]) for file in files])
    index = torch.arange(len(files))
    diffusion = create_diffusion(DiffusionSettings(**DIFFUSION), model.settings.learn_sigma)
    noise = lambda t: ops.image_noise(seed | BOUND, index, t, (3, 8, 8))
    return diffusion.calc_bpd_loop(model, x_start, True, {"y": labels}, noise)


def terms_in(folder: Path) -> Arrays:
    assert sorted(path.name for path in folder.iterdir()) == [
        "mse_terms.npz",
        "vb_terms.npz",
        "xstart_mse_terms.npz",
    ]
    found = {}
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(folder / f"{name}_terms.npz") as content:
            assert set(content) == {"arr_0"}
            found[name] = content["arr_0"]
    return found


def assert_same_terms(got: Arrays, want: Arrays) -> None:
    """Assert equality to 1e-5: sums in another order differ by 6e-8 of each term in float32."""
    for name, values in want.items():
        assert got[name].shape == (DIFFUSION["diffusion_steps"],)
        np.testing.assert_allclose(got[name], values, rtol=1e-5, err_msg=name)


def test_nll(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, checkpoint, images = save_for_nll(tmp_path)
    exact = direct(model, images)
    want = {name: exact[name].double().mean(0).numpy() for name in ("vb", "mse", "xstart_mse")}
    total = exact["total_bpd"].double().mean().item()
    for batch_size in (1, 3, 7):
        out = tmp_path / f"out{batch_size}"
        given = {"model_path": checkpoint, "data_dir": images, "batch_size": batch_size, "loader": "pillow"}
        nll.main(flags({**given, "out_dir": out}))
        terms = terms_in(out)
        assert_same_terms(terms, want)
        prior = exact["prior_bpd"].double().mean().item()
        assert terms["vb"].sum() + prior == pytest.approx(total, rel=1e-5)
        shown = re.search(r"^7 images: ([0-9.]+) bits/dim \(standard error ([0-9.]+)\)$", capsys.readouterr().out, re.M)
        assert shown
        assert float(shown[1]) == pytest.approx(total, abs=6e-5)
        error = exact["total_bpd"].double().std() / 7**0.5
        assert float(shown[2]) == pytest.approx(error.item(), abs=6e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_nll_of_every_image(batch_size: int, tmp_path: Path) -> None:
    model, _, images = save_for_nll(tmp_path)
    settings = DataSettings(data_dir=str(images), loader="pillow")
    exact = direct(model, images, seed=5)["total_bpd"]
    diffusion = create_diffusion(DiffusionSettings(**DIFFUSION), True)
    with open_images(settings, size_hw=(8, 8), channels=3, batch_size=batch_size, class_cond=True, limit=5) as loader:
        totals, _ = score(
            *(model, diffusion, loader, current()),
            class_cond=True,
            clip_denoised=True,
            seed=5,
            say=lambda text: None,
        )
    np.testing.assert_allclose(totals, exact[:5], rtol=1e-5)


def test_an_interrupted_nll_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is scored is kept, and the results are those of an undisturbed run, bit for bit."""
    _, checkpoint, images = save_for_nll(tmp_path)
    given = {"model_path": checkpoint, "data_dir": images, "batch_size": 2, "loader": "pillow", "out_dir": "out"}
    monkeypatch.chdir(tmp_path)
    nll.main(flags({**given, "out_dir": "straight"}))
    straight = capsys.readouterr().out.splitlines()
    calculate = GaussianDiffusion.calc_bpd_loop
    for interrupted, kept in ((1, 0), (3, 4), (2, 6)):  # the batch, counted from where the run goes on
        calls = []

        def interrupt(*args: Any, at: int = interrupted, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return calculate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(GaussianDiffusion, "calc_bpd_loop", interrupt)
            with pytest.raises(StopWith, match="stopped by Ctrl-C") as stop:
                nll.main(flags(given))
        assert stop.value.code == 130
        goes_on = f"{kept} of 7 images are scored, and the same command goes on"
        assert (goes_on if kept else "the same command starts again") in str(stop.value)
    left = (tmp_path / "out" / ".scored_0_of_1.npz").read_bytes()
    nll.main(flags(given))
    out = capsys.readouterr().out
    assert "6 of 7 images were scored before" in out
    assert straight[-2] in out
    for name, values in terms_in(tmp_path / "straight").items():
        np.testing.assert_array_equal(terms_in(tmp_path / "out")[name], values)
    kept_file = tmp_path / "out" / ".scored_0_of_1.npz"
    labels = {path.name: "cat" for path in images.iterdir()}
    for changes, content, goes_on in [
        ({}, left, True),
        ({"seed": 4}, left, False),
        ({}, left[:-9], False),
        ({}, b"PK", False),
        ({"labels": "auto"}, left, False),  # by now dataset.json says other classes
    ]:
        if "labels" in changes:
            (images / "dataset.json").write_text(json.dumps({"labels": labels}))
        kept_file.write_bytes(content)
        nll.main(flags({**given, **changes}))
        assert ("were scored before" in capsys.readouterr().out) == goes_on, changes
        terms_in(tmp_path / "out")  # asserts that nothing else is left


@pytest.mark.parametrize(
    ("flags_given", "says"),
    [
        (
            ["--timestep_respacing", "ddim3"],
            "ddpm: 3 evaluations of the network per image (timestep_respacing ddim3",
        ),
        (["--timestep_respacing", "ddim3", "--solver", "dpmpp_2m"], "dpmpp_2m draws with them: solver ddim is DDIM)"),
        (["--timestep_respacing", "ddim3", "--use_ddim", "True"], "ddim: 3 evaluations of the network per image\n"),
        (["--timestep_respacing", "3"], "ddpm: 3 evaluations of the network per image\n"),
    ],
)
def test_a_respacing_named_after_ddim(
    flags_given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps the same steps for every solver, and a line says so where the solver isn't DDIM."""
    checkpoint = save(unet(), tmp_path / "model000001.pt")
    sample.main([*flags({"model_path": checkpoint, "num_samples": 1, "out_dir": tmp_path / "out"}), *flags_given])
    assert says in capsys.readouterr().out


# --- several processes ---


def test_two_processes(tmp_path: Path, run: Callable[..., Arrays]) -> None:
    """One launch of two processes runs four jobs; each gives what one process gives."""
    both = save(unet(**MODELS["both"]), tmp_path / "model000001.pt", CLASSES)
    enlarger = save(super_res(class_cond=True, num_classes=3), tmp_path / "model000002.pt")
    _, scored, images = save_for_nll(tmp_path / "nll")
    base = tmp_path / "base.npz"
    np.savez(base, pictures(tmp_path / "small", ["a", "b", "c"]), np.array([2, 0, 1]))
    jobs: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "ddpm": ("sample", sample.main, {"model_path": both, "num_samples": 7, "batch_size": 2}),
        "ddim": ("sample", sample.main, {"model_path": both, "num_samples": 1, "use_ddim": True, "eta": 0.5}),
        "large": ("super_res_sample", super_res_sample.main, {"model_path": enlarger, "base_samples": base}),
        "nll": ("nll", nll.main, {"model_path": scored, "data_dir": images, "batch_size": 2, "loader": "pillow"}),
    }
    commands = [
        (script, flags({**given, "out_dir": tmp_path / "two" / name})) for name, (script, _, given) in jobs.items()
    ]
    out = run_ranks([str(HELPERS / "run_scripts.py"), json.dumps(commands)])
    made = [line for line in out.splitlines() if "samples_7x8x8x3.npz" in line and "already" not in line]
    assert len(made) == 1  # by one rank; one that starts later reports that all is done already
    for name, (_, main, given) in jobs.items():
        main(flags({**given, "out_dir": tmp_path / "one" / name}))
        if name == "nll":
            assert_same_terms(terms_in(tmp_path / "two" / name), terms_in(tmp_path / "one" / name))
            continue
        one, two = read(tmp_path / "one" / name), read(tmp_path / "two" / name)
        assert_same_images(two["arr_0"], one["arr_0"])
        np.testing.assert_array_equal(two["arr_1"], one["arr_1"])
    found = re.findall(r"^7 images: ([0-9.]+) bits/dim", out, re.MULTILINE)
    assert len(found) == 1


def test_unreadable_images_of_scoring_are_all_listed(tmp_path: Path) -> None:
    pictures(tmp_path / "data", [f"a_{i}" for i in range(9)])
    for i in (1, 4, 8):
        (tmp_path / "data" / f"a_{i}.png").write_bytes(b"no picture")
    given = {"data_dir": tmp_path / "data", "out_dir": tmp_path / "out", "num_samples": 6, "loader": "pillow"}
    with pytest.raises(UserError, match="--data_dir: 3 of 9 images can't be read"):
        nll.main(flags({"model_path": save(unet(), tmp_path / "model000001.pt"), **given}))
    listed = (tmp_path / "out" / "unreadable_images.txt").read_text().splitlines()
    assert listed == [str(tmp_path / "data" / f"a_{i}.png") for i in (1, 4, 8)]


def test_unreadable_small_images_are_all_listed(tmp_path: Path) -> None:
    pictures(tmp_path / "small", ["a", "b", "c", "d"])
    for name in "bd":
        (tmp_path / "small" / f"{name}.png").write_bytes(b"")
    given = {"base_samples": tmp_path / "small", "out_dir": tmp_path / "out"}
    with pytest.raises(UserError, match="--base_samples: 2 of 4 images can't be read.*b.png.*d.png.*rm <"):
        super_res_sample.main(flags({"model_path": save(super_res(), tmp_path / "model000001.pt"), **given}))
    listed = (tmp_path / "out" / "unreadable_images.txt").read_text().splitlines()
    assert listed == [str(tmp_path / "small" / f"{name}.png") for name in "bd"]
