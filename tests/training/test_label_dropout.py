"""In training the right labels are dropped, the null class learns, and runs resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_trainer import losses_of, small_trainer, weights_of
from helpers.tiny import DIFFUSION, MODEL, SUPER_RES, flags, pictures, refusal, save, save_bare, super_res, unet

from fastdiff import super_res_train, train
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.images.loader import Batch
from fastdiff.models import SuperResSettings, UNetSettings, build_model, weights
from fastdiff.models.settings import BackboneSettings
from fastdiff.runtime.files import read_json, write_json
from fastdiff.training import run
from fastdiff.training.checkpoints.format import Snapshot, add_null_class, read_snapshot

CLASSES = 5
LABELS = "label_emb.weight"
LABELLED: dict[str, Any] = {"class_cond": True, "num_classes": CLASSES, "null_class": True}


def labelled_trainer(snapshot: Snapshot | None = None, **settings: Any):
    return small_trainer(snapshot, LABELLED, **{"label_dropout": 0.5, **settings})


def batch_at(positions: torch.Tensor) -> Batch:
    """Make a batch of pictures with class position % CLASSES."""
    images = torch.zeros(len(positions), 8, 8, 3, dtype=torch.uint8)
    return Batch(images, positions % CLASSES, positions)


# --- the network ---


@pytest.mark.parametrize("make", [unet, super_res])
def test_rows(make: Any) -> None:
    for null_class in (False, True):
        model = make(class_cond=True, num_classes=CLASSES, null_class=null_class)
        assert model.settings.num_labels == CLASSES + null_class
        assert model.label_emb.weight.shape[0] == CLASSES + null_class
    t, y = torch.tensor([3]), torch.tensor([CLASSES])
    assert torch.equal(model.embed(t, y)[0], model.embed_time(t)[0] + model.label_emb.weight[CLASSES])


@pytest.mark.parametrize("settings", [UNetSettings, SuperResSettings])
def test_null_class_needs_classes(settings: type[BackboneSettings]) -> None:
    with pytest.raises(ValueError, match="null_class True needs class_cond True"):
        settings(null_class=True)


# --- dropped labels ---


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_share_of_dropped_labels(share: float) -> None:
    trainer = labelled_trainer(label_dropout=share)
    count = 20_000
    batch = batch_at(torch.arange(count))
    labels = trainer.labels_of(batch)
    dropped = labels == CLASSES
    assert torch.equal(labels[~dropped], batch.labels[~dropped])
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(int(dropped.sum()) - count * share) < 4 * spread
    for label in range(CLASSES):  # whatever the class
        of_class = dropped[batch.labels == label].sum().item()
        assert abs(of_class - count / CLASSES * share) < 4 * spread / CLASSES**0.5


def test_drops_depend_on_seed_and_position_alone() -> None:
    """Neither the micro-batch nor the number of processes changes which labels are dropped."""
    positions = torch.arange(1000, 1256)
    whole = labelled_trainer().labels_of(batch_at(positions))
    for cut in (slice(0, 100), slice(1, None, 2), slice(37, 38)):
        part = labelled_trainer(batch_size=8, microbatch=4).labels_of(batch_at(positions[cut]))
        assert torch.equal(part, whole[cut])
    assert not torch.equal(labelled_trainer(seed=4).labels_of(batch_at(positions)), whole)
    trainer = labelled_trainer()
    assert torch.equal(trainer.labels_of(batch_at(positions)), trainer.labels_of(batch_at(positions)))


def test_drops_are_independent_of_timesteps() -> None:
    """Timesteps and dropped labels come from the same counters, with different keys."""
    trainer = labelled_trainer()
    batch = batch_at(torch.arange(10_000))
    t, _ = trainer.draw_timesteps(batch)
    dropped = (trainer.labels_of(batch) == CLASSES).double()
    correlation = torch.corrcoef(torch.stack([t.double(), dropped]))[0, 1]
    assert abs(correlation) < 4 / len(t) ** 0.5


def test_without_dropout_labels_stay() -> None:
    trainer = labelled_trainer(label_dropout=0.0)
    batch = batch_at(torch.arange(64))
    assert trainer.labels_of(batch) is batch.labels


def test_losses_take_the_dropped_labels() -> None:
    """The network gets the null class for a dropped label, and only rows of seen classes get gradients."""
    trainer = labelled_trainer()
    seen: list[torch.Tensor] = []
    batch = batch_at(torch.arange(40))
    batch = Batch(batch.images, torch.zeros_like(batch.labels), batch.positions)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return trainer.model(x, t, y=y)

    trainer.losses(network, batch).loss.backward()
    assert torch.equal(seen[0], trainer.labels_of(batch))
    gradient = trainer.model.label_emb.weight.grad
    assert gradient[0].abs().max() > 0
    assert gradient[CLASSES].abs().max() > 0
    assert gradient[1:CLASSES].abs().max() == 0


# --- resuming ---


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 1, "precision": "bf16"}], ids=["fp32", "zero1-bf16"])
def test_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    straight = labelled_trainer(**settings)
    losses_of(straight, 2)
    straight.save(tmp_path, {})
    expected = losses_of(straight, 3)
    snapshot = read_snapshot(tmp_path / "step_000002", ["0.9", "0.99"])
    resumed = labelled_trainer(snapshot, **settings)
    assert losses_of(resumed, 3) == expected
    final = weights_of(resumed)
    for name, value in weights_of(straight).items():
        assert torch.equal(value, final[name]), name
    assert final[f"exp_avg/{LABELS}"][CLASSES].abs().max() > 0


def test_dropout_changes_what_is_learnt() -> None:
    """The setting reaches the loss: without it the same run has other losses."""
    assert losses_of(labelled_trainer(), 3) != losses_of(labelled_trainer(label_dropout=0.0), 3)


def test_checkpoint_without_the_null_class(tmp_path: Path) -> None:
    """The added row starts at zero in weights, averages and moments, the rest is unchanged, and all of it trains."""
    old = small_trainer(None, {**LABELLED, "null_class": False})
    losses_of(old, 2)
    old.save(tmp_path, {})
    snapshot = read_snapshot(tmp_path / "step_000002", ["0.9", "0.99"])
    before = {name: value.clone() for name, value in snapshot.model.items()}
    add_null_class(snapshot)
    assert "no null class" in snapshot.notes[-1]
    trainer = labelled_trainer(snapshot)
    state = weights_of(trainer)
    for kind in ("model", "0.9", "0.99", "exp_avg", "exp_avg_sq"):
        table = state[f"{kind}/{LABELS}"]
        assert table.shape[0] == CLASSES + 1
        assert not table[CLASSES].any()
        assert table[:CLASSES].any()
    assert torch.equal(state[f"model/{LABELS}"][:CLASSES], before[LABELS])
    assert all(torch.equal(state[f"model/{name}"], value) for name, value in before.items() if name != LABELS)
    assert trainer.step == 2
    assert all(metrics["loss"] == metrics["loss"] for metrics in losses_of(trainer, 2))
    after = weights_of(trainer)
    for kind in ("model", "0.9", "0.99", "exp_avg", "exp_avg_sq"):
        assert after[f"{kind}/{LABELS}"][CLASSES].any(), kind


# --- the scripts ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with labelled pictures."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "images", [f"{name}_{i}" for name in ("ape", "cat", "dog") for i in range(2)], size=16)
    return tmp_path


def words(run_dir: str, model: dict[str, Any] | None = None, **settings: Any) -> list[str]:
    given = {"data_dir": "images", "run_dir": run_dir, "loader": "pillow", "batch_size": 2, "compile": False}
    network = {**(model or MODEL), "class_cond": True, "num_classes": CLASSES}
    return flags({**given, **network, **DIFFUSION, **settings})


def test_a_run_from_an_old_checkpoint(folder: Path) -> None:
    """A run can start from one without the null class, with label_dropout, and be resumed itself."""
    train.main(words("old", max_steps=1))
    old = folder / "old" / "checkpoints" / "step_000001"
    new = words("new", max_steps=2, label_dropout=0.5, resume_checkpoint=old, sample_interval=2, sample_respacing="3")
    train.main(new)
    log = (folder / "new" / "log.txt").read_text()
    assert "at step 1" in log
    assert "the checkpoint has no null class: its row of the label embedding starts at zero" in log
    assert (folder / "new" / "samples" / "step_000002.png").is_file()
    config = read_json(folder / "new" / "config.json")
    assert (config["model"]["null_class"], config["train"]["label_dropout"]) == (True, 0.5)
    state = weights.read_state_dict(weights.find("new"))
    assert weights.info_of(state)["model"]["null_class"]
    assert state[LABELS].shape[0] == CLASSES + 1
    train.main([*new, "--max_steps", "3"])
    assert (folder / "new" / "checkpoints" / "step_000003").is_dir()
    message = refusal(train.main, words("old", max_steps=2, label_dropout=0.5))
    assert "--run_dir: old holds a run with model.null_class False (now it is True)" in message


def test_an_old_runs_folder_knows_no_null_class(folder: Path) -> None:
    """The run's config.json does not name the setting null_class, which then is False."""
    train.main(words("old", max_steps=1))
    file = folder / "old" / "config.json"
    content = read_json(file)
    del content["model"]["null_class"]
    write_json(file, content)
    train.main(words("old", max_steps=2))
    message = refusal(train.main, words("old", max_steps=3, label_dropout=0.5))
    assert "model.null_class False (now it is True)" in message


