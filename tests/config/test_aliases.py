"""Words of other programs lead to the flag, JSON key or argument that is meant, if there is one."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.preparation_scripts import fail
from helpers.tiny import refusal, save, unet

import fastdiff
from fastdiff import classifier_train, evaluate, nll, sample, super_res_sample, super_res_train, train
from fastdiff.config.aliases import _TABLE
from fastdiff.config.sections import ClassifierConfig, Config, EvaluateConfig, SuperResConfig
from fastdiff.errors import UserError

MAIN: dict[str, Any] = {
    "train": train.main,
    "super_res_train": super_res_train.main,
    "classifier_train": classifier_train.main,
    "sample": sample.main,
    "super_res_sample": super_res_sample.main,
    "nll": nll.main,
    "evaluate": evaluate.main,
}
OTHERS = {"source", "lmdb", "archive", "workers", "size", "out", "n", "config", "deepspeed", "dry_run", "init_from"}


def flags_of(script: str) -> set[str]:
    kinds = {"super_res_train": SuperResConfig, "super_res_sample": SuperResConfig, "evaluate": EvaluateConfig}
    kind = {**kinds, "classifier_train": ClassifierConfig}.get(script, Config)
    own = {
        "train": ("data", "train"),
        "sample": ("sample",),
        "nll": ("data", "nll"),
        "evaluate": ("sample", "evaluate"),
    }[script.split("_")[-1]]
    sections = [kind.model_fields[name].annotation for name in ("model", "diffusion", *own)]
    found = {name for section in sections for name in section.model_fields}  # type: ignore[union-attr]
    return found | {"config", "print_config"} | ({"deepspeed", "dry_run"} if "train" in script else {"out", "grid"})


@pytest.mark.parametrize(
    ("script", "word", "end"),
    [
        ("train", "--learning_rate", "did you mean --lr?"),
        ("train", "--learning-rate", "did you mean --lr?"),
        ("train", "--LR", "did you mean --lr?"),
        ("train", "--batch-size", "did you mean --batch_size?"),
        ("train", "--num_epochs", "a run is counted in steps: give --max_steps = epochs x images / --batch_size"),
        ("train", "--epochs=3", "a run is counted in steps: give --max_steps = epochs x images / --batch_size"),
        ("train", "--num_train_epochs", "a run is counted in steps: give --max_steps = epochs x images / --batch_size"),
        ("train", "--max_train_steps", "did you mean --max_steps?"),
        ("train", "--resolution", "did you mean --image_size?"),
        ("super_res_train", "--resolution", "did you mean --large_size, with --small_size for the images that go in?"),
        ("sample", "--resolution", "the images have the checkpoint's size: leave it out, for --model_path says it"),
        ("train", "--output_dir", "did you mean --run_dir?"),
        ("sample", "--output-dir", "did you mean --out_dir?"),
        ("nll", "--outdir", "did you mean --out_dir?"),
        ("train", "--data", "did you mean --data_dir?"),
        ("train", "--train_data_dir", "did you mean --data_dir?"),
        ("nll", "--dataset", "did you mean --data_dir?"),
        ("super_res_sample", "--data", "did you mean --base_samples?"),
        ("sample", "--data", "--help lists them"),
        ("train", "--checkpointing_steps", "did you mean --save_interval? It counts steps, or minutes as in 30min"),
        ("sample", "--checkpointing_steps", "--help lists them"),
        ("train", "--mixed_precision", "did you mean --precision: fp32 (for no), bf16 or fp16?"),
        ("sample", "--fp16", "did you mean --precision fp16?"),
        ("nll", "--bf16", "did you mean --precision bf16?"),
        ("train", "--ema_decay", "did you mean --ema_rate? It takes several as well, such as 0.9999,0.999"),
        ("train", "--use_ema", "averages of the weights are always kept: leave it out; --ema_rate is their decay"),
        ("sample", "--batch", "did you mean --batch_size?"),
        ("train", "--resume_from_checkpoint", "the same --run_dir resumes by itself; --resume_checkpoint starts"),
        ("sample", "--resume", "the same command goes on in the same --out_dir: leave it out"),
        ("sample", "--ckpt", "did you mean --model_path?"),
        ("sample", "--network", "did you mean --model_path?"),
        ("nll", "--checkpoint", "did you mean --model_path?"),
        ("train", "--gradient_accumulation_steps", "gradients are accumulated where --microbatch is smaller"),
        ("train", "--lr_scheduler", "the learning rate is constant; --lr_anneal_steps lets it fall"),
        ("sample", "--scheduler", "did you mean --solver?"),
        ("train", "--lr_warmup", "did you mean --lr_warmup_steps?"),
        (
            "sample",
            "--guidance_scale",
            "did you mean --guidance? 1 means none; add 1 to a weight for which 0 means none",
        ),
        ("sample", "--cfg", "did you mean --guidance? 1 means none"),
        ("train", "--cfg", "did you mean --config?"),
        ("sample", "--num_inference_steps", "did you mean --steps, with a --solver?"),
        ("train", "--num_inference_steps", "grids of samples take --sample_respacing, such as ddim25"),
        ("sample", "--n_samples", "did you mean --num_samples?"),
        ("train", "--cond", "did you mean --class_cond True?"),
        ("train", "--workers", "did you mean --num_workers?"),
        ("train", "-j", "did you mean --num_workers?"),
        ("train", "--random_seed", "did you mean --seed?"),
        ("train", "--gpus", "the launcher says where to run: "),
        ("sample", "--device", "a GPU is used where there is one: leave it out"),
        ("train", "--augment", "images can be mirrored and cropped at random: give --random_flip True or"),
        ("classifier_train", "--num_channels", "did you mean --classifier_width?"),
        ("classifier_train", "--attention_resolutions", "did you mean --classifier_attention_resolutions?"),
        ("train", "--lr_decay", "the learning rate is constant; --lr_anneal_steps lets it fall"),
        ("train", "--max_grad_norm", "did you mean --grad_clip?"),
        ("train", "--no_shuffle", "did you mean --shuffle False?"),
        ("train", "--no-random-flip", "did you mean --random_flip False?"),
        ("train", "--schedule_samplr", "did you mean --schedule_sampler?"),
        ("train", "--frobnicate", "--help lists them"),
        ("evaluate", "--ref", "did you mean --reference?"),
        ("evaluate", "--sample_batch", "did you mean --samples?"),
        ("evaluate", "--input1", "did you mean --samples?"),
        ("evaluate", "--input2", "did you mean --reference?"),
        ("evaluate", "--images", "did you mean --samples?"),
        ("evaluate", "--data", "did you mean --reference?"),
        ("evaluate", "--dataset_name", "statistics are not looked up by a name: give images or a file"),
        ("evaluate", "--fid", "did you mean --metrics fid?"),
        ("evaluate", "--isc", "did you mean --metrics is?"),
        ("evaluate", "--prc", "did you mean --metrics precision,recall?"),
        ("evaluate", "--num", "did you mean --num_samples?"),
        ("evaluate", "--dims", "published numbers use the 2048 features of the last pooling: leave it out"),
        ("evaluate", "--mode", "images are resized for the network as TensorFlow does"),
        ("evaluate", "--save-stats", "give the images as --reference, and the file to write as --reference_out"),
        ("evaluate", "--num-workers", "a fixed number of threads reads the images ahead: leave it out"),
        ("evaluate", "--center_crop", "images keep their size; --resize 64 resizes them and crops them"),
        ("evaluate", "--output", "did you mean --results_dir for the results, or --out_dir for the images?"),
        ("evaluate", "--sample_dir", "did you mean --samples?"),
        ("sample", "--sample_dir", "did you mean --out_dir?"),
        ("train", "--fid", "evaluate.py computes FID"),
    ],
)
def test_flags(script: str, word: str, end: str) -> None:
    name = word.split("=")[0]
    message = refusal(MAIN[script], [word, "1"])
    assert message.startswith(f"{name} is not a flag of this script; {end}")


@pytest.mark.parametrize("script", MAIN)
def test_every_word_names_flags_of_the_script_only(script: str) -> None:
    for words, *_ in _TABLE:
        for word in words.split():
            if word in flags_of(script) or word == "h":
                continue
            message = refusal(MAIN[script], [f"--{word}", "1"])
            named = set(re.findall(r"--(\w+)", message.partition(";")[2]))
            assert named <= flags_of(script) | {"help", "num_gpus", "nproc_per_node"}, message


def test_the_table() -> None:
    words = Counter(word for words, *_ in _TABLE for word in words.split())
    assert [word for word, count in words.items() if count > 1] == []
    known = set().union(*map(flags_of, MAIN)) | OTHERS
    named = {name for _, *advice in _TABLE for text in advice for name in re.findall(r"\{(\w+)\}", text)}
    assert named <= known


@pytest.mark.parametrize(
    ("script", "content", "sentence"),
    [
        ("train", {"train": {"learning_rate": 1}}, "train.learning_rate is not a setting; did you mean lr?"),
        ("train", {"train": {"batch-size": 1}}, "train.batch-size is not a setting; did you mean batch_size?"),
        ("train", {"train": {"resolution": 1}}, "train.resolution is not a setting; did you mean model.image_size?"),
        (
            "train",
            {"data": {"epochs": 1}},
            "data.epochs is not a setting; a run is counted in steps: give train.",
        ),
        ("train", {"model": {"dim_mults": [1]}}, "model.dim_mults is not a setting; did you mean channel_mult?"),
        ("train", {"model": {"classifier_depth": 1}}, "model.classifier_depth is not a setting; classifiers are for"),
        ("train", {"learning_rate": 1}, "learning_rate is not a section; did you mean train.lr?"),
        ("train", {"model": {"lr": 1}}, "model.lr is not a setting; it belongs in section train"),
        ("sample", {"sample": {"guidance_scale": 1}}, "sample.guidance_scale is not a setting; did you mean guidance?"),
        ("sample", {"sample": {"epochs": 1}}, "sample.epochs is not a setting"),
        ("nll", {"nll": {"ckpt": 1}}, "nll.ckpt is not a setting; did you mean model_path?"),
    ],
)
def test_json_keys(script: str, content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(content))
    assert refusal(MAIN[script], ["--config", str(file)]).startswith(f"{file}: {sentence}")


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("guidance_scale", "did you mean guidance? 1 means none"),
        ("num_inference_steps", "did you mean steps, with a solver?"),
        ("timestep_respacing", "did you mean steps, with a solver?"),
        ("num_samples", "did you mean n, the first argument?"),
        ("use_ddim", "did you mean solver ddim?"),
        ("precision", "give it to load"),
        ("stpes", "did you mean steps?"),
        ("epochs", "those are batch_size"),
    ],
)
def test_arguments_in_python(word: str, end: str, tmp_path: Path) -> None:
    model = fastdiff.load(save(unet(), tmp_path / "model.pt"))
    with pytest.raises(UserError) as caught:
        model.sample(1, **{word: 1})
    assert str(caught.value).startswith(f"sample: {word} is not a setting here; {end}")


@pytest.mark.parametrize(
    ("script", "words", "end"),
    [
        (
            "folder.py",
            "--source a --out b --resolution 64",
            "--resolution is not a flag of this script; did you mean --size",
        ),
        ("folder.py", "--source a --out b --dataset c", "did you mean --source?"),
        ("pack.py", "--data_dir a --output_dir=b", "--output_dir is not a flag of this script; did you mean --out?"),
        ("lsun.py", "--lmdb a --out b --epochs 1", "--epochs is not a flag of this script (see lsun.py --help)"),
    ],
)
def test_scripts_of_datasets(script: str, words: str, end: str) -> None:
    assert end in fail(script, *words.split())
