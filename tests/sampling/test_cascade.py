"""Guidance, cascades and classes work through the scripts, which refuse invalid settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import flags, nothing_written, refusal, save, save_bare, super_res, unet

from fastdiff import sample, super_res_sample

CLASSES = ["ape", "bee", "cat"]
CLASS_COND: dict[str, Any] = {"class_cond": True, "num_classes": 3}


def run(out: Path, main: Any = sample.main, **settings: Any) -> dict[str, np.ndarray]:
    main(flags({"out_dir": out, "num_samples": 5, "batch_size": 3, "grid_images": 0, **settings}))
    with np.load(next(out.glob("samples_*.npz"))) as content:
        return dict(content)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    # A network that predicts x_0 draws grays; one that predicts noise, untrained, black and white.
    return save(unet(null_class=True, **CLASS_COND), tmp_path / "base.pt", CLASSES, predict_xstart=True)


@pytest.fixture
def enlarger(tmp_path: Path) -> Path:
    return save(super_res(**CLASS_COND), tmp_path / "large.pt", CLASSES, predict_xstart=True)


# --- cascade ---


@pytest.mark.parametrize("sr_batch_size", [1, 2, "auto"])
def test_cascade_is_one_job_after_another(
    sr_batch_size: Any, base: Path, enlarger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"solver": "ddim", "seed": 3}
    small = run(tmp_path / "small", model_path=base, **given)
    want = run(
        tmp_path / "large",
        super_res_sample.main,
        model_path=enlarger,
        base_samples=tmp_path / "small" / "samples_5x8x8x3.npz",
        timestep_respacing=3,
        **given,
    )
    cascade = {"sr_model_path": enlarger, "sr_timestep_respacing": 3, "sr_batch_size": sr_batch_size}
    got = run(tmp_path / "both", model_path=base, **cascade, **given)
    assert got["arr_0"].shape == (5, 16, 16, 3)
    assert np.abs(got["arr_0"].astype(int) - want["arr_0"]).max() <= 1
    np.testing.assert_array_equal(got["arr_1"], small["arr_1"])
    assert got["arr_0"].std() > 5


def test_cascade_finds_classes_by_name(tmp_path: Path, base: Path) -> None:
    """The second network's numbers are others. The labels in the npz are those of the first one."""
    same = super_res(**CLASS_COND)
    given = {"model_path": base, "classes": "0,1,2", "solver": "ddim", "sr_steps": 2}
    want = run(tmp_path / "same", sr_model_path=save(same, tmp_path / "same.pt", CLASSES, predict_xstart=True), **given)
    moved = super_res(class_cond=True, num_classes=4)
    order = ["cat", "eel", "ape", "bee"]
    table = same.label_emb.weight.data
    moved.load_state_dict({**same.state_dict(), "label_emb.weight": table[[2, 0, 0, 1]]})
    path = save(moved, tmp_path / "moved.pt", order, predict_xstart=True)
    got = run(tmp_path / "moved", sr_model_path=path, **given)
    np.testing.assert_array_equal(got["arr_1"], [0, 1, 2, 0, 1])
    assert np.abs(got["arr_0"].astype(int) - want["arr_0"]).max() <= 1
    assert got["class_names"].tolist() == CLASSES
    small = run(tmp_path / "small", model_path=base, classes="0,1,2", solver="ddim")
    assert small["class_names"].tolist() == CLASSES
    from_npz = {"model_path": path, "base_samples": tmp_path / "small", "solver": "ddim", "steps": 2}
    alone = run(tmp_path / "alone", super_res_sample.main, **from_npz)
    np.testing.assert_array_equal(alone["arr_1"], [2, 3, 0, 2, 3])
    assert np.abs(alone["arr_0"].astype(int) - want["arr_0"]).max() <= 1
    unknown = save(moved, tmp_path / "unknown.pt", ["cat", "eel", "ape", "fox"])
    words = ["doesn't know the model's class 'bee'"]
    assert words[0] in refusal(sample.main, flags({**given, "sr_model_path": unknown, "out_dir": tmp_path / "x"}))
    npz = flags({**from_npz, "model_path": unknown, "out_dir": tmp_path / "y"})
    assert "has images of class 'bee', which the model doesn't know" in refusal(super_res_sample.main, npz)


