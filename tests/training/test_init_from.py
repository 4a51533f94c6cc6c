"""--init_from starts a new run from a network's weights, and says what was taken and what begins anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, tiny
from helpers.pictures_folder import make_pictures
from helpers.ranks import run_ranks
from helpers.tiny import nothing_written, refusal, save, save_bare, super_res, unet
from torch import Tensor

from fastdiff import super_res_train, train
from fastdiff.config.checkpoint import open_checkpoint
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.models import UNet, UNetSettings, build_model, weights
from fastdiff.training.initial_weights import open_initial, take_weights

NAMES = ["cat", "dog", "fox"]


def started(file: Path, class_names: list[str] | None = None, seed: int = 0, **settings: Any) -> tuple[UNet, str]:
    """A network of these settings that takes the weights in a file, and the lines for the log."""
    sections = {"model": {**tiny.MODEL, **settings}, "diffusion": tiny.DIFFUSION, "train": {"init_from": str(file)}}
    config = Config.model_validate(sections)
    torch.manual_seed(seed)
    model = build_model(config.model)
    lines = take_weights(open_initial(config), model, config, class_names or [])
    return model.eval(), "\n".join(lines)


def output(model: UNet, y: int | None = None) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor([3, 5]), None if y is None else torch.tensor([y, y]))


def test_the_same_network_takes_every_tensor(tmp_path: Path) -> None:
    old = unet()
    for file in (save(old, tmp_path / "own.pt"), save_bare(old, tmp_path / "bare.pt")):
        model, log = started(file)
        assert all(torch.equal(value, old.state_dict()[name]) for name, value in model.state_dict().items())
        count = len(old.state_dict())
        assert log.startswith(f"starting from {file}: {count} of {count} tensors are taken as they are")
        assert "anew" not in log


def test_half_precision(tmp_path: Path) -> None:
    old = unet().half()
    model, _ = started(save_bare(old, tmp_path / "half.pt"))
    assert model.out[2].weight.dtype == torch.float32
    assert torch.equal(model.out[2].weight, old.state_dict()["out.2.weight"].float())


@pytest.mark.parametrize("old_null", [False, True])
@pytest.mark.parametrize("new_null", [False, True])
def test_rows_of_classes_go_by_name(old_null: bool, new_null: bool, tmp_path: Path) -> None:
    old = unet(class_cond=True, num_classes=4, null_class=old_null)  # one row more than there are names
    file = save(old, tmp_path / "old.pt", [*NAMES[:2], "Cafe\u0301"])
    now = ["Caf\u00e9", "bee", "cat"]
    model, log = started(file, now, class_cond=True, num_classes=5, null_class=new_null)
    table, before = model.label_emb.weight, old.label_emb.weight
    assert torch.equal(table[0], before[2])
    assert torch.equal(table[2], before[0])
    for new in (1, 3, 4):
        assert not any(torch.equal(table[new], row) for row in before)
        assert table[new].std() > 0.5  # as in a new network
    assert "the rows of 2 classes (Caf\u00e9, cat) are taken by name, those of 1 class (bee) begin anew" in log
    assert len(table) == 5 + new_null
    if new_null:
        assert torch.equal(table[5], before[4] if old_null else torch.zeros_like(table[5]))
    assert ("null class" in log) == new_null


def test_no_class_of_before(tmp_path: Path) -> None:
    file = save(unet(class_cond=True, num_classes=3), tmp_path / "old.pt", NAMES)
    model, log = started(file, ["elk", "owl", "yak"], class_cond=True, num_classes=3)
    assert "label_emb.weight: no class has the name of one before, those of 3 classes (elk, owl, yak) begin anew" in log
    assert not torch.equal(model.label_emb.weight, unet(class_cond=True, num_classes=3).label_emb.weight)


@pytest.mark.parametrize(
    ("rows", "null", "said"),
    [(3, False, "by number"), (5, False, "begins anew for 3"), (4, True, "by number"), (3, True, "by number")],
)
def test_tables_without_names(rows: int, null: bool, said: str, tmp_path: Path) -> None:
    """Rows of a file of another program go by number if there are as many, with the null class or without."""
    old = unet(class_cond=True, num_classes=rows)
    model, log = started(save_bare(old, tmp_path / "old.pt"), NAMES, class_cond=True, num_classes=3, null_class=null)
    assert said in log
    table, before = model.label_emb.weight, old.label_emb.weight
    assert torch.equal(table[:3], before[:3]) == (said == "by number")
    if null:
        assert torch.equal(table[3], before[3] if rows == 4 else torch.zeros_like(table[3]))


def test_from_unconditional_to_conditional(tmp_path: Path) -> None:
    """At first the network computes the same for every class."""
    old = unet()
    model, log = started(save(old, tmp_path / "old.pt"), NAMES, class_cond=True, num_classes=3)
    assert "label_emb.weight begins anew, at zero" in log
    for y in range(3):
        assert torch.equal(output(model, y), output(old))


def test_from_conditional_to_unconditional(tmp_path: Path) -> None:
    """The network computes what it did for the null class, or else for the mean of the classes' embeddings."""
    old = unet(class_cond=True, num_classes=3, null_class=True)
    model, log = started(save(old, tmp_path / "null.pt", NAMES))
    assert "label_emb.weight is left out, and the row of the null class added to time_embed.2.bias" in log
    torch.testing.assert_close(output(model), output(old, 3), rtol=1e-4, atol=1e-5)
    old = unet(class_cond=True, num_classes=9)
    model, log = started(save(old, tmp_path / "mean.pt", NAMES))
    assert "the mean of its classes' rows added" in log
    with torch.no_grad():
        old.label_emb.weight[0] = old.label_emb.weight[:3].mean(0)  # the others have no class
    torch.testing.assert_close(output(model), output(old, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_variances_or_not(learned: bool, tmp_path: Path) -> None:
    old = unet(learn_sigma=learned)
    model, log = started(save(old, tmp_path / "old.pt"), learn_sigma=not learned)
    assert torch.equal(output(model)[:, :3], output(old)[:, :3])
    assert "out.2.weight and out.2.bias: the half that predicts the mean is taken" in log
    assert log.count("that for the variances is left out" if learned else "that for the variances begins anew") == 1
    if not learned:
        assert not output(model)[:, 3:].any()  # as in a new network, whose last layer is zero


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    old = unet(learn_sigma=True)
    with torch.no_grad():
        old.out[2].bias[0] = torch.nan
    with pytest.raises(UserError, match=r"^--init_from: out\.2\.bias in .*old\.pt is not finite"):
        started(save(old, tmp_path / "old.pt"))


@pytest.mark.parametrize(
    "damage",
    [
        {"out.2.bias": torch.zeros(())},
        {"out.2.weight": torch.zeros(6)},
        {"label_emb.weight": torch.zeros(())},
        {"label_emb.weight": torch.zeros(0, 128)},
        {"label_emb.weight": torch.zeros(3, 64)},
        {"time_embed.2.bias": torch.zeros(3)},
        {"one.more": torch.zeros(3)},
    ],
    ids=lambda damage: " ".join(f"{name} {list(value.shape)}" for name, value in damage.items()),
)
@pytest.mark.parametrize("class_cond", [False, True])
def test_files_of_another_network(damage: dict[str, Tensor], class_cond: bool, tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    torch.save({**unet(learn_sigma=True).state_dict(), **damage}, file)
    with pytest.raises(UserError, match=r"^--init_from: .*other\.pt does not fit the model: "):
        started(file, NAMES, class_cond=class_cond, num_classes=3)


# --- runs ---


def words(data: Path, run: Path, **settings: Any) -> list[str]:
    given = {"data_dir": data, "run_dir": run, "batch_size": 4, "loader": "pillow", "max_steps": 1, "lr": 1e-9}
    return tiny.flags({**given, **settings})


def weights_of(run: Path, prefix: str = "model") -> dict[str, Tensor]:
    (file,) = sorted(run.glob(f"checkpoints/step_*/{prefix}*.pt"))[-1:]
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a class-conditional run."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    conditional = {"class_cond": True, "num_classes": 3, "max_steps": 3, "lr": 1e-2, "ema_rate": "0.5,0.2"}
    process = {**tiny.DIFFUSION, "noise_schedule": "cosine"}
    train.main(words(data, run, **tiny.MODEL, **process, **conditional))
    return run


@pytest.mark.slow
def test_alone(data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that isn't given is the checkpoint's, and both weights and averages start from its average."""
    new = tmp_path / "new"
    capsys.readouterr()
    train.main(words(data, new, init_from=pretrained, ema_rate="0.9"))
    out = capsys.readouterr().out
    assert f"starting from {pretrained}/checkpoints/step_000003/ema_0.5_000003.pt: " in out
    assert "the rows of 3 classes (class0, class1, class2) are taken by name" in out
    assert "network and diffusion process are the checkpoint's\n" in out
    assert "resuming" not in out
    taken, ours = weights_of(pretrained, "ema_0.5"), weights_of(new)
    assert weights.info_of(ours)["model"] == weights.info_of(taken)["model"]
    assert weights.info_of(ours)["diffusion"] == weights.info_of(taken)["diffusion"]
    for name, value in taken.items():
        assert (ours[name] - value).abs().max() <= 1e-8, name
        assert (weights_of(new, "ema_0.9")[name] - value).abs().max() <= 1e-8, name
    assert (new / "checkpoints" / "step_000001").is_dir()


@pytest.mark.slow
def test_another_task_at_another_size(tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_pictures(tmp_path / "data", size=16)
    new = tmp_path / "new"
    other = {"image_size": 16, "class_cond": False, "learn_sigma": True, "diffusion_steps": 40, "predict_xstart": True}
    train.main(words(data, new, init_from=pretrained, **other))
    out = capsys.readouterr().out
    assert "predict_xstart True (it was False)" in out
    assert "image_size 16 (it was 8)" in out
    assert "diffusion_steps 40 (it was 6)" in out
    stored = weights.info_of(weights_of(new))["model"]
    assert (stored["image_size"], stored["attention_resolutions"]) == (16, "8")
    taken, ours = weights_of(pretrained, "ema_0.5"), weights_of(new)
    assert (ours["middle_block.1.qkv.weight"] - taken["middle_block.1.qkv.weight"]).abs().max() <= 1e-8
    assert "label_emb.weight" not in ours


def test_levels_stay_when_the_size_changes(tmp_path: Path) -> None:
    """The default widths and the sizes with attention depend on the size of the images."""
    from fastdiff.config.load import load

    old = UNetSettings(image_size=32, num_channels=32, num_res_blocks=1)
    file = save(tiny.random_model(old), tmp_path / "old.pt")
    sections = ("model", "diffusion", "data", "train")
    for name in ("init_from", "resume_checkpoint"):
        for size, attention in {"64": (32, 16), "32": (16, 8), "48x96": (24, 12)}.items():
            argv = [f"--{name}", str(file), "--image_size", size]
            model = load(
                argv, description="", sections=sections, checkpoint=("train", "resume_checkpoint")
            ).config.model
            assert model.level_mult == (1, 2, 2, 2)
            assert model.attention_resolutions == attention
            assert model.attending_levels == old.attending_levels
            weights.check_fits(model, open_checkpoint(str(file)).state, file)


@pytest.mark.slow
def test_a_network_with_attention_at_no_level(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the user did not give is not refused: the network has attention where the checkpoint's has it."""
    for size, stored in ((8, "8,5"), (24, "16,10"), (8, "5")):
        old = unet(image_size=size, attention_resolutions=stored)
        new = tmp_path / f"{size} {stored}"
        train.main(words(data, new, init_from=save(old, tmp_path / "old.pt")))
        attending = [str(size >> level) for level in old.settings.attending_levels]
        assert weights.info_of(weights_of(new))["model"]["attention_resolutions"] == ",".join(attending)
    assert "attention_resolutions" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_resumes(
    data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on with its own checkpoints bit for bit, and the other one may be gone."""
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    given = {"init_from": source, "lr": 1e-3, "num_classes": 7, "noise_schedule": "cosine", "learn_sigma": True}
    train.main(words(data, tmp_path / "straight", **given, max_steps=3))
    train.main(words(data, tmp_path / "parts", **given, max_steps=2))
    shutil.rmtree(source)
    capsys.readouterr()
    train.main(words(data, tmp_path / "parts", **given, max_steps=3))
    out = capsys.readouterr().out
    assert "at step 2" in out
    assert "starting from" not in out
    straight, parts = (weights_of(tmp_path / run) for run in ("straight", "parts"))
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
    with nothing_written(tmp_path / "parts"):
        for other in (pretrained, tmp_path / "nowhere"):
            message = refusal(train.main, words(data, tmp_path / "parts", **{**given, "init_from": other}))
            assert f"parts holds a run that began from {source}" in message


@pytest.mark.slow
def test_a_folder_with_another_run(data: Path, pretrained: Path) -> None:
    """init_from would not be read there, so that the run would go on as if it were not given."""
    with nothing_written(pretrained):
        message = refusal(train.main, words(data, pretrained, init_from=pretrained, max_steps=4))
    assert message.startswith(
        f"--init_from: {pretrained} holds a run that did not begin from it; give another --run_dir"
    )


@pytest.mark.slow
def test_what_is_refused(data: Path, pretrained: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"

    def message(main: Any = train.main, **settings: Any) -> str:
        return refusal(main, words(data, new, **settings))

    both = message(init_from=pretrained, resume_checkpoint=pretrained)
    assert both == (
        f"--init_from {pretrained} starts a new run from weights, but resume_checkpoint {pretrained} goes on with a "
        "run; give only one of them"
    )
    assert "does not exist" in message(init_from=tmp_path / "nowhere.pt")
    assert message(init_from=pretrained, run_dir="r" * 300).startswith("--run_dir: 'rrr")
    assert "holds no checkpoint" in message(init_from=data)
    for name, value, hint in (
        ("num_channels", 64, "--num_channels 32"),
        ("channel_mult", "1,2,2", "--channel_mult 1,2"),
        ("num_res_blocks", 2, "--num_res_blocks 1"),
        ("in_channels", 1, "--in_channels 3"),
        ("attention_resolutions", 8, "--attention_resolutions 4"),
        ("use_scale_shift_norm", False, "--use_scale_shift_norm True"),
    ):
        text = message(init_from=pretrained, **{name: value})
        assert text.startswith("--init_from: ")
        assert "does not fit the model: it was trained with" in text
        assert hint in text
    assert "--attention_resolutions 3: a network for the image size 8x8 has no level" in message(
        init_from=pretrained, attention_resolutions="4,3"
    )
    for main, model in ((train.main, super_res()), (super_res_train.main, unet())):
        assert "is for " in message(main, init_from=save(model, tmp_path / "kind.pt"))
    assert not new.exists()


@pytest.mark.slow
def test_super_resolution(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = super_res(class_cond=True, num_classes=2)
    file = save(old, tmp_path / "old.pt", ["class1", "other"])
    new = {"init_from": file, "num_classes": 3, "large_size": 32, "small_size": 16}
    super_res_train.main(words(data, tmp_path / "new", **new))
    assert "the rows of 1 class (class1) are taken by name" in capsys.readouterr().out
    state = weights_of(tmp_path / "new")
    assert weights.info_of(state)["model"]["attention_resolutions"] == "16"
    assert (state["label_emb.weight"][1] - old.label_emb.weight[0]).abs().max() <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_two_processes(stage: str, data: Path, pretrained: Path, tmp_path: Path) -> None:
    given = words(data, tmp_path / "new", init_from=pretrained, zero_stage=stage, num_classes=5, ema_rate=0.5)
    out = run_ranks([str(ROOT / "fastdiff" / "train.py"), *given])
    assert out.count("starting from") == 1
    taken = weights_of(pretrained, "ema_0.5")
    for prefix in ("model", "ema_0.5"):
        state = weights_of(tmp_path / "new", prefix)
        assert len(state["label_emb.weight"]) == 5
        for name, value in taken.items():
            ours = state[name][:3] if name == "label_emb.weight" else state[name]
            assert (ours - value).abs().max() <= 1e-8, name
    out = run_ranks([str(ROOT / "fastdiff" / "train.py"), *given, "--max_steps", "2"])
    assert "at step 1" in out