def test_super_resolution(folder: Path) -> None:
    file = save(super_res(class_cond=True, num_classes=CLASSES), folder / "model000004.pt")
    small = words("run", SUPER_RES, max_steps=5, label_dropout=0.1, resume_checkpoint=file)
    super_res_train.main(small)
    state = weights.read_state_dict(weights.find("run"))
    assert state[LABELS].shape[0] == CLASSES + 1
    assert weights.info_of(state)["kind"] == "super_res"
    assert weights.info_of(state)["model"]["null_class"]


def test_label_dropout_needs_the_null_class_in_any_case(folder: Path) -> None:
    config = Config.model_validate({"data": {"data_dir": "images"}, "train": {"label_dropout": 0.1}})
    with pytest.raises(UserError, match="--label_dropout 0.1 needs class_cond True and null_class True"):
        run.train(config, "run")


# --- files with another number of classes ---


@pytest.mark.parametrize(
    ("own", "file", "hint"),
    [
        ({"num_classes": 5}, {"num_classes": 5, "null_class": True}, "--null_class True"),
        ({"num_classes": 5, "null_class": True}, {"num_classes": 5}, "--null_class False"),
        ({"num_classes": 5}, {"num_classes": 9}, "--num_classes 9"),
        ({"num_classes": 5, "null_class": True}, {"num_classes": 8, "null_class": True}, "--num_classes 8"),
        ({"num_classes": 5, "null_class": True}, {"num_classes": 6}, None),
    ],
    ids=str,
)
def test_what_would_fit(own: dict[str, Any], file: dict[str, Any], hint: str | None) -> None:
    model = build_model(UNetSettings(**MODEL, class_cond=True, **own))
    state = unet(class_cond=True, **file).state_dict()
    if hint is None:  # the number of rows is the same
        weights.load_into(model, state, Path("x.pt"))
        return
    with pytest.raises(UserError, match=f"^x.pt does not fit the model: it was trained with {hint}$"):
        weights.load_into(model, state, Path("x.pt"))


def test_bare_file_with_the_null_class(folder: Path) -> None:
    """Its table has one row more than there are classes, and fits if a flag says so."""
    file = save_bare(unet(class_cond=True, num_classes=CLASSES, null_class=True), folder / "model000007.pt")
    train.main(words("run", max_steps=8, label_dropout=0.1, resume_checkpoint=file))
    assert "no null class" not in (folder / "run" / "log.txt").read_text()
    message = refusal(train.main, words("other", max_steps=8, resume_checkpoint=file))
    assert "--resume_checkpoint" in message
    assert "--null_class True" in message
