"""convert.py keeps every bit, writes whole files or none, and says what a network is in a model card.

The file has the tests of all formats but diffusers', hence its length.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from helpers.tiny import (
    MODEL,
    classifier,
    flags,
    info_for,
    nothing_written,
    pictures,
    refusal,
    save,
    save_bare,
    super_res,
    unet,
)
from PIL import Image

import fastdiff
from fastdiff import convert, nll, sample, super_res_sample
from fastdiff.config.checkpoint import Checkpoint, open_checkpoint
from fastdiff.config.sections import Config
from fastdiff.conversion.originals import command_of, notes_on
from fastdiff.diffusion import DiffusionSettings
from fastdiff.models import SuperResSettings, UNet, UNetSettings, weights
from fastdiff.runtime.files import checksum
from fastdiff.training.initial_weights import open_initial, take_weights

FORMATS = ("safetensors", "pt", "openai", "diffusers")


def to(source: Path, kind: str, target: Path, *words: str) -> Checkpoint:
    """Convert, and read what was written with the settings that it carries."""
    convert.main(["--model_path", str(source), "--to", kind, str(target), *words])
    return open_checkpoint(str(target)) if kind != "diffusers" else Checkpoint(target, {})  # type: ignore[arg-type]


def assert_same(got: Checkpoint, want: Checkpoint) -> None:
    assert got.state.keys() == want.state.keys()
    for name, value in want.state.items():
        assert got.state[name].dtype == value.dtype
        assert torch.equal(got.state[name].view(torch.uint8), value.view(torch.uint8)), name
    assert {name: value for name, value in got.info.items() if name != "provenance"} == want.info


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with an average, a grid of samples and its best score."""
    folder = tmp_path / "run"
    model = unet(class_cond=True, num_classes=2, learn_sigma=True)
    save(model, folder / "checkpoints" / "step_000012" / "ema_0.999_000012.pt", ["cat", "dog | hound"])
    (folder / "config.json").write_text(json.dumps(info_for(model)))
    (folder / "checkpoints" / "best").mkdir()
    best = {"step": 12, "ema_rate": "0.999", "metric": "fid", "value": 3.25, "samples": 500, "network": "inception"}
    (folder / "checkpoints" / "best" / "best.json").write_text(json.dumps({**best, "reference": "/data/train.npz"}))
    (folder / "samples").mkdir()
    for step, colour in ((6, "red"), (12, "blue"), (18, "green")):
        Image.new("RGB", (20, 20), colour).save(folder / "samples" / f"step_{step:06d}.png")
    return folder


NETWORKS: dict[str, Callable[[], UNet]] = {
    "unet": lambda: unet(class_cond=True, num_classes=3, null_class=True),
    "new order": lambda: unet(use_new_attention_order=True, num_head_channels=16, resblock_updown=True),
    "super_res": super_res,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["safetensors", "pt", "diffusers"])
