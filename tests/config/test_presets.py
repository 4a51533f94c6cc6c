"""Presets describe the released checkpoints, give scripts their settings, and fetch their files."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.golden_cases import Case, cases
from helpers.tiny import Main, info_for, pictures, refusal, save, save_bare, super_res, unet
from test_settings import json_file, read

from fastdiff import nll, sample, super_res_sample
from fastdiff.config.checkpoint import Checkpoint, open_checkpoint, preset_of
from fastdiff.config.classifier import classifier_settings_of
from fastdiff.config.load import describe
from fastdiff.config.presets import PRESETS, RELEASED, Preset, download, find_preset, is_preset, preset_for_file
from fastdiff.errors import UserError
from fastdiff.models import SuperResSettings, UNetSettings, build_model, weights
from fastdiff.models.classifier import build_network
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings
from fastdiff.runtime.machine import cache_folder

MILLIONS = {  # of parameters
    "imagenet64_uncond": 121,
    "imagenet64_uncond_vlb": 121,
    "imagenet64_270M": 273,
    "cifar10_uncond": 52.5,
    "cifar10_uncond_vlb": 52.5,
    "upsample_256": 280,
    "lsun_bedroom_lr1e-4": 114,
    "lsun_bedroom_lr2e-5": 114,
    "baseline": 121,
    # Dhariwal & Nichol 2021, tables 11 and 13, where LSUN's 552.8 are cut to 552
    "64x64_diffusion": 296,
    "128x128_diffusion": 422,
    "256x256_diffusion": 554,
    "256x256_diffusion_uncond": 553,
    "512x512_diffusion": 559,
    "64_256_upsampler": 312,
    "128_512_upsampler": 309,
    "lsun_bedroom": 553,
    "lsun_cat": 553,
    "lsun_horse": 553,
    "lsun_horse_nodropout": 553,
    "64x64_classifier": 65.4,
    "128x128_classifier": 42.6,
    "256x256_classifier": 54.1,
    "512x512_classifier": 54.4,
}


def cached_checkpoints() -> Path:
    return cache_folder() / "checkpoints"


def settings_of(preset: Preset) -> NetworkSettings:
    kinds = {"unet": UNetSettings, "super_res": SuperResSettings, "classifier": ClassifierSettings}
    return kinds[preset.kind](**preset.model)


# --- the table ---


@pytest.mark.parametrize("name", MILLIONS)
def test_networks(name: str) -> None:
    preset = find_preset(name)
    with torch.device("meta"):
        model = build_network(settings_of(preset))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(count, 0 if MILLIONS[name] > 100 else 1) == MILLIONS[name]
    assert (preset.kind == "super_res") == ("upsample" in name)


@cases("reference_configs", family="improved")
def test_shapes_are_those_of_the_original(case: Case) -> None:
    """Networks with the flags of improved-diffusion's README have the shapes of the original."""
    named = {
        "imagenet64_uncond": "imagenet64_uncond_100M_1500K",
        "imagenet64_cond_270M": "imagenet64_cond_270M_250K",
        "cifar10_uncond": "cifar10_uncond_50M_500K",
        "upsample_cond": "upsample_cond_500K",
        "lsun_bedroom": "lsun_uncond_100M_2400K_bs64",
    }
    for reference, released in named.items():
        preset = PRESETS[released]
        with torch.device("meta"):
            state = build_network(settings_of(preset)).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == case.shapes[reference]
        flags = case.config["configs"][reference]["flags"]
        ours = {**preset.model, **preset.diffusion}
        assert {key for key, value in flags.items() if key in ours and ours[key] != value} == set()


def test_both_names() -> None:
    assert set(MILLIONS) == set(RELEASED)
    for name, released in RELEASED.items():
        preset = find_preset(name)
        assert (preset.name, preset.released) == (name, released)
        if released:
            assert find_preset(released) is preset
            month = "jul-2021" if preset.family == "guided" else "march-2021"
            assert preset.url.endswith(f".windows.net/diffusion/{month}/{released}.pt")
            assert preset_for_file(f"some/folder/{released}.pt") is preset
        if released != name:
            assert preset_for_file(f"{name}.pt") is None
        assert is_preset(name)
    assert len(PRESETS) == len({*RELEASED, *RELEASED.values()} - {""})  # no name stands for two
    assert {name for name in RELEASED if PRESETS[name].family == "guided"} == {*list(MILLIONS)[9:]}
    assert preset_for_file("ema_0.9999_500000.pt") is None
    assert preset_for_file("x/.pt") is None
    assert not is_preset("demo")


