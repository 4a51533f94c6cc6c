"""Each shipped configuration has the settings, parameters and shapes of the published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.golden_cases import Case, cases
from helpers.tiny import flags

from fastdiff import classifier_train, super_res_train, train
from fastdiff.config.load import default_name, load
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.diffusion import create_diffusion
from fastdiff.errors import UserError
from fastdiff.models import SuperResSettings, build_model, weights
from fastdiff.models.classifier import build_network
from fastdiff.training.microbatch import split_batch

FOLDER = ROOT / "configs"
SECTIONS = ("model", "diffusion", "data", "train")

COSINE = {"diffusion_steps": 4000, "noise_schedule": "cosine"}
UNSCALED = {"rescale_learned_sigmas": False, "rescale_timesteps": False}
# improved-diffusion's README: reference network, settings that differ from the defaults, and training settings.
PUBLISHED = {
    "imagenet64_uncond": ("imagenet64_uncond", COSINE, {"lr": 1e-4, "batch_size": 128}),
    "imagenet64_uncond_vlb": (
        "imagenet64_uncond",
        {**COSINE, "use_kl": True},
        {"lr": 1e-4, "batch_size": 128, "schedule_sampler": "loss-second-moment"},
    ),
    "cifar10_uncond": ("cifar10_uncond", COSINE, {"lr": 1e-4, "batch_size": 128}),
    "cifar10_uncond_vlb": (
        "cifar10_uncond",
        {**COSINE, "use_kl": True},
        {"lr": 1e-4, "batch_size": 128, "schedule_sampler": "loss-second-moment"},
    ),
    "imagenet64_270M": ("imagenet64_cond_270M", {**COSINE, **UNSCALED}, {"lr": 3e-4, "batch_size": 2048}),
    "upsample_256": ("upsample_cond", {"diffusion_steps": 4000, **UNSCALED}, {"lr": 3e-4, "batch_size": 256}),
    "lsun_bedroom_lr1e-4": ("lsun_bedroom", UNSCALED, {"lr": 1e-4, "batch_size": 128}),
    "lsun_bedroom_lr2e-5": ("lsun_bedroom", UNSCALED, {"lr": 2e-5, "batch_size": 128}),
    "baseline": (None, {"diffusion_steps": 4000}, {"lr": 1e-4, "batch_size": 128}),
}
# Training settings of guided-diffusion's networks (Dhariwal & Nichol 2021, tables 4, 11 and 13).
USUAL = {"lr": 1e-4, "batch_size": 256}
GUIDED: dict[str, dict[str, float]] = {
    "64x64_diffusion": {"lr": 3e-4, "batch_size": 2048, "max_steps": 540_000},
    "128x128_diffusion": {**USUAL, "max_steps": 4_360_000},
    "256x256_diffusion": {**USUAL, "max_steps": 1_980_000},
    "256x256_diffusion_uncond": {**USUAL, "max_steps": 2_000_000},
    "512x512_diffusion": {**USUAL, "max_steps": 1_940_000},
    "64_256_upsampler": {**USUAL, "max_steps": 500_000},
    "128_512_upsampler": {**USUAL, "max_steps": 1_050_000},
    "lsun_bedroom": {**USUAL, "max_steps": 500_000},
    "lsun_cat": {**USUAL, "max_steps": 200_000},
    "lsun_horse": {**USUAL, "max_steps": 250_000},
    "lsun_horse_nodropout": USUAL,  # the paper doesn't say for how long
}
# Table 12 of the same paper; that the learning rate falls is said in guided-diffusion's README, for 128 pixels.
CLASSIFIER = {"lr": 3e-4, "weight_decay": 0.05, "batch_size": 256, "max_steps": 300_000, "anneal_lr": True}
CLASSIFIERS: dict[str, dict[str, float]] = {
    "64x64_classifier": {**CLASSIFIER, "lr": 6e-4, "weight_decay": 0.2, "batch_size": 1024},
    "128x128_classifier": CLASSIFIER,
    "256x256_classifier": {**CLASSIFIER, "max_steps": 500_000},
    "512x512_classifier": {**CLASSIFIER, "max_steps": 500_000},
}


def read(name: str) -> Config:
    content = json.loads((FOLDER / f"{name}.json").read_text())
    kind = SuperResConfig if "large_size" in content["model"] else Config
    kind = ClassifierConfig if "classifier_depth" in content["model"] else kind
    return load(["--config", str(FOLDER / f"{name}.json")], description="", sections=SECTIONS, kind=kind)[0]


def test_every_file_is_checked() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*PUBLISHED, *GUIDED, *CLASSIFIERS, "demo"}


@cases("reference_configs", family="improved")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published(case: Case, name: str) -> None:
    reference, diffusion, training = PUBLISHED[name]
    config = read(name)
    defaults = type(config)()
    assert config.diffusion == defaults.diffusion.model_copy(update=diffusion)
    check_training(config, training)
    with torch.device("meta"):
        model = build_model(config.model)
    if reference is None:  # the README's first example: 128 channels, 3 blocks, everything else at its default
        assert config.model == defaults.model.model_copy(update={"num_res_blocks": 3})
        return
    shapes = case.shapes[reference]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    expected = case.expected["configs"][reference]
    assert sum(p.numel() for p in model.parameters()) == expected["param_count"]
    original = case.config["configs"][reference]["flags"]
    ours = {**config.model.model_dump(mode="json"), **config.diffusion.model_dump(mode="json")}
    differing = {k for k, v in original.items() if k in ours and ours[k] != v}
    assert differing <= {"use_kl"}


def check_training(config: Config, training: dict[str, Any]) -> None:
    """Assert that the training settings are the published ones, and possible on eight GPUs."""
    defaults = type(config)()
    for key, value in training.items():
        assert getattr(config.train, key) == value
    for key in ("weight_decay", "lr_anneal_steps", "ema_rate"):
        assert getattr(config.train, key) == getattr(defaults.train, key)
    assert config.train.precision in ("bf16", "fp16")
    split_batch(config.train, 8)
    create_diffusion(config.diffusion, config.model.learn_sigma)


@cases("reference_configs", family="guided")
@pytest.mark.parametrize("name", GUIDED)
def test_guided(case: Case, name: str) -> None:
    """The flags of guided-diffusion's README, with --family guided, give the same settings as the configuration."""
    config = read(name)
    check_training(config, GUIDED[name])
    words = ["--family", "guided", *flags(case.config["configs"][name]["flags"])]
    given = load(words, description="", sections=SECTIONS, kind=type(config))[0]
    assert config.model.level_mult == given.model.level_mult
    assert config.model == given.model
    assert config.diffusion == given.diffusion
    assert config.data == given.data
    with torch.device("meta"):
        state = build_model(config.model).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes[name]
    shown = weights.infer_settings(state, isinstance(config.model, SuperResSettings))
    assert tuple(shown.pop("channel_mult")) == config.model.level_mult
    assert tuple(shown.pop("attention_factors")) == config.model.attention_factors
    shown["scale_stem"] |= config.model.level_mult[0] == 1  # it makes no difference then
    shown.setdefault("num_classes", config.model.num_classes)
    assert shown == {key: getattr(config.model, key) for key in shown}


