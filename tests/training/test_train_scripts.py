"""train.py and super_res_train.py work as users start them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny
from helpers.pictures_folder import make_pictures
from helpers.ranks import run_ranks
from helpers.train_flags import PROCESS, flags
from PIL import Image

from fastdiff import super_res_train, train
from fastdiff.errors import USER_ERROR, UserError
from fastdiff.models import UNetSettings, build_model, weights
from fastdiff.training.diagnostics.profile import SETTLING
from fastdiff.training.metrics import LossMeter

pytestmark = pytest.mark.slow


def test_a_run_and_the_same_command_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train.main(
        flags(data, run, "--max_steps", "4", "--save_interval", "2", "--sample_interval", "2", "--ema_rate", "0.9,0.5")
    )
    assert {p.name for p in run.iterdir() if not p.name.startswith("events")} == {
        "config.json", "log.txt", "progress.csv", "status.json", ".lock", "checkpoints", "samples",
    }  # fmt: skip
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 4, 0)
    assert list(run.glob("events*"))
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step_000002", "step_000004"}
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000004"
    files = {p.name for p in (run / "checkpoints" / "step_000004").iterdir()}
    assert files == {
        "model000004.pt", "ema_0.9_000004.pt", "ema_0.5_000004.pt", "opt000004.pt", "state.pt", "manifest.json",
    }  # fmt: skip
    with Image.open(run / "samples" / "step_000004.png") as picture:
        assert picture.mode == "RGB"
    with (run / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert rows[-1]["samples"] == "16"
    wanted = {"loss", "mse", "vb", "grad_norm", "images_per_second", "data_wait", "memory_gb", "lr"}
    assert wanted <= rows[0].keys()
    assert any(name.startswith("loss_q") for name in rows[0])
    assert "resuming" not in capsys.readouterr().out

    again = flags(data, run, "--max_steps", "6", "--save_interval", "2", "--ema_rate", "0.9,0.5")
    train.main(again)
    assert "at step 4" in capsys.readouterr().out
    straight = tmp_path / "straight"
    train.main(flags(data, straight, "--max_steps", "6", "--save_interval", "6", "--ema_rate", "0.9,0.5"))
    for name in ("model000006.pt", "ema_0.9_000006.pt", "ema_0.5_000006.pt"):
        resumed, whole = (
            torch.load(r / "checkpoints" / "step_000006" / name, weights_only=True) for r in (run, straight)
        )
        assert all(torch.equal(resumed[key], whole[key]) for key in whole), name
    with (run / "progress.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]


def test_intervals_of_one_step(data: Path, tmp_path: Path) -> None:
    """The first step, which compiles and warms up, is in no rate, wherever intervals end; all others are."""
    run = tmp_path / "run"
    for steps in (3, 5):  # the second command resumes
        train.main([*flags(data, run, "--max_steps", str(steps)), "--log_interval", "1"])
    with (run / "progress.csv").open() as file:
        rates = {int(row["step"]): row["images_per_second"] for row in csv.DictReader(file)}
    assert [step for step, rate in rates.items() if not rate] == [1, 4]
    assert list(rates) == [1, 2, 3, 4, 5]


def test_two_processes_with_zero2_and_their_resume(data: Path, tmp_path: Path) -> None:
    """Under torchrun, four steps equal two and then two more by the same command, and every rank takes its share."""
    script = str(ROOT / "fastdiff" / "train.py")
    settings = ("--zero_stage", "2", "--microbatch", "1", "--loader", "pillow", "--save_interval", "2")
    run_ranks([script, *flags(data, tmp_path / "whole", *settings, "--max_steps", "4")])
    run_ranks([script, *flags(data, tmp_path / "parts", *settings, "--max_steps", "2")])
    out = run_ranks([script, *flags(data, tmp_path / "parts", *settings, "--max_steps", "4")])
    assert "at step 2" in out
    whole, parts = (
        torch.load(tmp_path / run / "checkpoints" / "step_000004" / "ema_0.9999_000004.pt", weights_only=True)
        for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "4 = 2 processes x 1 images x 2 times" in out


def test_deepspeed_launcher_and_its_json(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    content = {
        "model": tiny.MODEL,
        "diffusion": {"diffusion_steps": 50},
        "train": {"batch_size": 4, "max_steps": 2},
        "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    }
    config.write_text(json.dumps(content))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "fastdiff/train.py", "--config", str(config), "--data_dir", str(data)]
    done = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bf16" in done.stdout
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["train"]["precision"] == "bf16"
    assert stored["train"]["zero_stage"] == 1


WITHOUT_DEEPSPEED = f"""
import runpy, sys
import torch.distributed as dist
sys.modules["deepspeed"] = dist.init_process_group = None  # importing the one and calling the other fails
runpy.run_path({str(ROOT / "fastdiff" / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
        [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--log_level", "error"],
    ],
    ids=["python", "torchrun", "deepspeed"],
)
def test_one_process_needs_neither_deepspeed_nor_a_group(launcher: list[str], data: Path, tmp_path: Path) -> None:
    """However it is started; a setting that only DeepSpeed knows is refused without it."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_DEEPSPEED)
    more = ("--max_steps", "2", "--sample_interval", "2", "--schedule_sampler", "loss-second-moment")
    command = [*launcher, str(script), *flags(data, tmp_path / "run", *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step: on the device alone (one process)" in done.stdout
    refused = subprocess.run(
        [*command, "--zero_stage", "2"], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300
    )
    assert refused.returncode, refused.stdout
    assert "training needs DeepSpeed, which can't be imported" in refused.stderr
    if launcher == [sys.executable]:
        assert refused.returncode == USER_ERROR


def test_where_files_go(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without_run_dir = flags(data, tmp_path, "--max_steps", "1")
    at = without_run_dir.index("--run_dir")
    del without_run_dir[at : at + 2]
    train.main([*without_run_dir, "--name", "mine"])
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "step_000001").is_dir()
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logdir"))
    train.main(without_run_dir)
    assert (tmp_path / "logdir" / "checkpoints" / "step_000001").is_dir()


def test_profile_of_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--profile writes its files and prints a table; a run that ends before, or while it records, says so."""
    train.main(flags(data, tmp_path / "long", "--profile", "2", "--max_steps", str(SETTLING + 2)))
    assert f"profile, in {tmp_path / 'long' / 'profile'}:" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "long" / "profile").iterdir()} >= {"profile.json", "trace.json.gz"}
    train.main(flags(data, tmp_path / "long", "--profile", "2", "--max_steps", str(SETTLING + 2)))  # no step is left
    assert "no profile" not in capsys.readouterr().out
    words = flags(data, tmp_path / "short", "--profile", "2", "--max_steps", str(SETTLING + 1))
    ended = subprocess.run(
        [sys.executable, str(ROOT / "fastdiff" / "train.py"), *words], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr  # a profiler that is left open crashes the process at its end
    assert f"no profile: it takes {SETTLING} steps to settle and 2 more" in ended.stdout
    assert not (tmp_path / "short" / "profile").exists()


def test_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    train.main(flags(data, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "peak memory" in out
    assert str(tmp_path / "run") in out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_of_a_loss_that_is_not_finite(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A non-finite loss enters no mean; if none is finite, the report shows nan."""
    monkeypatch.setattr(LossMeter, "read", lambda self: {"bad_losses": 8.0})
    train.main(flags(data, tmp_path / "run", "--dry_run"))
    assert "first loss     nan" in capsys.readouterr().out


def test_another_model_in_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "1"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for change in (["--num_heads", "2"], ["--diffusion_steps", "200"], ["--num_res_blocks", "2"]):
        with pytest.raises(UserError, match=change[0].removeprefix("--")):
            train.main([*flags(data, run, "--max_steps", "2"), *change])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_attention_at_no_level(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given resolutions of no level are refused in a new run; a default of none is warned about."""
    for main, size, more in (
        (train.main, "image size 24x24", ("--image_size", "24")),
        (super_res_train.main, "large size 24x24", ("--large_size", "24", "--small_size", "12")),
    ):
        small = {**tiny.MODEL, **PROCESS, "data_dir": data, "batch_size": 4, "max_steps": 1}
        del small["image_size"], small["attention_resolutions"]
        words = [*tiny.flags(small), *more]
        message = tiny.refusal(main, [*words, "--run_dir", tmp_path / "refused", "--attention_resolutions", "8"])
        assert message.startswith(f"--attention_resolutions 8: a network for the {size} has no level of that size;")
        assert message.endswith("its levels are 24x24, 12x12: give e.g. --attention_resolutions 12")
        assert not (tmp_path / "refused").exists()
        capsys.readouterr()
        main([*words, "--run_dir", str(tmp_path / size)])
        assert "warning: the default attention_resolutions 16,8 put attention at the full" in capsys.readouterr().out
        assert "warning: the default attention_resolutions" in (tmp_path / size / "log.txt").read_text()
        main([*words, "--run_dir", str(tmp_path / f"{size} none"), "--attention_resolutions", ""])
        assert "attention_resolutions" not in capsys.readouterr().out


def test_stored_attention_at_no_level_stays(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was begun with such resolutions goes on without a word, also where the command names them."""
    begun = {**tiny.MODEL, **PROCESS, "image_size": 12, "data_dir": data, "batch_size": 4}
    del begun["attention_resolutions"]
    train.main(tiny.flags({**begun, "max_steps": 1, "run_dir": tmp_path / "run"}))
    assert "warning: the default attention_resolutions 16,8" in capsys.readouterr().out
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    kept = {"max_steps": 2, "attention_resolutions": "16,8"}  # 12 // 8 is 1, the factor of the full size
    for name, more in {"run": {}, "new": {"resume_checkpoint": step}}.items():
        train.main(tiny.flags({**begun, **kept, **more, "run_dir": tmp_path / name}))
    bare = {"data_dir": data, "batch_size": 4, "max_steps": 2, "resume_checkpoint": step}
    train.main(tiny.flags({**bare, "run_dir": tmp_path / "bare"}))
    out = capsys.readouterr().out
    assert out.count("at step 1") == 3
    assert "attention_resolutions" not in out


def test_starting_from_other_checkpoints(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model is resumed with the files beside it; for a bare model or an average the log says what is missing."""
    first = tmp_path / "first"
    train.main(flags(data, first, "--max_steps", "2", "--save_interval", "2"))
    step = first / "checkpoints" / "step_000002"
    resume = ["--resume_checkpoint", str(step / "model000002.pt")]
    train.main(flags(data, tmp_path / "second", "--max_steps", "3", *resume))
    train.main(flags(data, first, "--max_steps", "3"))
    ours, theirs = (
        torch.load(tmp_path / run / "checkpoints" / "step_000003" / "model000003.pt", weights_only=True)
        for run in ("first", "second")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    bare = tmp_path / "model000100.pt"
    state = torch.load(step / "model000002.pt", weights_only=True)
    torch.save(dict(state), bare)
    capsys.readouterr()
    train.main(flags(data, tmp_path / "third", "--max_steps", "101", "--resume_checkpoint", str(bare)))
    out = capsys.readouterr().out
    assert "no optimiser state" in out
    assert "no ema_0.9999" in out
    assert (tmp_path / "third" / "checkpoints" / "step_000101").is_dir()
    ema = ["--resume_checkpoint", str(step / "ema_0.9999_000002.pt")]
    train.main(flags(data, tmp_path / "fourth", "--max_steps", "1", *ema))
    assert "initial weights" in capsys.readouterr().out


def test_checkpoints_that_do_not_belong_together(data: Path, tmp_path: Path) -> None:
    """An average of another model and an optimiser without moments are named, and nothing is written."""
    train.main(flags(data, tmp_path / "run", "--max_steps", "1"))
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    resume = ["--resume_checkpoint", str(step)]
    (step / "manifest.json").unlink()  # it would reveal that the files were changed
    average = step / "ema_0.9999_000001.pt"
    whole = average.read_bytes()
    state = torch.load(average, weights_only=True)
    state["out.2.bias"] = torch.zeros(9)
    torch.save(state, average)
    with pytest.raises(UserError, match=r"ema_0\.9999_000001\.pt is of another model"):
        train.main(flags(data, tmp_path / "other", "--max_steps", "2", *resume))
    average.write_bytes(whole)
    moments = torch.load(step / "opt000001.pt", weights_only=True)
    del moments["state"][3]["exp_avg"]
    torch.save(moments, step / "opt000001.pt")
    with pytest.raises(UserError, match=r"opt000001\.pt holds no moments"):
        train.main(flags(data, tmp_path / "other", "--max_steps", "2", *resume))
    assert not (tmp_path / "other").exists()


def test_another_scripts_run_and_another_chains_history_are_refused(data: Path, tmp_path: Path) -> None:
    """A folder belongs to one script, and the loss-aware sampler's history to one number of steps."""
    aware = ("--schedule_sampler", "loss-second-moment", "--max_steps")
    train.main(flags(data, tmp_path / "run", *aware, "1"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "kind": "super_res"}))
    with pytest.raises(UserError, match=r"holds a run of super_res_train\.py"):
        train.main(flags(data, tmp_path / "run", *aware, "2"))
    resume = ("--resume_checkpoint", str(tmp_path / "run" / "checkpoints" / "step_000001"))
    changed = ("--diffusion_steps", "60", "--allow_change", "diffusion_steps")
    with pytest.raises(UserError, match="--schedule_sampler: the timestep sampler's history"):
        train.main(flags(data, tmp_path / "other", *aware, "2", *changed, *resume))
    assert not (tmp_path / "other").exists()


def test_deepspeed_refuses_its_json(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "bad.json"
    config.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "many"}}))
    with pytest.raises(UserError, match="deepspeed: DeepSpeed refuses"):
        train.main(flags(data, tmp_path / "run", "--max_steps", "1", "--deepspeed", str(config)))
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_skipped_until_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = make_pictures(tmp_path / "data", count=12)
    (data / "class0_bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    train.main(flags(data, tmp_path / "one", "--max_steps", "4"))
    assert "class0_bad.png" in caplog.text
    assert "class0_bad.png" in (tmp_path / "one" / "log.txt").read_text()
    assert "unreadable files left out: 1" in capsys.readouterr().out
    for i in range(3):
        (data / f"class1_bad{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="4 of 16 images can't be read"):
        train.main(flags(data, tmp_path / "many", "--max_steps", "40"))
    listed = (tmp_path / "many" / "unreadable_images.txt").read_text().splitlines()
    assert listed == sorted(map(str, data.glob("*bad*")))
    assert listed[0] in json.loads((tmp_path / "many" / "status.json").read_text())["reason"]
    with pytest.raises(UserError, match="4 of 16 images") as found:
        train.main([*flags(data, tmp_path / "dry", "--batch_size", "16"), "--dry_run"])
    assert not (tmp_path / "dry").exists()
    elsewhere = Path(str(found.value).partition("rm < ")[2])
    assert elsewhere.read_text().splitlines() == listed
    shutil.rmtree(elsewhere.parent)


@pytest.mark.parametrize("small_size", [8, 4])
def test_super_resolution(data: Path, tmp_path: Path, small_size: int) -> None:
    model = {**tiny.SUPER_RES, **PROCESS, "small_size": small_size, "class_cond": True, "num_classes": 3}
    settings = {"batch_size": 4, "max_steps": 2, "sample_interval": 2, "sample_count": 4}
    super_res_train.main(tiny.flags({**model, **settings, "data_dir": data, "run_dir": tmp_path / "run"}))
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_000002" / "model000002.pt", weights_only=True)
    assert state["input_blocks.0.0.weight"].shape[1] == 6
    assert weights.info_of(state)["kind"] == "super_res"
    assert (tmp_path / "run" / "samples" / "step_000002.png").is_file()
    with pytest.raises(UserError, match="super_res_train"):
        train.main(
            flags(data, tmp_path / "other", "--resume_checkpoint", str(tmp_path / "run/checkpoints/step_000002"))
        )


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_gray_and_rgba(tmp_path: Path, channels: int, mode: str) -> None:
    data = make_pictures(tmp_path / "data", mode=mode)
    more = ("--in_channels", str(channels), "--max_steps", "2", "--sample_interval", "2")
    train.main(flags(data, tmp_path / "run", *more))
    with Image.open(tmp_path / "run" / "samples" / "step_000002.png") as picture:
        assert picture.mode == mode


def test_the_loss_falls(tmp_path: Path) -> None:
    """Two flat pictures are learnt within a hundred steps."""
    data = tmp_path / "data"
    data.mkdir()
    for name, level in (("dark_0.png", 40), ("light_0.png", 210)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(data / name)
    more = ("--max_steps", "80", "--log_interval", "10", "--save_interval", "80", "--batch_size", "8")
    train.main(flags(data, tmp_path / "run", *more))
    with (tmp_path / "run" / "progress.csv").open() as file:
        mse = [float(row["mse"]) for row in csv.DictReader(file)]
    assert mse[-1] < 0.35 * mse[0], mse


def test_files_load_in_a_plain_network(data: Path, tmp_path: Path) -> None:
    """Checkpoints are plain fp32 state_dicts in the order of the parameters, which torch alone can read."""
    train.main(flags(data, tmp_path / "run", "--max_steps", "1", "--precision", "bf16"))
    state = torch.load(tmp_path / "run/checkpoints/step_000001/ema_0.9999_000001.pt", weights_only=True)
    settings = UNetSettings(**weights.info_of(state)["model"])
    model = build_model(settings)
    assert list(state) == list(model.state_dict())
    assert {value.dtype for value in state.values()} == {torch.float32}
    model.load_state_dict(state)


def test_from_another_folder(data: Path, tmp_path: Path) -> None:
    """The script works from any directory, by its path."""
    command = [sys.executable, str(ROOT / "fastdiff" / "train.py"), *flags(data, tmp_path / "run", "--dry_run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout


@pytest.mark.parametrize(("stage", "sections"), [(2, ["optimizer"]), (3, ["optimizer", "param"])])
def test_offloading_to_the_cpu(stage: int, sections: list[str], data: Path, tmp_path: Path) -> None:
    """DeepSpeed's JSON needs nothing besides, and the averages are those of a run that offloads nothing."""
    given = {"zero_optimization": {"stage": stage, **{f"offload_{each}": {"device": "cpu"} for each in sections}}}
    (tmp_path / "offload.json").write_text(json.dumps(given))
    more = ("--max_steps", "3", "--save_interval", "2")
    train.main(flags(data, tmp_path / "kept", *more, "--zero_stage", str(stage)))
    train.main(flags(data, tmp_path / "moved", *more, "--deepspeed", str(tmp_path / "offload.json")))
    files = [tmp_path / run / "checkpoints/step_000003/ema_0.9999_000003.pt" for run in ("kept", "moved")]
    kept, moved = (torch.load(file, weights_only=True) for file in files)
    assert kept.keys() == moved.keys()
    assert all(torch.equal(kept[name], moved[name]) for name in kept)
