"""Wrong input gets one sentence that names it and says what would be right, exit code 2, and no file is written."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import (
    DIFFUSION,
    MODEL,
    SUPER_RES,
    RunsCode,
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

from fastdiff import nll, sample, super_res_sample, super_res_train, train
from fastdiff.errors import UserError
from fastdiff.images.cache.build import pack
from fastdiff.images.labels import index_images
from fastdiff.models import weights
from fastdiff.sampling.settings import NllSettings
from fastdiff.training.checkpoints.format import adam_state_dict
from fastdiff.training.checkpoints.saver import write_checkpoint
from fastdiff.training.microbatch import split_batch
from fastdiff.training.settings import TrainSettings

SCRIPTS = Path(train.__file__).parent


class World:
    """A folder with pictures and checkpoints; `out` is where scripts would write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        pictures(self.images, ["cat_1", "cat_2", "dog_1", "dog_2"])
        self.model = save(unet(), folder / "model000001.pt")
        self.class_cond = save(unet(class_cond=True, num_classes=2), folder / "model000002.pt", ["cat", "dog"])
        self.super_res = save(super_res(), folder / "model000003.pt")
        self.base = folder / "base.npz"
        np.savez(self.base, pictures(folder / "small", ["a", "b"]))

    def train(self, *words: object, **settings: object) -> str:
        given = {"data_dir": self.images, "run_dir": "out", "loader": "pillow", **MODEL, **DIFFUSION, **settings}
        return refusal(train.main, [*flags(given), *words])

    def sample(self, *words: object, **settings: object) -> str:
        return refusal(sample.main, [*flags({"model_path": self.model, "out_dir": "out", **settings}), *words])

    def nll(self, *words: object, **settings: object) -> str:
        given = {"model_path": self.model, "data_dir": self.images, "loader": "pillow", "out_dir": "out", **settings}
        return refusal(nll.main, [*flags(given), *words])

    def super_res_sample(self, *words: object, **settings: object) -> str:
        given = {"model_path": self.super_res, "base_samples": self.base, "out_dir": "out", **settings}
        return refusal(super_res_sample.main, [*flags(given), *words])

    def json(self, content: Any, name: str = "settings.json") -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Make the world the working folder, and assert afterwards that no output folder was created."""
    monkeypatch.chdir(made.folder)
    yield made
    for folder in ("out", "runs", "file/out"):
        assert not (made.folder / folder).exists(), f"{folder} was written"


def says(message: str, *parts: str) -> None:
    """Assert that the message contains every part."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


# --- as a user sees it ---


