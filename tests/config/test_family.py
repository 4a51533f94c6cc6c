"""--family chooses whose defaults hold, and files without settings that are guided-diffusion's get its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_cases import Case, cases
from helpers.tiny import flags, refusal, save, save_bare, super_res, unet
from test_settings import SCRIPTS, by_script, json_file, read

from fastdiff import nll, sample, super_res_sample, train
from fastdiff.config.checkpoint import Network, open_checkpoint
from fastdiff.config.family import FAMILIES
from fastdiff.config.load import describe, load
from fastdiff.config.presets import find_preset
from fastdiff.config.sections import ClassifierConfig, Config, EvaluateConfig, SuperResConfig
from fastdiff.diffusion import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models import SuperResSettings, UNetSettings, build_model
from fastdiff.models.classifier import build_network
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.sampling.build import check_fit

TRAINING, NLL = SCRIPTS["train"][1], SCRIPTS["nll"][1]
DRAWING = ("model", "diffusion", "classifier", "sample")
# Script of guided-diffusion → the sections and the kind of settings of the one that takes its place.
ORIGINALS: dict[str, tuple[tuple[str, ...], type[Config]]] = {
    "image_train": (TRAINING, Config),
    "image_sample": (DRAWING, Config),
    "image_nll": (NLL, Config),
    "super_res_train": (TRAINING, SuperResConfig),
    "super_res_sample": (SCRIPTS["super_res_sample"][1], SuperResConfig),
    "classifier_train": (TRAINING, ClassifierConfig),
    "classifier_sample": (DRAWING, Config),
}
# Released network → the scale of the README's command, its classifier, and other flags of that.
CLASSIFIED = {
    "64x64_diffusion": (1.0, "64x64_classifier", "--classifier_depth 4"),
    "128x128_diffusion": (0.5, "128x128_classifier", ""),
    "256x256_diffusion": (1.0, "256x256_classifier", ""),
    "256x256_diffusion_uncond": (10.0, "256x256_classifier", ""),
    "512x512_diffusion": (4.0, "512x512_classifier", ""),
}
HALF_STEM = {"scale_stem": True, "channel_mult": "0.5,1", "num_channels": 64}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


# --- the flag ---


def read_guided(original: str, *words: object) -> Config:
    """Return the settings that a command of guided-diffusion's script gives."""
    sections, kind = ORIGINALS[original]
    return load(["--family", "guided", *map(str, words)], description="", sections=sections, kind=kind)[0]


@cases("reference_configs", family="guided")
def test_flags_and_defaults_of_guided_diffusion(case: Case) -> None:
    """Every flag of its scripts is one of ours, and giving its default changes nothing."""
    found = case.expected["script_flag_defaults"]
    assert found.keys() == ORIGINALS.keys()
    del found["classifier_train"]["learn_sigma"]  # a classifier has no variances
    for original, defaults in found.items():
        unchanged = read_guided(original)
        for name, default in defaults.items():
            assert read_guided(original, f"--{name}", default) == unchanged, (original, name)


@cases("reference_configs", family="guided")
@pytest.mark.parametrize("name", CLASSIFIED)
def test_commands_with_a_classifier(case: Case, name: str) -> None:
    """Those of the README for classifier_sample.py, for its file of a model, without the models' own settings."""
    scale, guide, more = CLASSIFIED[name]
    drawing = "--batch_size 4 --num_samples 100 --timestep_respacing 250"
    classifier = f"--classifier_scale {scale} --classifier_path models/{guide}.pt {more}"
    model = flags(case.config["configs"][name]["flags"])
    config = read_guided("classifier_sample", *model, *classifier.split(), *drawing.split())
    assert (config.sample.classifier_scale, config.sample.guiding_classifier) == (scale, f"models/{guide}.pt")
    assert config.sample.precision == ("fp32" if name.startswith("512") else "fp16")
    settings = ClassifierSettings(**config.classifier.model_dump(), image_size=config.model.image_size)
    with torch.device("meta"):
        networks = {name: build_model(config.model), guide: build_network(settings)}
    for each, network in networks.items():
        assert {key: list(value.shape) for key, value in network.state_dict().items()} == case.shapes[each]


@cases("reference_configs", family="guided")
def test_commands_of_the_training_section(case: Case) -> None:
    """Those of the README for the classifier of 128 pixels, and for drawing with it by DDIM."""
    half = "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128"
    head = "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
    run = "--iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 --weight_decay 0.05"
    config = read_guided("classifier_train", *run.split(), *half.split(), *head.split())
    assert (config.train.last_step, config.train.lr_anneal_steps) == (300_000, 300_000)
    with torch.device("meta"):
        state = build_network(config.model).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes["128x128_classifier"]
    model = flags(case.config["configs"]["128x128_diffusion"]["flags"])
    guide = "--classifier_path models/classifier.pt --classifier_scale 1.0 --classifier_use_fp16 True"
    drawing = "--batch_size 4 --num_samples 50000 --timestep_respacing ddim25 --use_ddim True"
    words = (*model, *half.split(), *head.split(), *guide.split(), *drawing.split())
    config = read_guided("classifier_sample", *words, "--timestep_respacing", "ddim25")
    assert (config.sample.solver, config.sample.classifier_precision) == ("ddim", "fp16")
    assert config.diffusion.timestep_respacing == "ddim25"


