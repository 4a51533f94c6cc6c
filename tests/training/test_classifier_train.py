"""classifier_train.py: accuracy rises, a stopped run loses nothing, two processes equal one, wrong input is refused."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.pictures_folder import make_pictures
from helpers.ranks import run_ranks
from helpers.small_trainer import small_trainer
from helpers.tiny import fill_randomly, nothing_written, refusal, relative_error, save, save_bare, unet
from PIL import Image
from pydantic import ValidationError

from fastdiff import classifier_train, info, train
from fastdiff.config.checkpoint import open_checkpoint
from fastdiff.config.classifier import classifier_settings_of, open_classifier
from fastdiff.config.load import load
from fastdiff.config.sections import ClassifierConfig
from fastdiff.diffusion import DiffusionSettings
from fastdiff.errors import StopWith
from fastdiff.models.classifier import build_classifier
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.models.regions import regions_of
from fastdiff.models.unet import dummy_batch
from fastdiff.settings import what_is_wrong
from fastdiff.training.metrics import LossMeter
from fastdiff.training.objective import Classification, create_objective
from fastdiff.training.settings import ClassifierTrainSettings
from fastdiff.training.step_plan import training_launches
from fastdiff.training.trainer import Trainer

MODEL = {
    "image_size": 8,
    "num_classes": 3,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_channel_mult": "1,2",
    "classifier_attention_resolutions": "4",
}
SECTIONS = ("model", "diffusion", "data", "train")


def flags(data: Path, run: Path, *more: str, **settings: Any) -> list[str]:
    given = {**MODEL, "data_dir": data, "run_dir": run, "batch_size": 4, "lr": 1e-3, "log_interval": 2, **settings}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("validation"), count=7)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "progress.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait", "memory_gb") and v}
            for row in csv.DictReader(file)
        ]


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step_{step:06d}" / f"model{step:06d}.pt", weights_only=True)


def equal(run: Path, other: Path, step: int) -> bool:
    ours, theirs = weights_of(run, step), weights_of(other, step)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- the objective ---


def objective(noised: bool = True) -> Classification:
    made = create_objective(ClassifierSettings(**MODEL), DiffusionSettings(diffusion_steps=50), noised)
    assert isinstance(made, Classification)
    return made


def test_losses_are_those_of_the_noised_images() -> None:
    """With the float64 noising and loss that the definition gives; accuracies count classes with larger logits."""
    model = fill_randomly(build_classifier(ClassifierSettings(**{**MODEL, "num_classes": 8})))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    t, y = torch.arange(0, 48, 8), torch.tensor([0, 1, 2, 3, 4, 7])
    noise = torch.randn(6, 3, 8, 8)
    made = objective()
    terms = made.training_losses(model, images, t, {"y": y}, noise)
    kept = torch.from_numpy(made.diffusion.schedule.alphas_cumprod)[t][:, None, None, None]
    x_t = (images.permute(0, 3, 1, 2).double() / 127.5 - 1) * kept.sqrt() + noise * (1 - kept).sqrt()
    logits = model(x_t.float(), made.diffusion.model_timesteps(t)).double()
    wanted = -logits.log_softmax(1)[torch.arange(6), y]
    assert torch.allclose(terms["loss"].double(), wanted, atol=1e-5)
    for k in (1, 5):
        among = (logits.topk(k).indices == y[:, None]).any(1)
        assert terms[f"acc@{k}"].bool().tolist() == among.tolist()
    assert terms["loss"].requires_grad
    assert not terms["acc@1"].requires_grad


def test_without_noise_images_are_clean_and_at_timestep_0() -> None:
    model = fill_randomly(build_classifier(ClassifierSettings(**MODEL)))
    made, batch = objective(noised=False), dummy_batch(model.settings, 2, torch.device("cpu"))
    assert made.num_timesteps == 1
    terms = made.training_losses(model, *batch)
    wanted = F.cross_entropy(model(torch.full((2, 3, 8, 8), -1.0), batch.t), batch.model_kwargs["y"], reduction="none")
    assert torch.allclose(terms["loss"], wanted, atol=1e-6)
    assert terms.keys() == {"loss", "acc@1"}  # of 3 classes, the correct one is always among 5


def test_equal_and_non_finite_logits_are_not_correct() -> None:
    images = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    logits = torch.tensor([[1.0, 1.0, 0.0], [math.nan, 0.0, 0.0], [0.0, 2.0, 1.0]])
    t, labels = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 1])
    terms = objective().training_losses(lambda x, t: logits, images, t, {"y": labels}, torch.zeros(3, 3, 8, 8))
    assert terms["acc@1"][[0, 2]].tolist() == [0.0, 1.0]
    assert terms["acc@1"][1].isnan()
    meter = LossMeter(50, torch.device("cpu"), Classification.loss_terms)
    meter.add(t, torch.ones(3), terms)
    metrics = meter.read()
    assert (metrics["acc@1"], metrics["acc@1_q0"], metrics["bad_losses"]) == (0.5, 0.5, 1)


@pytest.mark.parametrize("pool", ["attention", "spatial"])
def test_regions_compute_what_the_whole_computes(pool: str) -> None:
    model = fill_randomly(build_classifier(ClassifierSettings(**{**MODEL, "classifier_pool": pool})))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    assert torch.equal(regions_of(model)(x, t), model(x, t))


@pytest.mark.parametrize("noised", [True, False])
def test_kernels_of_a_step_are_known_beforehand(noised: bool) -> None:
    launches = training_launches(
        ClassifierSettings(**{**MODEL, "classifier_pool": "spatial"}), DiffusionSettings(), 2, torch.bfloat16,
        more=True, noised=noised,
    )  # fmt: skip
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert any("norm" in name for name in names)
    assert any("q_sample" in name for name in names) == noised


# --- settings ---


def test_guided_diffusions_command_means_the_same(data: Path) -> None:
    """The flags of its README for the 128-pixel classifier."""
    command = (
        "--iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 --weight_decay 0.05 "
        "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
        "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True "
        "--classifier_use_fp16 True"
    )
    argv = ["--data_dir", str(data), *command.split()]
    config = load(argv, description="", sections=SECTIONS, kind=ClassifierConfig).config
    assert config.model == ClassifierSettings(image_size=128)
    train = config.train
    assert (train.last_step, train.lr_anneal_steps, train.precision) == (300_000, 300_000, "fp16")
    assert (config.data.random_flip, config.data.random_crop) == (True, True)
    by_default = load([], description="", sections=SECTIONS, kind=ClassifierConfig).config.train
    assert (by_default.last_step, by_default.lr_anneal_steps, by_default.lr) == (150_000, 0, 3e-4)


def test_a_flag_by_the_original_name_overrides_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"train": {"max_steps": 9, "anneal_lr": True, "precision": "bf16"}}))
    argv = ["--config", str(file), "--iterations", "5", "--classifier_use_fp16", "True"]
    train = load(argv, description="", sections=SECTIONS, kind=ClassifierConfig).config.train
    assert (train.last_step, train.lr_anneal_steps, train.precision) == (5, 5, "fp16")
    message = refusal(classifier_train.main, ["--iterations", "5", "--max_steps", "7"])
    assert message == "--iterations 5 contradicts max_steps 7; give one of them"


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"iterations": 5, "max_steps": 7}, "iterations 5 contradicts max_steps 7"),
    ({"anneal_lr": True, "lr_anneal_steps": 7}, "anneal_lr True over 150000 steps contradicts lr_anneal_steps 7"),
])  # fmt: skip
def test_two_names_with_different_values(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as found:
        ClassifierTrainSettings(**settings)
    assert sentence in what_is_wrong(found.value)


@pytest.mark.parametrize(("more", "sentence"), [
    (["--num_classes", "2"], "has 3 classes"),
    (["--cache", "disk"], "--random_crop True needs images that Pillow decodes anew at each sight, not those of cac"),
    (["--loader", "dali"], "--random_crop True needs images that Pillow decodes anew at each sight, not those of loa"),
    (["--classifier_attention_resolutions", "3"], "--classifier_attention_resolutions 3: a network for the image size"),
    (["--image_size", "9"], "image_size 9x9 is not divisible by 2, which 2 levels (classifier_channel_mult) need"),
    (["--labels", "none"], "--labels none gives no classes"),
    (["--num_channels", "64"], "--num_channels is not a flag of this script; did you mean --classifier_width?"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
])  # fmt: skip
def test_wrong_settings_are_refused(more: list[str], sentence: str, data: Path, tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        assert sentence in refusal(classifier_train.main, flags(data, tmp_path / "run", *more))


def test_weights_of_another_width_are_refused(data: Path, tmp_path: Path) -> None:
    """The refusal tells the width, though the norm before the head differs in its only axis, as classes would."""
    file = save_bare(build_classifier(ClassifierSettings(**{**MODEL, "classifier_width": 64})), tmp_path / "wide.pt")
    message = refusal(classifier_train.main, flags(data, tmp_path / "run", init_from=file))
    assert message == f"--init_from: {file} does not fit the model: it was trained with --classifier_width 64"


def test_images_of_one_class_are_refused(tmp_path: Path) -> None:
    one = make_pictures(tmp_path / "one", count=3, classes=1)
    message = refusal(classifier_train.main, flags(one, tmp_path / "run"))
    assert "one class only (class0)" in message
    assert "class_cond" not in message


def test_validation_images_of_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    other = make_pictures(tmp_path / "other", count=8, classes=4)
    assert "--val_data_dir" in refusal(classifier_train.main, flags(data, tmp_path / "run", val_data_dir=other))


def test_a_run_among_the_validation_images_is_refused(data: Path, tmp_path: Path) -> None:
    """The folder of a run holds no images to its next start."""
    own = make_pictures(tmp_path / "own", count=3)
    with nothing_written(tmp_path):
        message = refusal(classifier_train.main, flags(data, own, val_data_dir=own))
    assert message.startswith(f"--run_dir: {own} would mix the run's files with the images of --val_data_dir; ")


@pytest.mark.parametrize("name", ["init_from", "resume_checkpoint"])
def test_weights_of_a_diffusion_model_are_refused(name: str, data: Path, tmp_path: Path) -> None:
    bare, own = save_bare(unet(), tmp_path / "bare.pt"), save(unet(), tmp_path / "own.pt")
    for file in (bare, own):
        message = refusal(classifier_train.main, flags(data, tmp_path / "run", f"--{name}", str(file)))
        assert f"--{name}: {file} is a diffusion model, not a classifier" in message


def test_train_refuses_the_run_of_a_classifier(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    classifier_train.main(flags(data, run, max_steps=1))
    same_size = ["--image_size", "8", "--num_channels", "32", "--channel_mult", "1,2", "--attention_resolutions", "4"]
    message = refusal(train.main, ["--data_dir", data, "--run_dir", run, *same_size])
    assert message == f"--run_dir: {run} holds a run of classifier_train.py; give another --run_dir, or use that script"


def test_a_run_keeps_its_noise_unless_told(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    classifier_train.main(flags(data, run, max_steps=1))
    message = refusal(classifier_train.main, flags(data, run, max_steps=2, noised=False))
    assert "of a run with noised True; keep that, or give --allow_change noised to change it" in message
    classifier_train.main(flags(data, run, max_steps=2, noised=False, allow_change="noised"))


def test_caches_of_folders_with_the_same_name(tmp_path: Path) -> None:
    """The decoded images for training and for validation lie apart in cache_dir, also at the next start."""
    one, other = (make_pictures(tmp_path / name / "images", count) for name, count in (("train", 6), ("val", 3)))
    cached = {"random_crop": False, "cache": "disk", "cache_dir": tmp_path / "cache", "val_data_dir": other}
    for steps in (1, 2):
        classifier_train.main(flags(one, tmp_path / "run", **cached, max_steps=steps))
    assert len(list(tmp_path.glob("cache/**/*.packed_8x8x3"))) == 2


# --- runs ---


@pytest.mark.slow
def test_a_run_and_the_same_command_again(
    data: Path, validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run in two parts has the weights, averages and metrics of one that wasn't stopped, validation included."""
    settings = {"val_data_dir": validation, "eval_interval": 2, "log_interval": 3, "ema_rate": "0.9"}
    for run, ends in (("whole", (7,)), ("parts", (4, 7))):
        for steps in ends:
            classifier_train.main(flags(data, tmp_path / run, **settings, max_steps=steps))
    assert "resuming from" in capsys.readouterr().out
    assert equal(tmp_path / "parts", tmp_path / "whole", 7)
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert [row["step"] for row in whole] == ["3", "6", "7"]
    assert parts[0] == whole[0]
    assert parts[-1] == whole[-1]
    assert {"loss", "acc@1", "val_loss", "val_acc@1", "grad_norm", "lr", "samples"} <= whole[0].keys()
    assert "acc@5" not in whole[0]
    assert "val_loss" not in whole[-1]  # step 7 is no step of validation, and the row is of it alone
    checkpoint = open_checkpoint(str(tmp_path / "whole"))
    assert checkpoint.file.name == "ema_0.9_000007.pt"
    assert (checkpoint.kind, checkpoint.class_names) == ("classifier", ["class0", "class1", "class2"])
    info.main([str(tmp_path / "whole")])
    assert "run of a classifier" in capsys.readouterr().out
    settings_in_file = ClassifierSettings(**classifier_settings_of(checkpoint)[1]["model"])
    assert settings_in_file == ClassifierSettings(**MODEL)
    model = open_classifier(checkpoint, settings_in_file, "fp32", torch.device("cpu"))
    assert model(torch.zeros(1, 3, 8, 8), torch.zeros(1)).isfinite().all()