@pytest.mark.parametrize(
    ("script", "words", "part"),
    [
        ("train", ["--batchsize", "4"], "did you mean --batch_size?"),
        ("sample", ["--model_path", "cut.pt"], "cut.pt"),
        ("nll", ["--model_path", "code.pt", "--data_dir", "images"], "it is refused"),
    ],
)
def test_one_line_and_exit_code_2(script: str, words: list[str], part: str, world: World) -> None:
    (world.folder / "cut.pt").write_bytes(world.model.read_bytes()[:5000])
    torch.save({"a": RunsCode(world.folder / "ran")}, world.folder / "code.pt")
    with nothing_written(world.folder):
        result = subprocess.run(
            [sys.executable, str(SCRIPTS / f"{script}.py"), *words],
            cwd=world.folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{script}.py: error: ")
    assert result.stderr.count("\n") == 1
    says(result.stderr, part)


# --- names ---


def test_misspelt_flag(world: World) -> None:
    says(world.sample("--num_sample", "3"), "--num_sample is not a flag", "did you mean --num_samples?")
    says(world.train("--learn-sigma", "True"), "--learn-sigma is not a flag", "did you mean --learn_sigma?")
    says(world.nll("--num_samples=3", "--frobnicate=1"), "--frobnicate is not a flag", "--help lists them")
    says(world.sample("model.pt"), "model.pt is not a flag")
    says(world.sample("--lr", "1"), "--lr is not a flag of this script")


def test_flag_without_a_value(world: World) -> None:
    says(world.sample("--num_samples"), "--num_samples", "expected one argument")


def test_misspelt_key(world: World) -> None:
    file = world.json({"train": {"batchsize": 4}})
    says(world.train("--config", file), f"{file}: train.batchsize is not a setting", "did you mean batch_size?")
    file = world.json({"model": {"dropuot": 0.1}})
    says(world.sample("--config", file), "model.dropuot", "did you mean dropout?")
    file = world.json({"nll": {"xyzzy": 1}})  # a section that the script doesn't use
    says(world.sample("--config", file), "nll.xyzzy is not a setting")


def test_wrong_section(world: World) -> None:
    says(world.train("--config", world.json({"models": {}})), "models is not a section", "did you mean model?")
    says(world.train("--config", world.json({"lr": 1e-4})), "lr is not a section", "belongs in section train")
    file = world.json({"model": {"weight_decay": 0.1}})
    says(world.train("--config", file), "model.weight_decay", "belongs in section train")
    says(world.train("--config", world.json({"train": 3})), "section train must be a JSON object")
    file = world.json({"deepspeed": []})
    says(world.train("--config", file), "section deepspeed must be a JSON object")
    file = world.json({"model": {"large_size": 64}})
    says(world.train("--config", file), "model.large_size", "super_res_train.py")
    says(world.super_res_sample("--config", world.json({"model": {"image_size": 64}})), "large_size and small_size")


def test_config_files(world: World) -> None:
    for words, name in ((["--config"], "missing.json"), (["--deepspeed"], "absent.json"), (["--config"], "images")):
        says(world.train(*words, name), f"{name}: can't be read", "JSON file")
    for content in ("", "{", "lr: 1", '{"train": {"lr": }}', "\x00"):
        says(world.train("--config", world.json(content)), "settings.json: is not JSON")
    (world.folder / "settings.json").write_bytes(b"\xff\xfe\x00")
    says(world.train("--config", "settings.json"), "settings.json: is not JSON")
    for content in ("[]", "[1, 2]", "3", "null", '"text"'):
        says(world.train("--config", world.json(content)), "settings.json: must be a JSON object")
        says(world.train("--deepspeed", world.json(content)), "settings.json: must be a JSON object")


# --- values ---

OUT_OF_RANGE = {
    "num_channels": ["0", "16", "-32", "33", "a", "32.5"],
    "num_res_blocks": ["0", "1.5"],
    "num_heads": ["0", "-1", "5"],
    "num_heads_upsample": ["0", "-2", "7"],
    "num_head_channels": ["0", "-2", "5"],
    "attention_resolutions": ["0", "-8", "16", "x", "4;8"],
    "channel_mult": ["0", "-1", "1.1", "a,b", "nan", "inf", "1,2,2,2,2"],
    "dropout": ["-0.1", "1", "nan", "x"],
    "learn_sigma": ["maybe", "2"],
    "num_classes": ["1", "0"],
    "null_class": ["maybe"],
    "in_channels": ["0", "-3", "2", "5"],
    "image_size": ["0", "-8", "7", "8x7", "x", "8x8x8"],
    "diffusion_steps": ["1", "0", "1e3"],
    "noise_schedule": ["square", "Cosine"],
    "min_snr_gamma": ["-1", "nan", "x"],
    "timestep_respacing": ["9", "0", "ddim5", "ddim", "ddim0", "x", "5,5", "1.5", "-1"],
    "loader": ["tensorflow"],
    "labels": ["suffix"],
    "cache": ["ram"],
    "num_workers": ["0"],
    "batch_size": ["0", "-4", "2.5"],
    "microbatch": ["0", "-2"],
    "lr": ["0", "-1e-4", "nan", "inf"],
    "weight_decay": ["-1", "nan"],
    "label_dropout": ["-0.1", "1", "nan", "x"],
    "lr_anneal_steps": ["-1"],
    "lr_warmup_steps": ["-1"],
    "max_steps": ["-1"],
    "grad_clip": ["-1"],
    "ema_rate": ["1", "-0.5", "0.9,0.9", "", "nan", "0.9;0.99"],
    "schedule_sampler": ["importance"],
    "precision": ["fp8", "float32"],
    "fp16_scale_growth": ["0", "2"],
    "zero_stage": ["4", "-1", "x"],
    "seed": ["-1", str(2**32), "x"],
    "log_interval": ["0"],
    "save_interval": ["0"],
    "sample_interval": ["-1"],
    "sample_count": ["0"],
    "eval_interval": ["-1"],
    "eval_samples": ["9", "many"],
    "eval_metrics": ["fad", ""],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_out_of_range_in_training(name: str, world: World) -> None:
    for value in OUT_OF_RANGE[name]:
        message = world.train(f"--{name}={value}")
        says(message, name)
        shown = re.findall(r"[\w.]+", value) or ["empty"]
        assert any(word in message for word in shown), message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_samples", ["0", "-1", "x"]),
        ("batch_size", ["0", "-1", "2.5", "many"]),
        ("seed", ["-1"]),
        ("preset", ["cifar10", "demo"]),
        ("solver", ["euler", "DDIM"]),
        ("steps", ["-1", "2.5", "x"]),
        ("spacing", ["linear"]),
        ("sigma_max", ["0", "-1", "nan", "x"]),
        ("use_ddim", ["perhaps"]),
        ("use_fp16", ["perhaps"]),
        ("eta", ["-0.1", "1.1", "nan"]),
        ("guidance", ["-1", "nan", "x"]),
        ("guidance_interval", ["1", "5,1", "-1,2", "1,2,3", "low,high"]),
        ("compile", ["perhaps"]),
        ("cuda_graph", ["perhaps"]),
        ("kernels", ["cuda"]),
        ("overwrite", ["perhaps"]),
        ("save_as", ["jpg", "npz,jpg"]),
        ("grid_images", ["-1"]),
        ("trajectory", ["-1", "x"]),
        ("precision", ["fp64"]),
        ("clip_denoised", ["perhaps"]),
    ],
)
def test_out_of_range_in_sampling(name: str, values: list[str], world: World) -> None:
    for value in values:
        shown = re.split(r"[,.]", value)[0]
        says(world.sample(f"--{name}={value}"), f"--{name}", shown)
        says(world.super_res_sample(f"--{name}={value}"), f"--{name}", shown)
        if name in NllSettings.model_fields:
            says(world.nll(f"--{name}={value}"), f"--{name}", shown)