def test_a_guide_of_other_classes_is_refused(base: Path, tmp_path: Path) -> None:
    guide = save(unet(null_class=True, **CLASS_COND), tmp_path / "guide.pt", CLASSES[::-1], predict_xstart=True)
    given = {"model_path": base, "guide_model_path": guide, "guidance": 2, "out_dir": tmp_path / "out"}
    assert "needs the same classes in the same order" in refusal(sample.main, flags(given))


def test_cascade_without_classes(tmp_path: Path) -> None:
    base = save(unet(), tmp_path / "base.pt")
    enlarger = save(super_res(), tmp_path / "large.pt")
    got = run(tmp_path / "out", model_path=base, sr_model_path=enlarger, sr_steps=2, trajectory=2)
    assert "arr_1" not in got
    assert got["arr_0"].shape == (5, 16, 16, 3)
    assert (tmp_path / "out" / "samples_5x16x16x3_steps.gif").is_file()


def test_cascades_that_do_not_fit(base: Path, enlarger: Path, tmp_path: Path) -> None:
    plain = save(unet(), tmp_path / "plain.pt")
    wide = save(unet(image_size=16), tmp_path / "wide.pt")
    gray = save(unet(in_channels=1, **CLASS_COND), tmp_path / "gray.pt", CLASSES)
    other = save(unet(class_cond=True, num_classes=2), tmp_path / "other.pt")
    for model, words in [
        (wide, ["enlarges images of 8x8 pixels", "draws 16x16"]),
        (plain, ["needs classes"]),
        (gray, ["3 channels", "draws 1"]),
        (other, ["knows 3 classes, the model 2"]),
    ]:
        with nothing_written(tmp_path):
            said = refusal(sample.main, flags({"model_path": model, "sr_model_path": enlarger, "out_dir": tmp_path}))
        assert said.startswith("--sr_model_path: ")
        assert all(word in said for word in words), said
    with nothing_written(tmp_path):
        given = {"model_path": base, "out_dir": tmp_path}
        assert "train.py" in refusal(sample.main, flags({**given, "sr_model_path": base}))
        assert "--sr_steps" in refusal(sample.main, flags({**given, "sr_model_path": enlarger, "sr_steps": 99}))
        many = {"sr_model_path": enlarger, "sr_timestep_respacing": 99}
        assert refusal(sample.main, flags({**given, **many})).startswith("--sr_timestep_respacing: ")
        few = {"sr_model_path": enlarger, "sr_timestep_respacing": 2, "solver": "dpmpp_3m"}
        assert refusal(sample.main, flags({**given, **few})).startswith("--solver: ")


# --- guidance ---


def test_guidance_changes_the_images_and_reaches_every_class(base: Path, tmp_path: Path) -> None:
    given = {"model_path": base, "solver": "ddim", "classes": "0,1,2"}
    plain = run(tmp_path / "1", **given)["arr_0"].astype(int)
    some = run(tmp_path / "2", **given, guidance=1.5)["arr_0"].astype(int)
    more = run(tmp_path / "3", **given, guidance=4)["arr_0"].astype(int)
    assert 0 < np.abs(some - plain).mean() < np.abs(more - plain).mean()
    never = run(tmp_path / "4", **given, guidance=4, guidance_interval="0,1e-9")["arr_0"]
    np.testing.assert_array_equal(never, plain)