@pytest.mark.slow
def test_a_signal_loses_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Trainer.take_step

    def take_step(self: Trainer) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        take(self)

    argv = flags(data, tmp_path / "run", max_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        with pytest.raises(StopWith):
            classifier_train.main(argv)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    classifier_train.main(argv)
    classifier_train.main(flags(data, tmp_path / "whole", max_steps=5))
    assert equal(tmp_path / "run", tmp_path / "whole", 5)


def test_validation_has_its_own_timesteps_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images at the same positions get other timesteps and noise than in training."""
    trainer = small_trainer()
    batch = trainer.micro_batches(trainer._next_batch())[0]
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(2, trainer.model_settings.out_channels, *x.shape[2:])

    trained, validated = (trainer.losses(network, batch, validating=validating) for validating in (False, True))
    again = trainer.losses(network, batch, validating=True)
    assert torch.equal(validated.t, again.t)
    assert not torch.equal(trained.t, validated.t)
    assert torch.equal(seen[1], seen[2])
    monkeypatch.setattr(trainer, "draw_timesteps", lambda *_: (trained.t, trained.weights))
    trainer.losses(network, batch, validating=True)
    assert not torch.equal(seen[0], seen[3])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_equal_one(stage: int, data: Path, validation: Path, tmp_path: Path) -> None:
    """They have the same gradients and, after an update by these, the same losses, of validation as well."""
    intervals = {"eval_interval": 1, "log_interval": 1, "save_interval": 1}
    settings = {"val_data_dir": validation, "max_steps": 2, "microbatch": 1, **intervals}
    classifier_train.main(flags(data, tmp_path / "one", **settings))
    script = str(ROOT / "fastdiff" / "classifier_train.py")
    run_ranks([script, *flags(data, tmp_path / "two", **settings, zero_stage=stage)])
    moments = [
        torch.load(tmp_path / run / "checkpoints" / "step_000001" / "opt000001.pt", weights_only=True)["state"]
        for run in ("one", "two")
    ]
    one, two = (torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]) for state in moments)
    assert relative_error(two, one) < 1e-5
    for ours, theirs in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "val_loss", "grad_norm"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)
        assert (ours["acc@1"], ours["val_acc@1"]) == (theirs["acc@1"], theirs["val_acc@1"])


def colours(folder: Path, count: int, seed: int) -> Path:
    """Pictures of noise, of which one colour is brighter: their class."""
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 100, (count, 10, 9, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        image[..., i % 3] += 120
        Image.fromarray(image).save(folder / f"{['red', 'green', 'blue'][i % 3]}_{i}.png")
    return folder


@pytest.mark.slow
def test_accuracy_rises_on_images_that_differ_in_colour(tmp_path: Path) -> None:
    """Almost all images are classified by a network that saw others; the noisiest quarter stays hard."""
    seen, unseen = colours(tmp_path / "seen", 60, 0), colours(tmp_path / "unseen", 24, 1)
    run = tmp_path / "run"
    settings = {"val_data_dir": unseen, "eval_interval": 1, "log_interval": 20, "lr": 1e-3, "batch_size": 16}
    classifier_train.main(flags(seen, run, **settings, max_steps=120, anneal_lr=True))
    first, last = rows_of(run)[0], rows_of(run)[-1]
    assert float(last["val_acc@1_q0"]) > 0.9
    assert float(last["val_acc@1"]) > float(first["val_acc@1"]) + 0.1
    assert float(last["val_loss_q0"]) < 0.3
    assert float(last["val_loss_q3"]) > float(last["val_loss_q0"])


@pytest.mark.slow
def test_a_new_run_begins_from_the_weights_of_another_with_other_classes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fill_randomly(build_classifier(ClassifierSettings(**{**MODEL, "num_classes": 7})))
    file = save_bare(model, tmp_path / "other.pt")
    run = tmp_path / "run"
    classifier_train.main(flags(data, run, max_steps=1, init_from=file, lr=1e-9))
    assert "out.2.c_proj.weight and out.2.c_proj.bias begin anew, for 3 classes" in capsys.readouterr().out
    taken = weights_of(run, 1)
    assert taken["out.2.c_proj.weight"].shape[0] == 3
    name = "input_blocks.1.0.in_layers.2.weight"
    assert torch.allclose(taken[name], model.state_dict()[name], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["compile", "bf16", "use_checkpoint", "not_noised", "loss_aware"])
def test_settings_of_training_work(setting: str, data: Path, tmp_path: Path) -> None:
    more = {
        "compile": {"compile": True},
        "bf16": {"precision": "bf16"},
        "use_checkpoint": {"use_checkpoint": True, "microbatch": "auto"},
        "not_noised": {"noised": False},
        "loss_aware": {"schedule_sampler": "loss-second-moment"},
    }[setting]
    classifier_train.main(flags(data, tmp_path / "run", max_steps=2, **more))
    classifier_train.main(flags(data, tmp_path / "plain", max_steps=2))
    run, plain = rows_of(tmp_path / "run")[-1], rows_of(tmp_path / "plain")[-1]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run", 2).values())
    if setting in ("compile", "use_checkpoint", "loss_aware"):
        assert float(run["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)
    if setting == "not_noised":
        assert "loss_q1" not in run


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_written(tmp_path):
        classifier_train.main(flags(data, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert "nothing was written" in out
    assert "samples/" not in out