@cases("reference_configs", family="guided")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(case: Case, name: str) -> None:
    """guided-diffusion's flags for them give the configuration's network, which has the shapes of the original."""
    config = read(name)
    assert {key: getattr(config.train, key) for key in CLASSIFIER} == CLASSIFIERS[name]
    assert config.train.lr_anneal_steps == config.train.last_step
    assert (config.data.random_flip, config.data.random_crop) == (True, True)
    split_batch(config.train, 8)
    words = flags(case.config["configs"][name]["flags"])
    given = load(words, description="", sections=SECTIONS, kind=ClassifierConfig)[0]
    assert given.model == config.model
    assert given.diffusion.model_copy(update={"noise_schedule": config.diffusion.noise_schedule}) == config.diffusion
    with torch.device("meta"):
        state = build_network(config.model).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case.shapes[name]


def test_demo_is_small_and_conditional() -> None:
    config = read("demo")
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(config.model).parameters())
    assert count < 1e6
    assert config.model.class_cond
    assert config.model.learn_sigma
    assert config.model.null_class
    assert config.train.label_dropout
    assert config.model.num_classes == 10


@pytest.mark.parametrize("name", [*PUBLISHED, *GUIDED, *CLASSIFIERS])
def test_starts_without_other_flags(name: str, tmp_path: Path) -> None:
    """Each configuration starts with no flag but --data_dir, up to reading the images."""
    script = super_res_train if "upsample" in name else classifier_train if "classifier" in name else train
    argv = ["--config", str(FOLDER / f"{name}.json"), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--data_dir is missing"):
        script.main(argv)
    with pytest.raises(UserError, match="does not exist|no such|missing"):
        script.main([*argv, "--data_dir", str(tmp_path / "nowhere")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration is found from any folder, also beside a folder of its name, and its run has its name."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    kind = SuperResConfig if "upsample" in name else Config
    config, args, _ = load(["--config", name], description="", sections=SECTIONS, kind=kind)
    assert config == read(name)
    assert default_name(args.config, kind) == name


def test_a_file_of_that_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text('{"model": {"image_size": 32}}')
    monkeypatch.chdir(tmp_path)
    config = load(["--config", "demo"], description="", sections=SECTIONS)[0]
    assert config == Config.model_validate({"model": {"image_size": 32}})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "cifar10_uncnod",
            "cifar10_uncnod is neither a file nor the name of a configuration; did you mean cifar10_uncond",
        ),
        ("qqq", "qqq is neither a file nor the name of a configuration; there are .*baseline, .*upsample_256"),
        ("demo.json", r"demo.json: can't be read \(No such file"),
        ("configs/demo", "configs/demo: can't be read"),
        (
            "demo --config baseline",
            "--config is given twice, demo and baseline; put the settings of both into one file",
        ),
        ("demo baseline", "baseline belongs to no flag"),
    ],
)
def test_wrong_names(flags: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        load(["--config", *flags.split()], description="", sections=SECTIONS)