def test_what_shapes_cannot_show() -> None:
    lsun = find_preset("lsun_bedroom_lr2e-5")
    assert (lsun.model["num_heads"], lsun.model["attention_resolutions"]) == (1, "16")
    assert lsun.diffusion["noise_schedule"] == "linear"
    assert not lsun.diffusion["rescale_timesteps"]
    assert find_preset("imagenet64_uncond_vlb").diffusion["use_kl"]
    assert find_preset("cifar10_uncond").diffusion["diffusion_steps"] == 4000


def test_unknown_name() -> None:
    with pytest.raises(
        UserError, match="cifar10_uncon is not a preset; did you mean cifar10_uncond.; there are imagen"
    ):
        find_preset("cifar10_uncon")
    message = refusal(sample.main, ["--preset", "xyzzy"])
    assert message.startswith("--preset: xyzzy is not a preset; there are ")
    assert all(name in message for name in RELEASED)


def test_documents_list_every_released_file(capsys: pytest.CaptureFixture[str]) -> None:
    """README names each, and docs/models.md has a command for it that is complete."""
    readme, page = (ROOT / name for name in ("README.md", "docs/models.md"))
    rows = {row.split("`")[1]: row for row in page.read_text().splitlines() if row.startswith("| `")}
    assert {*rows} == {released for released in RELEASED.values() if released}
    for released, row in rows.items():
        assert f"`{released}`" in readme.read_text()
        preset, command = find_preset(released), row.split("`")[-2].split()
        if preset.kind == "classifier":
            assert command[command.index("--classifier_path") + 1] == released
            preset = find_preset(command[command.index("--preset") + 1])
        assert command[:2] == [
            "python",
            f"fastdiff/{'super_res_sample' if preset.kind == 'super_res' else 'sample'}.py",
        ]
        main = super_res_sample.main if preset.kind == "super_res" else sample.main
        with pytest.raises(SystemExit):
            main([*command[2:], "--print_config"])
        assert json.loads(capsys.readouterr().out)["model"] == preset.model


@pytest.mark.parametrize("main", [sample.main, super_res_sample.main, nll.main])
def test_a_classifier_is_no_preset_to_draw_from(main: Main) -> None:
    message = refusal(main, ["--preset", "64x64_classifier"])
    assert message == "--preset: 64x64_classifier is a classifier, which sample.py takes as --classifier_path"


def test_a_bare_classifier_has_its_presets_process(tmp_path: Path) -> None:
    """By the name of the released file, which says how images were noised; under another name weights alone speak."""
    with torch.device("meta"):
        model = build_network(settings_of(find_preset("64x64_classifier")))
    for name, known in (("64x64_classifier", True), ("other", False)):
        checkpoint = Checkpoint(tmp_path / f"{name}.pt", model.state_dict())
        layer = classifier_settings_of(checkpoint)[1]
        assert ClassifierSettings(**layer["model"]) == settings_of(find_preset("64x64_classifier"))
        assert ("diffusion" in layer) == known
    assert find_preset("64x64_classifier").diffusion["noise_schedule"] == "cosine"


# --- settings of a bare file ---


def tiny_preset(monkeypatch: pytest.MonkeyPatch, name: str = "tiny", url: str = "", **diffusion: Any) -> Preset:
    """Add a preset of the tiny network, under `name` and as tiny_1K.pt."""
    info = info_for(unet(), **{"diffusion_steps": 40, "rescale_timesteps": False, **diffusion})
    preset = Preset(name, "tiny_1K", url, "unet", {**info["model"], "num_heads": 2}, info["diffusion"])
    monkeypatch.setitem(PRESETS, name, preset)
    monkeypatch.setitem(PRESETS, "tiny_1K", preset)
    return preset