def test_round_trips_keep_bits_and_settings(kind: str, name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    names = ["a", "b", "c"] if model.settings.class_cond else []
    source = save(model, tmp_path / "ema_0.5_000003.pt", names, sigma_small=True)
    to(source, kind, tmp_path / "there")
    back = to(tmp_path / "there", "pt", tmp_path / "back.pt")
    assert_same(back, open_checkpoint(str(source)))
    assert list(back.state) == list(model.state_dict())  # by this order optimisers number their moments
    assert_same(to(tmp_path / "there", "safetensors", tmp_path / "back"), open_checkpoint(str(source)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_file_is_bare(name: str, tmp_path: Path) -> None:
    """It holds the weights alone, and with the settings as flags it becomes the same checkpoint again."""
    model = NETWORKS[name]()
    source = save(model, tmp_path / "ema_0.5_000003.pt")
    bare = to(source, "openai", tmp_path / "bare.pt")
    assert not bare.info
    content = torch.load(tmp_path / "bare.pt", weights_only=True)
    assert list(content) == list(model.state_dict())
    assert getattr(content, "_metadata", None) is None
    info = open_checkpoint(str(source)).info
    given = flags({name: value for name, value in (info["model"] | info["diffusion"]).items() if value != ""})
    assert_same(to(tmp_path / "bare.pt", "pt", tmp_path / "back.pt", *given), open_checkpoint(str(source)))


def test_a_file_without_settings_takes_flags_or_a_preset(tmp_path: Path) -> None:
    source = save_bare(unet(), tmp_path / "net.pt")
    words = flags({"image_size": 8, "diffusion_steps": 50, "num_heads": 2})
    info = to(source, "safetensors", tmp_path / "net", *words).info
    assert (info["kind"], info["diffusion"]["diffusion_steps"], info["model"]["num_heads"]) == ("unet", 50, 2)
    assert info["model"]["attention_resolutions"] == "4"
    message = refusal(convert.main, ["--model_path", source, "--preset", "cifar10_uncond", "--to", "pt", "x.pt"])
    assert message.startswith(f"--model_path: {source} does not fit the model: it was trained with ")


def test_provenance(run: Path, tmp_path: Path) -> None:
    """It names the file of the training run, also after a second conversion."""
    first = to(run, "safetensors", tmp_path / "first")
    file = run / "checkpoints" / "step_000012" / "ema_0.999_000012.pt"
    want = {"file": file.name, "sha256": checksum(file), "step": 12, "ema_rate": "0.999"}
    assert first.info["provenance"] == {**want, "fastdiff": fastdiff.__version__}
    assert to(tmp_path / "first", "pt", tmp_path / "second.pt").info["provenance"] == first.info["provenance"]


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_classifiers(kind: str, tmp_path: Path) -> None:
    source = save(classifier(), tmp_path / "model000003.pt", ["a", "b", "c"])
    there = to(source, kind, tmp_path / "there")
    assert_same(there, open_checkpoint(str(source)))
    assert "A classifier of noised RGB images of 8x8 pixels that tells 3 classes apart" in card_of(tmp_path / "there")
    assert "--classifier_path there --classifier_scale 1" in card_of(tmp_path / "there")
    out = tmp_path / "out"
    assert refusal(convert.main, ["--model_path", source, "--to", "diffusers", out]) == (
        "--to diffusers: diffusers has no classifier of noised images; write it as safetensors, openai or pt"
    )
    assert refusal(convert.main, ["--model_path", source, "--to", "pt", out, "--grid_images", 4]) == (
        "--grid_images: a classifier draws nothing; leave it out"
    )


def test_the_original_file_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(classifier(classifier_pool="spatial"), tmp_path / "model000003.pt")
    assert not to(source, "openai", tmp_path / "bare.pt").info
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"guided-diffusion draws with it by: python scripts/classifier_sample.py --classifier_path {tmp_path}/bare.pt "
        "--model_path MODEL.pt MODEL_FLAGS --classifier_attention_resolutions 4 --classifier_depth 1 --classifier_pool "
        "spatial --classifier_width 64",
        "note: its classifiers have 1000 classes: 3 must be in its create_classifier",
        "note: no flag says channel_mult 1,2: give it in its create_classifier",
    ]
    info = open_checkpoint(str(source)).info
    given = flags({"image_size": 8, **{name: value for name, value in info["diffusion"].items() if value != ""}})
    assert_same(to(tmp_path / "bare.pt", "pt", tmp_path / "back.pt", *given), open_checkpoint(str(source)))


# --- reading them ---


@pytest.mark.parametrize("kind", ["safetensors", "pt", "file"])
def test_scripts_read_converted_files(kind: str, run: Path, tmp_path: Path) -> None:
    target = tmp_path / ("net.safetensors" if kind == "file" else "net")
    to(run, "safetensors" if kind == "file" else kind, target)
    drawn = []
    for path in (run, target):
        out = tmp_path / f"drawn_{path.name}"
        sample.main(flags({"model_path": path, "num_samples": 4, "out_dir": out, "classes": "dog | hound"}))
        drawn.append(np.load(next(out.glob("*.npz")))["arr_0"])
    np.testing.assert_array_equal(*drawn)
    model = fastdiff.load(target)
    assert model.class_names == ["cat", "dog | hound"]
    pictures(tmp_path / "images", ["cat_1", "dog | hound_2"])
    data = {"data_dir": tmp_path / "images", "loader": "pillow", "num_samples": 2}
    for path in (run, target):
        nll.main(flags({"model_path": path, **data, "out_dir": tmp_path / f"nll_{path.name}"}))
    terms = [np.load(tmp_path / f"nll_{path.name}" / "vb_terms.npz")["arr_0"] for path in (run, target)]
    np.testing.assert_array_equal(*terms)


def test_a_run_starts_from_a_converted_file(tmp_path: Path) -> None:
    model = unet()
    to(save(model, tmp_path / "net.pt"), "safetensors", tmp_path / "net", "--half")
    config = Config.model_validate({"model": MODEL, "train": {"init_from": str(tmp_path / "net")}})
    fresh = unet(dropout=0.1)
    lines = take_weights(open_initial(config), fresh, config, [])
    assert lines[0].startswith("starting from ")
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float()), name


def test_a_converted_upsampler_is_read(tmp_path: Path) -> None:
    source = save(super_res(), tmp_path / "net.pt")
    to(source, "safetensors", tmp_path / "net")
    np.savez(tmp_path / "base.npz", pictures(tmp_path / "small", ["a", "b"]))
    given = {"base_samples": tmp_path / "base.npz", "out_dir": tmp_path / "out"}
    super_res_sample.main(flags({"model_path": tmp_path / "net", **given}))
    assert list((tmp_path / "out").glob("*.npz"))


def test_checkpoints_of_a_run_may_be_safetensors(tmp_path: Path) -> None:
    """In a folder the newest average is taken, whatever its ending."""
    folder = tmp_path / "run"
    save(unet(), folder / "ema_0.9_000003.pt")
    to(folder, "safetensors", folder / "ema_0.9_000005.safetensors")
    assert weights.find(str(folder)).name == "ema_0.9_000005.safetensors"
    (folder / "ema_0.9_000003.pt").unlink()
    assert weights.find(str(folder)).name == "ema_0.9_000005.safetensors"


def test_damaged_settings_of_safetensors(tmp_path: Path) -> None:
    state = dict(unet().state_dict())
    safetensors.torch.save_file(state, tmp_path / "net.safetensors", {"fastdiff": '{"kind": "vae"}'})
    message = refusal(convert.main, ["--model_path", tmp_path / "net.safetensors", "--to", "pt", tmp_path / "x.pt"])
    assert "the settings in " in message
    assert "are damaged (kind is 'vae', not unet or super_res" in message


# --- half precision ---


@pytest.mark.parametrize("kind", FORMATS)
def test_half(kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to(run, kind, tmp_path / "half", "--half")
    assert "note: all weights are rounded to float16, those of norms and embeddings, too" in capsys.readouterr().out
    to(run, kind, tmp_path / "whole")
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).rglob("*.*t*s*")) for name in ("half", "whole")]
    assert sizes[0] <= sizes[1]
    if kind != "openai":
        half = to(tmp_path / "half", "pt", tmp_path / "half.pt")
        want = open_checkpoint(str(run)).state
        assert all(torch.equal(value, want[name].half()) for name, value in half.state.items())
        samples = fastdiff.load(tmp_path / "half.pt").sample(2, steps=3)
        assert samples.images.shape == (2, 8, 8, 3)