@by_script
def test_defaults_of_both_families(script: str, tmp_path: Path) -> None:
    assert read(script, "--family", "improved") == read(script)
    guided = read(script, "--family", "guided")
    assert guided == read(script, "--config", json_file(tmp_path, {"family": "guided"}))
    for section, values in FAMILIES["guided"].items():
        for name, value in values.items():
            assert getattr(getattr(guided, section), name) == value
            assert getattr(getattr(read(script), section), name) != value


def test_the_family_is_the_lowest_layer(tmp_path: Path) -> None:
    """Flags, the JSON file and a checkpoint's own settings come before it, and the flag before the file's family."""
    file = json_file(tmp_path, {"family": "guided", "diffusion": {"rescale_timesteps": True}})
    config = read("train", "--config", file, "--random_flip", False)
    assert config.diffusion.rescale_timesteps
    assert not config.diffusion.rescale_learned_sigmas
    assert not config.data.random_flip
    assert read("train", "--config", file, "--family", "improved").data == read("train").data
    words = ("--model_path", save(unet(), tmp_path / "own.pt"))
    own, scored = read("nll", *words), read("nll", *words, "--family", "guided")
    assert (scored.model, scored.diffusion) == (own.model, own.diffusion)
    assert scored.data.random_flip


def test_evaluation_draws_with_the_family() -> None:
    sections = ("evaluate", "sample", "model", "diffusion")
    config = load(["--family", "guided"], description="", sections=sections, kind=EvaluateConfig)[0]
    assert not config.diffusion.rescale_timesteps


def test_sizes_of_guided_diffusion() -> None:
    """With its default widths of levels, which its tables give for these sizes."""
    for size, mult in {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}.items():
        assert read("train", "--family", "guided", "--image_size", size).model.level_mult == mult
    half = read("train", "--family", "guided", "--image_size", 512).model
    assert (half.level_mult[0], half.stem_channels) == (0.5, 64)
    enlarging = read("super_res_train", "--family", "guided", "--large_size", 512, "--small_size", 128).model
    assert (enlarging.level_mult, enlarging.stem_channels) == ((1, 1, 2, 2, 4, 4), 128)


@by_script
def test_a_family_that_is_none(script: str, tmp_path: Path) -> None:
    main = SCRIPTS[script][0]
    message = refusal(main, ["--family", "guidd"])
    assert message == "--family must be improved or guided, not 'guidd'; did you mean guided?"
    for family in (3, None, ["guided"], {"guided": True}):
        file = json_file(tmp_path, {"family": family})
        message = refusal(main, ["--config", str(file)])
        assert message.startswith(f"{file}: family must be improved or guided, not ")
    file = json_file(tmp_path, {"model": {"family": "guided"}})
    expected = f"{file}: model.family is not a setting; it stands beside the sections, at the top of the file"
    assert refusal(main, ["--config", str(file)]) == expected


# --- files without settings ---


@pytest.mark.parametrize("changes", [{"resblock_updown": True}, HALF_STEM])
def test_weights_of_guided_diffusion(changes: dict[str, Any], tmp_path: Path, warnings: Any) -> None:
    """They show the family, whose defaults are then taken, and a warning names what they don't show."""
    model = unet(**changes)
    file = save_bare(model, tmp_path / "bare.pt")
    words = ("--model_path", file, "--image_size", 8, "--noise_schedule", "cosine")
    config = read("nll", *words)
    assert config.model == model.settings
    assert config.diffusion == DiffusionSettings(
        noise_schedule="cosine", rescale_timesteps=False, rescale_learned_sigmas=False
    )
    assert not config.data.random_flip  # weights say nothing about the images
    assert [record.getMessage() for record in warnings.records] == [
        f"{file} carries no settings; taken at guided-diffusion's defaults, because its weights have features of that "
        "family (--family improved takes the other ones), give them if it was trained otherwise: num_heads or "
        "num_head_channels, diffusion_steps, rescale_timesteps, use_new_attention_order"
    ]
    assert not describe(open_checkpoint(str(file))).diffusion.rescale_timesteps
    assert read("sample", "--family", "improved", *words).diffusion.rescale_timesteps
    assert read("sample", "--rescale_timesteps", True, *words).diffusion.rescale_timesteps


def test_super_resolution_weights_of_guided_diffusion(tmp_path: Path, warnings: Any) -> None:
    model = super_res(resblock_updown=True)
    file = save_bare(model, tmp_path / "bare.pt")
    config = read("super_res_sample", "--model_path", file, "--large_size", 16, "--small_size", 8)
    assert config.model == model.settings
    assert not config.diffusion.rescale_timesteps
    assert read("super_res_train", "--init_from", file, "--large_size", 16, "--small_size", 8).model == model.settings