@pytest.mark.parametrize("script", ["sample", "nll"])
def test_preset_of_a_bare_file(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_preset(monkeypatch)
    file = save_bare(unet(), tmp_path / "ema_0.9999_000001.pt")
    config = read(script, "--model_path", file, "--preset", "tiny")
    assert config.model == UNetSettings(**{**unet().settings.model_dump(), "num_heads": 2})
    assert (config.diffusion.diffusion_steps, config.diffusion.rescale_timesteps) == (40, False)
    assert not caplog.records  # no setting is guessed
    content = {script: {"model_path": str(file), "preset": "tiny"}, "diffusion": {"diffusion_steps": 50}}
    config = read(script, "--config", json_file(tmp_path, content), "--num_heads", 1)
    assert (config.diffusion.diffusion_steps, config.model.num_heads) == (50, 1)  # override the preset
    assert not config.diffusion.rescale_timesteps


def test_preset_by_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_preset(monkeypatch)
    file = save_bare(unet(), tmp_path / "tiny_1K.pt")
    with caplog.at_level(logging.WARNING):
        config = read("sample", "--model_path", file)
    assert (config.diffusion.diffusion_steps, config.model.num_heads) == (40, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} carries no settings; taken from the preset tiny by the file's name"
    ]
    save(unet(), file, diffusion_steps=60)  # a file's own settings override those of its name
    assert read("sample", "--model_path", file).diffusion.diffusion_steps == 60


def test_without_a_preset_shapes_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_bare(unet(), tmp_path / "other.pt")
    with caplog.at_level(logging.WARNING):
        config = read("sample", "--model_path", file, "--image_size", 16)
    assert config.model.num_channels == 32
    message = caplog.records[0].getMessage()
    assert "carries no settings" in message
    assert "num_heads, diffusion_steps" in message
    assert "attention_resolutions" not in message  # with the image size, the weights show them
    assert config.model.attention_resolutions == (8,)
    assert "image_size" not in message  # it was given as a flag


def test_preset_that_contradicts_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_preset(monkeypatch)
    heads = UNetSettings(**{**unet().settings.model_dump(), "num_heads": 2})
    own = save(build_model(heads), tmp_path / "own.pt", diffusion_steps=40, rescale_timesteps=False, use_kl=True)
    config = read("sample", "--model_path", own, "--preset", "tiny")  # settings of training may differ
    assert config.diffusion.use_kl
    message = refusal(sample.main, ["--model_path", own, "--preset", "cifar10_uncond"])
    assert message == (
        f"--preset: cifar10_uncond has num_channels 128, but {own} carries its own settings, with num_channels 32; "
        "leave --preset out"
    )
    other = save(build_model(heads), tmp_path / "other.pt", diffusion_steps=41, rescale_timesteps=False)
    assert "tiny has diffusion_steps 40" in refusal(nll.main, ["--model_path", other, "--preset", "tiny"])


def test_preset_that_does_not_fit_the_file(tmp_path: Path) -> None:
    file = save_bare(unet(), tmp_path / "bare.pt")
    message = refusal(sample.main, ["--model_path", file, "--preset", "cifar10_uncond"])
    assert f"{file} does not fit the model" in message
    assert "--num_channels 32" in message


def test_preset_of_the_other_kind(tmp_path: Path) -> None:
    message = refusal(sample.main, ["--preset", "upsample_256"])
    assert message == "--preset: upsample_256 is for super_res_train.py and super_res_sample.py"
    message = refusal(super_res_sample.main, ["--preset", "cifar10_uncond_50M_500K"])
    assert message == "--preset: cifar10_uncond_50M_500K is for train.py, sample.py and nll.py"
    file = json_file(tmp_path, {"sample": {"preset": "upsample_256"}})
    assert f"{file}: sample.preset: upsample_256 is for super_res" in refusal(sample.main, ["--config", file])
    with pytest.raises(UserError, match="--sr_preset: cifar10_uncond is for train.py"):
        preset_of("cifar10_uncond", super_res=True, flag="--sr_preset")


def test_null_class_of_a_bare_file(tmp_path: Path) -> None:
    """An additional row is the null class only if a flag says so."""
    model = unet(class_cond=True, num_classes=5, null_class=True)
    file = save_bare(model, tmp_path / "bare.pt")
    assert read("sample", "--model_path", file).model.num_classes == 6
    for words in (["--null_class", "True"], ["--null_class", "--num_classes", "5"]):
        found = read("sample", "--model_path", file, "--image_size", 8, "--attention_resolutions", 4, *words).model
        assert (found.num_classes, found.null_class, found.num_labels) == (5, True, 6)
        weights.load_into(build_model(found), model.state_dict(), file)


