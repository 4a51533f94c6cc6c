"""Each shipped configuration has the settings, parameters and shapes of the published one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.golden_cases import Case, cases

from fastdiff import super_res_train, train
from fastdiff.config.load import Config, SuperResConfig, load
from fastdiff.diffusion import create_diffusion
from fastdiff.errors import UserError
from fastdiff.models import build_model
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


def read(name: str) -> Config:
    content = json.loads((FOLDER / f"{name}.json").read_text())
    kind = SuperResConfig if "large_size" in content["model"] else Config
    return load(["--config", str(FOLDER / f"{name}.json")], description="", sections=SECTIONS, kind=kind)[0]


def test_every_file_is_checked() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*PUBLISHED, "demo"}


@cases("reference_configs", family="improved")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published(case: Case, name: str) -> None:
    reference, diffusion, training = PUBLISHED[name]
    config = read(name)
    defaults = type(config)()
    assert config.diffusion == defaults.diffusion.model_copy(update=diffusion)
    for key, value in training.items():
        assert getattr(config.train, key) == value
    for key in ("weight_decay", "lr_anneal_steps", "ema_rate"):
        assert getattr(config.train, key) == getattr(defaults.train, key)
    assert config.train.precision in ("bf16", "fp16")
    split_batch(config.train, 8)
    create_diffusion(config.diffusion, config.model.learn_sigma)
    with torch.device("meta"):
        model = build_model(config.model)
    if reference is None:  # the README's first example: 128 channels, 3 blocks, everything else at its default
        assert config.model == defaults.model.model_copy(update={"num_res_blocks": 3})
        return
    shapes = case.shapes[reference]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    expected = case.expected["configs"][reference]
    assert sum(p.numel() for p in model.parameters()) == expected["param_count"]
    flags = case.config["configs"][reference]["flags"]
    ours = {**config.model.model_dump(mode="json"), **config.diffusion.model_dump(mode="json")}
    differing = {k for k, v in flags.items() if k in ours and ours[k] != v}
    assert differing <= {"use_kl"}


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_starts_without_other_flags(name: str, tmp_path: Path) -> None:
    """Each configuration starts with no flag but --data_dir, up to reading the images."""
    script = super_res_train if "upsample" in name else train
    argv = ["--config", str(FOLDER / f"{name}.json"), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--data_dir is missing"):
        script.main(argv)
    with pytest.raises(UserError, match="does not exist|no such|missing"):
        script.main([*argv, "--data_dir", str(tmp_path / "nowhere")])
    assert not (tmp_path / "run").exists()