def test_half_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = unet()
    with torch.no_grad():
        model.out[2].bias[0] = 1e5
    source = save(model, tmp_path / "net.pt")
    message = refusal(convert.main, ["--model_path", source, "--to", "pt", tmp_path / "x.pt", "--half"])
    assert message == f"--half: out.2.bias in {source} reaches 100000, and float16 ends at 65504; leave --half out"


# --- bad input ---


def test_wrong_words(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = ["--model_path", run]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "net.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    wrong: dict[str, list[Any]] = {
        "--to is missing: give one of diffusers, safetensors, openai, pt": [*source, out],
        "--to: must be '', 'diffusers', 'safetensors', 'openai' or 'pt', not 'onnx'": [*source, "--to", "onnx", out],
        "--out is missing: name what is to be written, as in --to pt NAME": [*source, "--to", "pt"],
        "--model_path is missing: give a .pt checkpoint or a run's folder": ["--to", "pt", out],
        f"--model_path: {out} does not exist; give a .pt file or a run's folder": [
            "--model_path",
            out,
            "--to",
            "pt",
            out,
        ],
        f"--out: {out}.pt ends in .pt, and --to diffusers writes a folder": [*source, "--to", "diffusers", f"{out}.pt"],
        f"--out: {out}.pt ends in .pt, and --to safetensors writes a .safetensors file or a folder": [
            *(*source, "--to", "safetensors", f"{out}.pt")
        ],
        f"--out: {out}.bin ends in .bin, and --to pt writes a .pt file or a folder": [
            *source,
            "--to",
            "pt",
            f"{out}.bin",
        ],
        f"--out: {run} exists; give another name, or --overwrite True": [*source, "--to", "pt", run],
        f"--out: {tmp_path / 'net.pt'} exists; give another name, or --overwrite True": [
            *(*source, "--to", "pt", tmp_path / "net.pt")
        ],
        f"--out: {tmp_path / 'full'} holds thesis.tex, which no conversion wrote; give another name": [
            *(*source, "--to", "pt", tmp_path / "full", "--overwrite", "True")
        ],
        f"--out: {tmp_path / 'file'} is a file; give another name": [*source, "--to", "pt", tmp_path / "file"],
        f"--out: {tmp_path / 'folder.pt'} is a folder; give another name": [
            *source,
            "--to",
            "pt",
            tmp_path / "folder.pt",
        ],
        "--out: / is no name of a new file or folder": [*source, "--to", "pt", "/"],
        "x belongs to no flag, because --out is given as well; leave one out": [
            *source,
            "--to",
            "pt",
            "x",
            "--out",
            out,
        ],
        "y belongs to no flag; each takes one value, in quotes if it contains spaces": [
            *source,
            "--to",
            "pt",
            out,
            "y",
        ],
        f"--grid_images: the picture is for the model card, and {out}.pt is a single file; name a folder": [
            *(*source, "--to", "pt", f"{out}.pt", "--grid_images", 4)
        ],
    }
    with nothing_written(tmp_path):
        for message, words in wrong.items():
            assert refusal(convert.main, words) == message