@pytest.mark.parametrize(
    ("name", "values"), [("sr_steps", ["-1", "x"]), ("sr_batch_size", ["0", "many"]), ("sr_preset", ["cifar10_uncond"])]
)
def test_out_of_range_in_a_cascade(name: str, values: list[str], world: World) -> None:
    for value in values:
        says(world.sample(f"--{name}={value}", sr_model_path=world.super_res), f"--{name}", value)


def test_sampling_settings_that_contradict(world: World) -> None:
    """Two settings, each valid alone, contradict each other."""
    says(world.sample(use_ddim=True, solver="unipc"), "--use_ddim True contradicts solver unipc")
    says(world.sample(eta=0.5), "eta 0.5", "solver ddim")
    says(world.sample(eta=0.5, solver="heun"), "eta 0.5", "solver ddim", "heun has no eta")
    says(world.sample(guidance_interval="0.2,5"), "guidance_interval needs a guidance other than 1")
    says(world.sample(guide_model_path=world.model), "guide_model_path needs a guidance other than 1")
    for name, value in {"sr_steps": 5, "sr_timestep_respacing": "3"}.items():
        says(world.sample(**{name: value}), name, "enlarging", "sr_model_path")


def test_the_same_in_json_names_file_and_key(world: World) -> None:
    file = world.json({"train": {"lr": -1}})
    says(world.train("--config", file), f"{file}: train.lr", "greater than 0", "-1")
    file = world.json({"train": {"ema_rate": [0.9, 2]}})
    says(world.train("--config", file), f"{file}: train.ema_rate")
    file = world.json({"train": {"lr": None}})
    says(world.train("--config", file), f"{file}: train.lr", "None")
    file = world.json('{"train": {"lr": NaN}}')
    says(world.train("--config", file), f"{file}: train.lr", "nan")