def test_describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_preset(monkeypatch)
    bare = save_bare(unet(), tmp_path / "bare.pt")
    assert describe(open_checkpoint(str(bare)), "tiny").model.num_heads == 2
    large = save(super_res(), tmp_path / "large.pt", diffusion_steps=50)
    assert describe(open_checkpoint(str(large))).diffusion.diffusion_steps == 50
    with pytest.raises(UserError, match=r"small\.pt is for train\.py"):
        describe(open_checkpoint(str(save(unet(), tmp_path / "small.pt"))), super_res=True)


# --- released files ---


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """A preset whose file is on this machine, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    file = save_bare(unet(), served / "tiny_1K.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_preset(monkeypatch, url=file.as_uri())


def test_download(released: Preset, tmp_path: Path) -> None:
    file = download(released, progress=False)
    assert file == tmp_path / "cache" / "fastdiff" / "checkpoints" / "tiny_1K.pt"
    assert file.read_bytes() == (tmp_path / "served" / "tiny_1K.pt").read_bytes()
    (tmp_path / "served" / "tiny_1K.pt").unlink()
    assert download(released, progress=False) == file  # kept
    with pytest.raises(UserError, match="can't be fetched"):
        download(released, tmp_path / "elsewhere", progress=False)


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_checkpoints() == tmp_path / ".cache" / "fastdiff" / "checkpoints"


def test_download_of_a_cut_file(released: Preset, tmp_path: Path) -> None:
    """An interrupted download leaves no file that could be taken for the checkpoint."""
    served = tmp_path / "served" / "tiny_1K.pt"
    whole = served.read_bytes()
    served.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match="--preset tiny: file:.* can't be fetched .*download is incomplete.*--model_path"
    ):
        download(released, progress=False)
    left = [path.name for path in cached_checkpoints().iterdir() if not path.name.endswith(".lock")]
    assert left == []
    served.write_bytes(whole)
    assert download(released, progress=False).read_bytes() == whole


def test_downloads_that_cannot_be(released: Preset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--preset baseline: no checkpoint of it was released"):
        download(find_preset("baseline"))
    for url in ("file:///nowhere/tiny_1K.pt", "http://127.0.0.1:9/tiny_1K.pt"):
        with pytest.raises(UserError, match="can't be fetched") as caught:
            download(replace(released, url=url), progress=False)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be fetched into"):
        download(released, tmp_path / "file" / "deep", progress=False)


def _fetch(preset: Preset, folder: Path) -> None:
    download(preset, folder, progress=True)


def test_one_process_of_several_downloads(released: Preset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_fetch, args=(released, tmp_path / "shared"))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert capfd.readouterr().err.count("fetching ") == 1
    assert [path.name for path in (tmp_path / "shared").glob("*.pt")] == ["tiny_1K.pt"]


def test_preset_alone_fetches_its_checkpoint(
    released: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = cached_checkpoints() / "tiny_1K.pt"
    with pytest.raises(SystemExit):
        sample.main(["--preset", "tiny", "--print_config"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["diffusion"]["diffusion_steps"] == 40
    assert not cached.exists()  # settings need no download
    for words in (["--preset", "tiny"], ["--preset", "tiny_1K"], ["--preset", "tiny", "--model_path", ""]):
        config = read("sample", *words)
        assert config.sample.model_path == str(cached)
        assert config.model.num_heads == 2
    assert read("nll", "--preset", "tiny").nll.model_path == str(cached)
    assert cached.is_file()


def test_preset_alone_draws(released: Preset, tmp_path: Path) -> None:
    """The name of a preset is enough to draw and to score images."""
    words = ["--preset", "tiny", "--num_samples", "2", "--batch_size", "2", "--timestep_respacing", "3"]
    sample.main([*words, "--kernels", "reference", "--compile", "False", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "samples_2x8x8x3.npz").is_file()
    pictures(tmp_path / "images", ["a", "b"])
    words = ["--preset", "tiny", "--data_dir", str(tmp_path / "images"), "--loader", "pillow", "--num_samples", "2"]
    nll.main([*words, "--timestep_respacing", "3", "--kernels", "reference", "--out", str(tmp_path / "scores")])
    assert (tmp_path / "scores" / "vb_terms.npz").is_file()