def test_the_source_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    source = save(unet(), tmp_path / "net.pt")
    to(source, "pt", folder)
    for path in (source, folder):
        with nothing_written(tmp_path):
            message = refusal(convert.main, ["--model_path", path, "--to", "pt", path, "--overwrite", "True"])
        assert message == f"--out: {path} is or holds the network that is converted; give another name"


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = unet()
    with torch.no_grad():
        model.out[2].bias[0] = float("nan")
    source = save(model, tmp_path / "net.pt")
    with nothing_written(tmp_path):
        assert "out.2.bias in" in refusal(convert.main, ["--model_path", source, "--to", "pt", tmp_path / "out"])


@pytest.mark.parametrize(
    ("kind", "single"),
    [(kind, single) for kind in FORMATS for single in (False, True) if kind != "diffusers" or not single],
)
def test_a_full_disk_leaves_nothing(
    kind: str, single: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there under that name stays."""
    out = tmp_path / ("out" if not single else "out.safetensors" if kind == "safetensors" else "out.pt")
    to(run, kind, out)

    def fail(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device")

    def fail_too(*_: Any, **__: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    monkeypatch.setattr(torch, "save", fail_too)
    with nothing_written(tmp_path):
        message = refusal(convert.main, ["--model_path", run, "--to", kind, out, "--overwrite", "True"])
    assert message.startswith(f"--out: {out} can't be written (")
    monkeypatch.undo()
    to(run, kind, out, "--overwrite", "True")


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_on_disk_and_readable_by_others(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors' library replaces the file by one of mode 0600 that it doesn't sync."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    to(run, kind, tmp_path / "there")
    (tmp_path / "usual").touch()
    for file in (tmp_path / "there").rglob("*"):
        assert file.stat().st_ino in synced or file.is_dir(), file
        assert file.is_dir() or file.stat().st_mode == (tmp_path / "usual").stat().st_mode, file


def test_a_folder_that_cannot_be_made(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(convert.main, ["--model_path", run, "--to", "pt", tmp_path / "file" / "net"])
    assert message == f"--out: {tmp_path / 'file' / 'net'} can't be written (File exists); nothing was changed"


# --- the model card ---


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", FORMATS)
def test_model_card(kind: str, run: Path, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    to(run, kind, tmp_path / "out")
    text = card_of(tmp_path / "out")
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["library_name"] == ("diffusers" if kind == "diffusers" else "fastdiff")
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "license" not in data
    assert "A diffusion model in pixel space that draws RGB images of 8x8 pixels of 2 classes." in text
    assert "| classes | 2: 0 cat, 1 dog \\| hound |" in text
    assert "| converted from | ema_0.999_000012.pt |" in text
    assert "| fid | 3.25 | 500 samples during training, reference train.npz, features inception |" in text
    assert str(tmp_path) not in text
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.getpixel((3, 3)) == (0, 0, 255)  # of step 12, not of the newer one


def test_scores_of_evaluate(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of these weights are shown, and no others; damaged results are left out."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "runs" / "evaluations"
    results.mkdir(parents=True)
    digest = open_checkpoint(str(run)).digest
    drawing = {"model_path": digest, "solver": "ddim", "steps": 50}
    good = {"samples": {"count": 5000, "drawing": drawing}, "reference": {"path": "/data/ref.npz"}}
    (results / "good.json").write_text(json.dumps({**good, "scores": {"fid": {"value": 12.3456}}}))
    other = {"samples": {"drawing": {"model_path": "sha256:0"}}, "scores": {"fid": {"value": 99}}}
    (results / "other.json").write_text(json.dumps(other))
    (results / "damaged.json").write_text(json.dumps({**good, "scores": {"kid": 7}}))
    (results / "evaluations.csv").write_text("time,file\n1,good.json\n2,other.json\n3,missing.json\n4,damaged.json\n")
    to(run, "pt", tmp_path / "out")
    text = card_of(tmp_path / "out")
    assert "| fid | 12.346 | 5000 samples, ddim, 50 steps, reference ref.npz |" in text
    assert "99" not in text.split("## How good is it?")[1].split("##")[0]


def test_drawn_picture(run: Path, tmp_path: Path) -> None:
    to(run, "safetensors", tmp_path / "out", "--grid_images", "4")
    assert "The first 4 images of seed 0." in card_of(tmp_path / "out")
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.getpixel((3, 3)) != (0, 0, 255)
    source = save(super_res(), tmp_path / "net.pt")
    message = refusal(convert.main, ["--model_path", source, "--to", "pt", tmp_path / "sr", "--grid", "4"])
    assert message == "--grid_images: the network enlarges images, and none are given here; leave it out"


def test_overwriting_a_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    to(run, "diffusers", out)
    to(run, "safetensors", out, "--overwrite")
    assert {path.name for path in out.iterdir()} == {"README.md", "samples.png", "model.safetensors"}
    shutil.rmtree(out)
    out.mkdir()
    to(run, "pt", out)  # an empty folder is no loss
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to("elsewhere")
    for _ in range(2):
        to(run, "pt", link, "--overwrite")
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "model.pt").is_file()
    assert not list(tmp_path.glob(".*"))


# --- the originals' flags ---


def words_of(model: dict[str, Any], super_res: bool = False, **process: Any) -> dict[str, str]:
    settings = (SuperResSettings if super_res else UNetSettings)(**model)
    words = shlex.split(command_of(settings, DiffusionSettings(**process), Path("net.pt")))
    return dict(zip(words[2::2], words[3::2], strict=True)) | {"script": words[1]}


def test_flags_of_improved_diffusion() -> None:
    model = {"image_size": 32, "num_res_blocks": 3, "learn_sigma": True, "dropout": 0.3}
    assert words_of(model, diffusion_steps=4000, noise_schedule="cosine") == {
        **{"script": "scripts/image_sample.py", "--model_path": "net.pt", "--image_size": "32"},
        **{"--num_res_blocks": "3", "--learn_sigma": "True", "--dropout": "0.3"},
        **{"--diffusion_steps": "4000", "--noise_schedule": "cosine"},
    }


def test_flags_of_guided_diffusion() -> None:
    sizes = {"large_size": 512, "small_size": 128, "num_channels": 192, "num_head_channels": 64}
    model = {**sizes, "attention_resolutions": "32,16", "class_cond": True, "resblock_updown": True}
    process = {"rescale_timesteps": False, "rescale_learned_sigmas": False}
    assert words_of(model, super_res=True, **process) == {
        **{"script": "scripts/super_res_sample.py", "--model_path": "net.pt", "--base_samples": "FILE.npz"},
        **{"--large_size": "512", "--small_size": "128", "--num_channels": "192", "--class_cond": "True"},
        **{"--attention_resolutions": "32,16", "--num_head_channels": "64", "--resblock_updown": "True"},
    }
    half = {
        "image_size": 512,
        "num_channels": 256,
        "scale_stem": True,
        "resblock_updown": True,
        "num_head_channels": 64,
    }
    assert "--channel_mult" not in words_of(half, **process)
    assert not list(notes_on(UNetSettings(**half), DiffusionSettings(**process)))


def test_what_the_originals_cannot_be_told() -> None:
    model = {**MODEL, "in_channels": 1, "class_cond": True, "num_classes": 5, "null_class": True, "image_size": "8x16"}
    assert list(
        notes_on(
            UNetSettings(**{**model, "num_channels": 64, "channel_mult": "1,1.5,2"}),
            DiffusionSettings(sigma_small=True),
        )
    ) == [
        "NUM_CLASSES in its script_util.py must be 6, of which the last is the null class",
        "its scripts are for images of 3 channels, and this network has 1",
        "its scripts draw square images only",
        "no flag says channel_mult 1,1.5,2: give it in its script_util.py",
        "no flag says sigma_small: give it in its script_util.py",
    ]


def test_info_is_that_of_a_run(run: Path, tmp_path: Path) -> None:
    model = unet(class_cond=True, num_classes=2, learn_sigma=True)
    info = to(run, "pt", tmp_path / "out").info
    assert {**info, "provenance": None} == {**info_for(model, ["cat", "dog | hound"]), "provenance": None}


def test_presets_of_other_kinds(tmp_path: Path) -> None:
    source = save_bare(classifier(), tmp_path / "net.pt")
    words = ["--model_path", source, "--to", "pt", tmp_path / "x.pt", "--preset"]
    assert refusal(convert.main, [*words, "cifar10_uncond"]) == (
        "--preset: cifar10_uncond is for train.py, sample.py and nll.py, not a classifier's"
    )
    message = refusal(convert.main, [*words, "64x64_classifier"])
    assert message.startswith(f"--model_path: {source} does not fit the model: it was trained with ")