def test_network_that_cannot_be(world: World) -> None:
    """Two settings, each valid alone, describe no network."""
    says(world.train(image_size=12, channel_mult="1,2,2,2"), "image_size 12x12", "divisible by 8", "4 levels")
    says(world.train(image_size="8x12", channel_mult="1,1,1,1"), "image_size 8x12", "divisible by 8")
    says(world.train(num_channels=48), "num_channels 48", "32 groups", "nearest is 64")
    says(world.train(channel_mult="1,1.5"), "channel_mult 1.5 x num_channels 32", "32 groups")
    says(world.train(num_heads=3), "num_heads 3", "64 channels")
    says(world.train(num_heads_upsample=3), "num_heads_upsample 3", "64 channels")
    says(world.train(num_head_channels=24), "num_head_channels 24", "64 channels")
    says(world.train(attention_resolutions=16), "attention_resolutions 16", "image size 8")
    message = refusal(sample.main, ["--image_size", "48", "--model_path", ""])
    says(message, "channel_mult has no default for images of 48 pixels", "32, 64, 128, 256")
    message = refusal(super_res_train.main, flags({"data_dir": "nowhere", **SUPER_RES}))
    says(message, "nowhere does not exist")
    for small in (16, 32, "8x16"):
        given = {**SUPER_RES, "small_size": small, "data_dir": world.images}
        says(refusal(super_res_train.main, flags(given)), "small_size", "smaller than large_size 16x16")


def test_another_size_than_the_checkpoints(world: World) -> None:
    """The advice is to leave it out, not to move the attention: the user only wanted a larger picture."""
    says(world.sample(image_size=16), "--image_size 16: ", "trained with image_size 8, so leave it out")
    says(world.sample(image_size="8x16"), "--image_size 8x16: ", "image_size 8")
    says(world.nll(image_size=16), "--image_size 16: ", "trained with image_size 8")
    says(world.super_res_sample(large_size=32), "--large_size 32: ", "trained with large_size 16")
    says(world.super_res_sample(small_size=4), "--small_size 4: ", "trained with small_size 8")
    file = world.json({"model": {"image_size": 16}})
    says(world.sample("--config", file), f"{file}: model.image_size 16: ")


def test_respacing_that_cannot_be(world: World) -> None:
    says(world.sample(timestep_respacing="ddim5"), "timestep_respacing ddim5", "6 steps", "ddim6 would work")
    says(world.sample(timestep_respacing="9"), "timestep_respacing 9", "6 steps, fewer than 9")
    says(world.sample(timestep_respacing="quick"), "--timestep_respacing 'quick'", "ddim50")
    file = world.json({"diffusion": {"timestep_respacing": "quick"}})
    says(world.sample("--config", file), f"{file}", "timestep_respacing 'quick'")
    says(world.nll(timestep_respacing="ddim5"), "--timestep_respacing ddim5", "ddim6 would work")
    says(world.super_res_sample(timestep_respacing="1.5"), "--timestep_respacing '1.5'")
    says(world.sample(noise_schedule="linear"), "diffusion_steps 6", "at least 21", "cosine")
    says(world.train(sample_interval=5, sample_respacing="ddim5"), "--sample_respacing", "ddim6 would work")
    says(world.train(sample_interval=5), "--sample_respacing", "ddim25")


def test_batch_that_cannot_be_shared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="batch_size 10 .* shared by 4; 8 can"):
        split_batch(TrainSettings(batch_size=10), 4)
    with pytest.raises(UserError, match="batch_size 1 .* shared by 8; 8 can"):
        split_batch(TrainSettings(batch_size=1), 8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    says(world.train(batch_size=4), "batch_size 4", "shared by 3", "3 can")


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **section}}