def test_weights_that_do_not_show_the_family(tmp_path: Path, warnings: Any) -> None:
    """A network without resampling blocks may be either's: the flag says whose defaults it has."""
    file = save_bare(unet(), tmp_path / "bare.pt")
    words = ("--model_path", file, "--image_size", 8)
    assert read("sample", *words).diffusion.rescale_timesteps
    assert "num_head_channels" not in warnings.records[-1].getMessage()
    assert not read("sample", "--family", "guided", *words).diffusion.rescale_timesteps
    assert warnings.records[-1].getMessage() == (
        f"{file} carries no settings; taken at guided-diffusion's defaults, give them if it was trained otherwise: "
        "num_heads or num_head_channels, diffusion_steps, noise_schedule, rescale_timesteps, use_new_attention_order"
    )
    read("sample", "--num_head_channels", 16, *words)
    assert "num_heads" not in warnings.records[-1].getMessage()
    read("sample", "--diffusion_steps", 1000, *words)
    assert "rescale_timesteps" not in warnings.records[-1].getMessage()


def test_own_settings_are_not_replaced(tmp_path: Path, warnings: Any) -> None:
    """A checkpoint of fastdiff may have such blocks and improved-diffusion's process."""
    config = read("nll", "--model_path", save(unet(resblock_updown=True), tmp_path / "own.pt"))
    assert config.diffusion.rescale_timesteps
    assert not config.data.random_flip
    assert not warnings.records


# --- presets ---


def test_presets_of_another_family(tmp_path: Path) -> None:
    """A preset is complete, so that a family that contradicts it is a mistake."""
    ending = "which is improved-diffusion's; leave family out"
    message = refusal(sample.main, ["--family", "guided", "--preset", "cifar10_uncond"])
    assert message == f"family guided contradicts the preset cifar10_uncond, {ending}"
    message = refusal(super_res_sample.main, ["--family", "improved", "--preset", "64_256_upsampler"])
    assert message == (
        "family improved contradicts the preset 64_256_upsampler, which is guided-diffusion's; leave family out"
    )
    file = save_bare(unet(), tmp_path / "cifar10_uncond_50M_500K.pt")
    for main in (sample.main, nll.main):
        message = refusal(main, ["--family", "guided", "--model_path", str(file)])
        assert message == f"--model_path: family guided contradicts the preset cifar10_uncond, {ending}"
    message = refusal(train.main, ["--family", "guided", "--init_from", str(file), "--data_dir", str(tmp_path)])
    assert message == f"--init_from: family guided contradicts the preset cifar10_uncond, {ending}"


@cases("reference_configs", family="guided")
def test_released_files_need_no_flags(case: Case, tmp_path: Path, warnings: Any) -> None:
    """A file under its released name has the settings that the README's flags give."""
    for name, spec in case.config["configs"].items():
        if "classifier" in name:
            continue
        preset = find_preset(name)
        script = "super_res_sample" if preset.kind == "super_res" else "sample"
        file = save_bare(super_res() if preset.kind == "super_res" else unet(), tmp_path / f"{name}.pt")
        by_name = read(script, "--model_path", file)
        assert warnings.records[-1].getMessage() == (
            f"{file} carries no settings; taken from the preset {name} by the file's name"
        )
        given = read(script, "--family", "guided", *flags(spec["flags"]))
        assert (by_name.model, by_name.diffusion) == (given.model, given.diffusion)


def network(name: str) -> Network:
    """The network of a preset, without memory."""
    preset = find_preset(name)
    settings = (SuperResSettings if preset.kind == "super_res" else UNetSettings)(**preset.model)
    with torch.device("meta"):
        model = build_model(settings)
    return Network(model, DiffusionSettings(**preset.diffusion), Path(f"{name}.pt"), "", [])


def test_cascades_of_released_files() -> None:
    assert check_fit(network("64x64_diffusion"), network("64_256_upsampler")) is None
    assert check_fit(network("128x128_diffusion"), network("128_512_upsampler")) is None
    assert check_fit(network("64x64_diffusion"), network("upsample_256")) is None
    for base, upsampler, message in (
        ("64x64_diffusion", "128_512_upsampler", "enlarges images of 128x128 pixels, the model draws 64x64"),
        ("imagenet64_uncond", "64_256_upsampler", "needs classes, which the model doesn't have"),
    ):
        with pytest.raises(UserError, match=message):
            check_fit(network(base), network(upsampler))


def test_flags_of_the_other_family(tmp_path: Path) -> None:
    """A file of one family and flags of the other: the message names the flags that fit."""
    file = save_bare(unet(resblock_updown=True), tmp_path / "guided.pt")
    improved = ["--image_size", "8", "--num_channels", "32", "--channel_mult", "1,2", "--num_res_blocks", "1"]
    message = refusal(sample.main, ["--model_path", str(file), *improved, "--resblock_updown", "False"])
    assert message == f"--model_path: {file} does not fit the model: it was trained with --resblock_updown True"
    file = save_bare(unet(), tmp_path / "improved.pt")
    message = refusal(sample.main, ["--model_path", str(file), *improved, "--family=guided", "--resblock_updown"])
    assert message == f"--model_path: {file} does not fit the model: it was trained with --resblock_updown False"