def test_autoguidance_by_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """A model guided by itself draws the same; a bare file as the guide gets the model's settings."""
    given = {"model_path": base, "solver": "ddim"}
    plain = run(tmp_path / "1", **given)["arr_0"]
    itself = run(tmp_path / "2", **given, guidance=3, guide_model_path=base)["arr_0"]
    assert np.abs(itself.astype(int) - plain).max() <= 1
    weaker = unet(null_class=True, **CLASS_COND)
    for parameter in weaker.parameters():
        parameter.data *= 0.9
    bare = save_bare(weaker, tmp_path / "weaker.pt")
    assert (run(tmp_path / "3", **given, guidance=3, guide_model_path=bare)["arr_0"] != plain).any()


def test_guidance_that_can_not_be(base: Path, tmp_path: Path) -> None:
    out = {"out_dir": tmp_path / "out"}
    no_null = save(unet(**CLASS_COND), tmp_path / "no_null.pt", CLASSES)
    said = refusal(sample.main, flags({**out, "model_path": no_null, "guidance": 2}))
    assert "no null class" in said
    assert "--label_dropout" in said
    plain = save(unet(), tmp_path / "plain.pt", predict_xstart=True)
    said = refusal(sample.main, flags({**out, "model_path": base, "guidance": 2, "guide_model_path": plain}))
    assert said.startswith("--guide_model_path: ")
    assert "class_cond False" in said
    assert not (tmp_path / "out").exists()


# --- solvers and steps ---


def test_steps_and_spacing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, solver in enumerate(("dpmpp_2m", "dpmpp_3m_sde", "unipc", "heun")):
        assert run(tmp_path / str(i), model_path=base, solver=solver, steps=4)["arr_0"].std() > 5
    assert "heun: 7 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "dpmpp"}, ["--solver", "dpmpp_2m"]),
        ({"steps": 4, "spacing": "even"}, ["--spacing", "logsnr"]),
        ({"steps": 7}, ["--steps 7", "6"]),
        ({"steps": 2, "timestep_respacing": 3}, ["--steps 2", "timestep_respacing 3", "one of them"]),
        ({"solver": "heun", "steps": 1}, ["steps 1", "heun", "at least 2"]),
        ({"solver": "dpmpp_3m", "timestep_respacing": 2}, ["--solver", "dpmpp_3m", "at least 3"]),
        ({"classes": "0:1,2"}, ["--classes", "weights"]),
        ({"classes": "0:x"}, ["--classes", "0:x", "weight"]),
        pytest.param(
            {"cuda_graph": True},
            ["--cuda_graph", "GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=str,
)
def test_settings_that_can_not_be(settings: dict[str, Any], words: list[str], base: Path, tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        said = refusal(sample.main, flags({"model_path": base, "out_dir": tmp_path / "out", **settings}))
    assert all(word in said for word in words), said


def test_another_job_in_the_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = run(out, model_path=base, solver="ddim")["arr_0"]
    for other, name in (({"solver": "ddim", "seed": 1}, "seed"), ({}, "solver"), ({"solver": "ddim", "eta": 1}, "eta")):
        with nothing_written(tmp_path):
            said = refusal(sample.main, flags({"model_path": base, "num_samples": 5, "out_dir": out, **other}))
        assert said.startswith("--out_dir: ")
        assert name in said
    after = run(out, model_path=base, solver="ddim", seed=1, overwrite=True)["arr_0"]
    assert (after != before).any()


def test_weighted_and_balanced_classes(base: Path, tmp_path: Path) -> None:
    given = {"model_path": base, "num_samples": 300, "batch_size": 100, "timestep_respacing": 1}
    drawn = run(tmp_path / "1", **given, classes="ape:3,cat:1")["arr_1"]
    assert set(drawn) == {0, 2}
    assert abs((drawn == 0).mean() - 0.75) < 4 * (0.75 * 0.25 / 300) ** 0.5
    balanced = run(tmp_path / "2", **given, classes="balanced")["arr_1"]
    np.testing.assert_array_equal(balanced, np.arange(300) % 3)