@pytest.mark.parametrize(
    ("section", "settings", "parts"),
    [
        ({"train_batch_size": 8}, {"batch_size": 4}, ["train_batch_size 8 contradicts", "batch_size 4"]),
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"microbatch": 4},
            ["train_micro_batch_size_per_gpu 2", "microbatch 4"],
        ),
        (
            {"gradient_accumulation_steps": 3},
            {"batch_size": 4},
            ["gradient_accumulation_steps 3 contradicts batch_size 4", "1 processes"],
        ),
        ({"gradient_accumulation_steps": "x"}, {}, ["gradient_accumulation_steps x"]),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ["fp16.enabled", "precision bf16"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, ["fp16", "bf16", "both"]),
        ({"bf16": {"enabled": True}}, {"use_fp16": True}, ["bf16", "fp16"]),
        ({"fp16": True}, {}, ["deepspeed.fp16 must be a JSON object", "True"]),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 1}, ["zero_optimization.stage 2", "zero_stage 1"]),
        ({"zero_optimization": {"stage": 7}}, {}, ["zero_optimization.stage", "7"]),
        ({"zero_optimization": 2}, {}, ["zero_optimization must be a JSON object"]),
        ({"gradient_clipping": 1.0}, {"grad_clip": 0.5}, ["gradient_clipping 1.0", "grad_clip 0.5"]),
        ({"train_batch_size": "many"}, {}, ["deepspeed.train_batch_size", "many"]),
        ({"optimizer": {"type": "Adam"}}, {}, ["deepspeed.optimizer", "AdamW", "train.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["deepspeed.scheduler", "lr_warmup_steps"]),
        ({"amp": {"enabled": True}}, {}, ["deepspeed.amp", "train.precision"]),
        ({"zero_force_ds_cpu_optimizer": True}, {}, ["deepspeed.zero_force_ds_cpu_optimizer true", "leave it out"]),
        ({"zero_allow_untested_optimizer": False}, {}, ["zero_allow_untested_optimizer false", "leave it out"]),
        (zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/x"}), {}, ["device nvme is not possible; cpu is"]),
        (zero(3, offload_param={"device": "nvme"}), {}, ["zero_optimization.offload_param.device nvme"]),
        (zero(0, offload_optimizer={"device": "cpu"}), {}, ["offload_optimizer needs", "stage 1 or 2 or 3, not 0"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, ["stage 1 or 2 or 3, not 0"]),
        (zero(2, offload_param={"device": "cpu"}), {}, ["offload_param needs zero_optimization.stage 3, not 2"]),
        (zero(2, offload_optimizer="cpu"), {}, ["offload_optimizer must be a JSON object", "'cpu'"]),
        (zero(2, cpu_offload=True), {}, ["cpu_offload has another name now", '"offload_optimizer": {"device": "cpu"}']),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_deepspeed_that_contradicts(section: dict, settings: dict, parts: list[str], world: World) -> None:
    says(world.train("--config", world.json({"deepspeed": section}), **settings), *parts)
    says(world.train("--deepspeed", world.json(section), **settings), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_on_a_cpu(world: World) -> None:
    for message in (
        world.train(precision="fp16"),
        world.train("--use_fp16"),
        world.train("--config", world.json({"deepspeed": {"fp16": {"enabled": True}}})),
        world.sample(precision="fp16"),
        world.sample("--use_fp16", "True"),
        world.super_res_sample("--use_fp16", "True"),
        world.nll(use_fp16=True),
    ):
        says(message, "--precision fp16 needs a GPU", "bf16 or fp32")


# --- images ---


def test_data_folders(world: World) -> None:
    (world.folder / "empty").mkdir(exist_ok=True)
    (world.folder / "text").mkdir(exist_ok=True)
    (world.folder / "text" / "notes.txt").write_text("no picture")
    (world.folder / "file").write_text("")
    for call in (world.train, world.nll):
        says(call(data_dir=""), "--data_dir is missing")
        says(call(data_dir="nowhere"), "nowhere does not exist")
        says(call(data_dir="empty"), "empty is empty", "png")
        says(call(data_dir="text"), "text holds no images", "png")
        says(call(data_dir="file"), "file is not a folder")


def test_classes_of_a_folder(world: World) -> None:
    one = world.folder / "one_class"
    pictures(one, ["cat_1", "cat_2"])
    message = world.train(data_dir=one, class_cond=True)
    says(message, "--class_cond", "one class only (cat)", "class folders")
    three = world.folder / "three_classes"
    pictures(three, ["ape_1", "cat_1", "dog_1"])
    message = world.train(data_dir=three, class_cond=True, num_classes=2)
    says(message, "--num_classes 2", "3 classes (labels: from prefixes: ape 1, cat 1, dog 1)", "--num_classes 3")
    says(world.nll(data_dir=three, model_path=world.class_cond), "class 'ape'", "cat, dog")
    nameless = save(unet(class_cond=True, num_classes=2), world.folder / "model000009.pt")
    says(world.nll(data_dir=three, model_path=nameless), "--data_dir", "3 classes (ape 1, cat 1, dog 1), the model 2")


def test_caches(world: World) -> None:
    for call in (world.train, world.nll):
        says(call(cache_dir="there"), "--cache_dir there needs --cache disk or --cache gpu")
        says(call(cache="disk", loader="dali"), "--loader dali contradicts decoded images", "--cache none")
    (world.folder / "file").write_text("")
    says(
        world.train(cache="disk", cache_dir="file/deep"), "--cache_dir: file/deep can't be written to", "another folder"
    )
    packed = world.folder / "packed"
    pack(index_images(world.images), (16, 16), 1, packed, workers=1)
    for call in (world.train, world.nll):
        says(call(data_dir=packed), "packed holds images of 16x16 pixels in 1 channel, 8x8 pix", "--channels 3")
        says(call(cache="disk", cache_dir=packed), "packed is a packed folder itself", "as --data_dir")
    (packed / "pixels.npy").write_bytes(b"")
    says(
        world.train(data_dir=packed, in_channels=1, image_size=16, attention_resolutions=8),
        "packed are damaged (pixels.npy",
        "pack them again",
    )


# --- checkpoints ---


def checkpoint_users(world: World) -> list[Any]:
    """Return a function file → message for each script that reads a checkpoint."""
    return [
        lambda file: world.sample(model_path=file),
        lambda file: world.nll(model_path=file),
        lambda file: world.super_res_sample(model_path=file),
        lambda file: world.train(resume_checkpoint=file),
    ]


def test_missing_checkpoint(world: World) -> None:
    for call in checkpoint_users(world):
        says(call("nowhere.pt"), "nowhere.pt does not exist")
        says(call("images"), "images holds no")
    for call in (world.sample, world.nll, world.super_res_sample):
        says(call(model_path=""), "--model_path is missing")


def test_damaged_checkpoint(world: World) -> None:
    """A file that is truncated anywhere, or is no checkpoint at all, is named."""
    whole = world.model.read_bytes()
    file = world.folder / "damaged.pt"
    for size in (0, 1, 4, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 10, len(whole) - 1):
        file.write_bytes(whole[:size])
        for call in checkpoint_users(world)[:: 3 if size > 1000 else 1]:
            message = call(file)
            says(message, str(file), "is not a checkpoint")
            assert re.match("--(model_path|resume_checkpoint): ", message)
    for content in (b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(1000), json.dumps(MODEL).encode()):
        file.write_bytes(content)
        says(world.sample(model_path=file), str(file))


def test_checkpoint_of_something_else(world: World) -> None:
    file = world.folder / "other.pt"
    contents: list[Any] = [[1, 2], {}, 3, {"step": 1}, {"state": {}, "param_groups": []}, torch.zeros(3), None]
    for content in contents:
        torch.save(content, file)
        for call in checkpoint_users(world):
            says(call(file), str(file), "holds no state_dict")
    model = unet().state_dict()
    strangers = [
        {"weight": torch.zeros(3)},
        {"out.2.weight": torch.zeros(3, 3)},
        {name: value for name, value in model.items() if "input_blocks.1" not in name},
        {name: value for name, value in model.items() if "time_embed.0" not in name},
        {name: value.flatten() for name, value in model.items()},
        {name: value[:0] for name, value in model.items()},
        {**model, "time_embed.0.weight": torch.zeros(7, 32)},
        {**model, "one.more.weight": torch.zeros(1)},
    ]
    for state in strangers:
        torch.save(dict(state), file)
        for call in checkpoint_users(world)[::3]:
            says(call(file), str(file))


DIFFERENCES = {
    "num_channels": ("64", "--num_channels 64"),
    "num_res_blocks": ("2", "--num_res_blocks 2"),
    "channel_mult": ("1,3", "--channel_mult 1,3"),
    "learn_sigma": ("True", "--learn_sigma True"),
    "class_cond": ("True", "--class_cond True"),
    "use_scale_shift_norm": ("False", "--use_scale_shift_norm False"),
    "attention_resolutions": ("8,4", "--attention_resolutions 8,4"),
    "in_channels": ("1", "--in_channels 1"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("bare", [False, True], ids=["", "bare"])
def test_checkpoint_of_another_shape(name: str, bare: bool, world: World) -> None:
    """When flags contradict the checkpoint, the message says which would fit."""
    value, hint = DIFFERENCES[name]
    model = unet(**{name: value})
    file = world.folder / "shape.pt"
    save_bare(model, file) if bare else save(model, file)
    own = {**MODEL, "use_scale_shift_norm": True, "learn_sigma": False, "class_cond": False, "in_channels": 3}
    words = flags({**own, **DIFFUSION})
    for message in (world.sample(*words, model_path=file), world.train(resume_checkpoint=file, **own)):
        says(message, str(file), "does not fit the model", hint)
    reverse = world.sample(*words, f"--{name}", value)  # the usual model with the other one's flags
    says(reverse, str(world.model), "does not fit", f"--{name} {own[name]}")


def test_checkpoint_with_fewer_levels_of_attention(world: World) -> None:
    says(world.sample(attention_resolutions=""), "--attention_resolutions 4")
    none = save(unet(attention_resolutions=""), world.folder / "none.pt")
    says(world.sample(model_path=none, attention_resolutions=4), "--attention_resolutions ''")


def test_number_of_classes(world: World) -> None:
    says(world.sample(model_path=world.class_cond, num_classes=5), "--num_classes 2")
    message = world.train(resume_checkpoint=world.class_cond, class_cond=True, num_classes=5)
    says(message, "--resume_checkpoint", "--num_classes 2")


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_super_resolution_or_not(learn_sigma: bool, world: World) -> None:
    plain = unet(learn_sigma=learn_sigma)
    enlarger = super_res(learn_sigma=learn_sigma)
    file = world.folder / "kind.pt"
    for write in (save, save_bare):
        write(enlarger, file)
        for call in (lambda f: world.sample(model_path=f), lambda f: world.train(resume_checkpoint=f)):
            says(call(file), str(file), "super_res_sample.py")
        write(plain, file)
        says(world.super_res_sample(model_path=file), str(file), "sample.py and nll.py")


def test_checkpoint_that_would_run_code(world: World) -> None:
    """The code is not executed, whether as a plain pickle or in torch's format, beside tensors or alone."""
    marker = world.folder / "ran"
    file = world.folder / "code.pt"
    state: dict[str, Any] = {**unet().state_dict(), "payload": RunsCode(marker)}
    for content in (RunsCode(marker), state):
        for write in (lambda c: torch.save(c, file), lambda c: file.write_bytes(pickle.dumps(c))):
            write(content)
            for call in checkpoint_users(world):
                message = call(file)
                says(message, str(file))
                assert "refused" in message or "not a checkpoint" in message
                assert not marker.exists()
    torch.save(state, file)
    says(world.sample(model_path=file), "would run code", "it is refused")


def run_folder(world: World, name: str) -> Path:
    """Write a run that could be resumed, and return its step folder."""
    model = unet()
    names = [name for name, _ in model.named_parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {key: torch.zeros_like(state[key]) for key in names}
    files = {
        "model000002.pt": weights.with_info(state, info_for(model)),
        "ema_0.9999_000002.pt": weights.with_info(state, info_for(model)),
        "opt000002.pt": adam_state_dict(moments, moments, 2, {"lr": 1e-4}),
        "state.pt": {"step": 2, "updates": 2},
    }
    return write_checkpoint(world.folder / name / "checkpoints", 2, files.items())


@pytest.mark.parametrize("file", ["model000002.pt", "ema_0.9999_000002.pt", "opt000002.pt", "state.pt"])
def test_resume_from_files_that_would_run_code(file: str, world: World) -> None:
    step = run_folder(world, f"run_{file}")
    (step / "manifest.json").unlink()  # it would reveal that the file was changed
    marker = world.folder / "ran"
    torch.save({"state": RunsCode(marker)}, step / file)
    run = step.parent.parent
    with nothing_written(run):
        says(world.train(run_dir=run), "--run_dir", file, "would run code")
        says(world.train(resume_checkpoint=step), "--resume_checkpoint", file, "would run code")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["model000002.pt", "ema_0.9999_000002.pt", "opt000002.pt", "state.pt"])
def test_resume_from_truncated_files(file: str, world: World) -> None:
    step = run_folder(world, f"cut_{file}")
    run = step.parent.parent
    whole = (step / file).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (step / file).write_bytes(whole[:size])
        with nothing_written(run):
            says(world.train(run_dir=run), "--run_dir", "none of the 1 checkpoints", file, f"has {size} bytes")
            says(world.train(resume_checkpoint=step), "--resume_checkpoint", file, "is damaged")
    (step / "manifest.json").unlink()
    with nothing_written(run):
        says(world.train(run_dir=run), "--run_dir", file, "is not a checkpoint")


def test_resume_with_another_network(world: World) -> None:
    step = run_folder(world, "another")
    run = step.parent.parent
    with nothing_written(run):
        says(world.train(run_dir=run, num_channels=64), "--run_dir", "--num_channels 32")
    (run / "config.json").write_text(json.dumps({"kind": "unet", "model": {"dropout": 0.5}}))
    with nothing_written(run):
        says(world.train(run_dir=run), "model.dropout 0.5", "now it is 0.0", "another --run_dir")


# --- sampling ---


def test_classes(world: World) -> None:
    says(world.sample(classes="0"), "--classes", "not class-conditional")
    says(world.super_res_sample(classes="0"), "--classes: the model is not class-conditional")
    for word in ("zebra", "2", "-1", "1.5", "²"):
        message = world.sample(model_path=world.class_cond, classes=f"cat,{word}")
        says(message, f"--classes: {word} is not a class", "0 to 1", "cat, dog")
    roomy = save(unet(class_cond=True, num_classes=100), world.folder / "roomy.pt", ["cat", "dog"])
    says(world.sample(model_path=roomy, classes="2"), "2 is not a class", "0 to 1")


def test_base_samples(world: World) -> None:
    def message(**arrays: Any) -> str:
        np.savez(world.folder / "bad.npz", **arrays)
        return world.super_res_sample(base_samples="bad.npz")

    good = np.zeros((2, 8, 8, 3), np.uint8)
    says(world.super_res_sample(base_samples=""), "--base_samples is missing", ".npz")
    says(world.super_res_sample(base_samples="nowhere.npz"), "nowhere.npz does not exist")
    says(message(images=good), "--base_samples: bad.npz has no arr_0", "sample.py")
    for array in (good[:, :4], good[..., :1], good[0], good[:0], good.transpose(0, 3, 1, 2), good.astype(np.float32)):
        says(message(arr_0=array), "bad.npz", str(list(array.shape)), "uint8 [N, 8, 8, 3]")
    says(message(arr_0=np.array([{}], dtype=object)), "bad.npz is not an .npz of arrays")
    says(message(arr_0=good, arr_1=np.zeros(3, np.int64)), "arr_1 of bad.npz", "2 images")
    says(message(arr_0=good, arr_1=np.zeros(2)), "arr_1 of bad.npz", "float64", "whole numbers")
    np.save(world.folder / "bad.npy", good)
    says(world.super_res_sample(base_samples="bad.npy"), "bad.npy has no arr_0")
    whole = world.base.read_bytes()
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:200] + b"?" * 50 + whole[250:]):
        (world.folder / "bad.npz").write_bytes(content)
        says(world.super_res_sample(base_samples="bad.npz"), "bad.npz is not an .npz of arrays, or is damaged")
    bare = world.folder / "no_pictures"
    bare.mkdir()
    (bare / "notes.txt").write_text("no picture")
    says(world.super_res_sample(base_samples=bare), "holds no images")


def test_base_samples_of_a_class_conditional_model(world: World) -> None:
    model = save(super_res(class_cond=True, num_classes=2), world.folder / "labelled.pt", ["cat", "dog"])
    says(world.super_res_sample(model_path=model), "base.npz has no labels (arr_1)")
    for label in (2, -1):
        np.savez(world.folder / "labels.npz", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, label]))
        message = world.super_res_sample(model_path=model, base_samples="labels.npz")
        says(message, f"labels.npz has label {label}", "0 to 1")
    says(world.super_res_sample(model_path=model, base_samples="small"), "nothing in small says", "--classes: cat, dog")


def test_unwritable_output(world: World) -> None:
    """Nothing can be written below a regular file, not even by root."""
    (world.folder / "file").write_text("")
    for message, flag in (
        (world.sample(out_dir="file/out"), "--out_dir"),
        (world.sample(out_dir="file"), "--out_dir"),
        (world.nll(out_dir="file/out"), "--out_dir"),
        (world.super_res_sample(out_dir="file/out"), "--out_dir"),
        (world.train(run_dir="file/out"), "--run_dir"),
        (world.train(run_dir="file"), "--run_dir"),
    ):
        says(message, flag, "file", "can't be written to", "name another folder")


def test_output_that_the_file_system_refuses_to_look_for(world: World) -> None:
    says(world.sample(out_dir="x" * 300), "--out_dir: x", "File name too long")


def test_unwritable_logdir(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.folder / "file").write_text("")
    monkeypatch.setenv("OPENAI_LOGDIR", "file/out")
    says(world.sample(out_dir=""), "file/out can't be written to")
    says(world.train(run_dir=""), "file/out can't be written to")
