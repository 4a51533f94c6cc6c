"""A run loses nothing when it is stopped, finds damage or non-finite numbers, or is started with other settings."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
import torch
from helpers.train_flags import flags

from fastdiff import errors, train
from fastdiff.diffusion.samplers import Step
from fastdiff.errors import StopWith, UserError
from fastdiff.images.loader import Batch
from fastdiff.runtime import files, machine
from fastdiff.sampling.engine import Engine
from fastdiff.training.checkpoints import resume
from fastdiff.training.checkpoints.folder import list_checkpoints, step_of
from fastdiff.training.checkpoints.manifest import find_damage
from fastdiff.training.checkpoints.saver import Saver
from fastdiff.training.metrics import LossResult
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.slow


def steps_of(run: Path) -> list[int]:
    """Return the steps of the checkpoints, and assert that all are whole."""
    folders = list_checkpoints(run / "checkpoints")
    assert [find_damage(folder) for folder in folders] == [""] * len(folders)
    return [step_of(folder) for folder in folders]


def status_of(run: Path) -> tuple[str, int, int | None]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["step"], status["exit_code"]


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "progress.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait", "memory_gb") and v}
            for row in csv.DictReader(file)
        ]


def same_weights(run: Path, other: Path, step: int) -> bool:
    name = f"checkpoints/step_{step:06d}/ema_0.9999_{step:06d}.pt"
    a, b = (torch.load(folder / name, weights_only=True) for folder in (run, other))
    return all(torch.equal(a[key], b[key]) for key in b)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Call `act` once, before a step is taken."""
    take = Trainer.take_step

    def take_step(self: Trainer) -> None:
        if self.step + 1 == step and not done:
            done.append(True)
            act()
        take(self)

    done: list[bool] = []
    monkeypatch.setattr(Trainer, "take_step", take_step)


def test_ctrl_c_in_the_first_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save: the run ends at once, whether it is new or resumed."""
    argv = flags(data, tmp_path / "run", "--max_steps", "5", "--save_interval", "2")
    for first, then in ((1, "starts again"), (3, "resumes from the last checkpoint")):
        with monkeypatch.context() as patched:
            at_step(patched, first, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(StopWith, match=f"before the first step was finished; the same command {then}") as stop:
                train.main(argv)
        assert stop.value.code == errors.INTERRUPTED == 130
        assert status_of(tmp_path / "run") == ("interrupted", first - 1, 130)
        if first == 1:
            with monkeypatch.context() as patched:
                at_step(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
                with pytest.raises(StopWith, match="stopped by SIGTERM after step 2"):
                    train.main(argv)
    train.main(argv)
    assert status_of(tmp_path / "run") == ("done", 5, 0)


def test_ctrl_c_during_a_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That checkpoint becomes whole, a further step is taken and saved, and two signals at once count as one."""
    save = Saver.save

    def interrupted_save(self: Saver, step: int, *args: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        save(self, step, *args)

    monkeypatch.setattr(Saver, "save", interrupted_save)
    with pytest.raises(StopWith, match="stopped by Ctrl-C after step 3; everything is saved"):
        train.main(flags(data, tmp_path / "run", "--max_steps", "5", "--save_interval", "2"))
    assert steps_of(tmp_path / "run") == [2, 3]
    assert status_of(tmp_path / "run") == ("interrupted", 3, 130)
    assert capsys.readouterr().err.count("a second Ctrl-C ends the run at once") == 1


def test_ctrl_c_in_a_dry_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StopWith, match="stopped by Ctrl-C before the first step") as stop:
        train.main(flags(data, tmp_path / "run", "--dry_run"))
    assert stop.value.code == 130
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "name", "end"),
    [
        (signal.SIGTERM, "SIGTERM", ("preempted", 75)),
        (signal.SIGUSR1, "SIGUSR1", ("preempted", 75)),
        (signal.SIGINT, "Ctrl-C", ("interrupted", 130)),
    ],
)
def test_asked_to_stop(
    number: int, name: str, end: tuple[str, int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is finished and saved, and the same command then reaches the results of an undisturbed run."""
    argv = flags(data, tmp_path / "run", "--max_steps", "7", "--log_interval", "3")
    with monkeypatch.context() as patched:
        at_step(patched, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(StopWith, match=f"stopped by {name} after step 4; everything is saved") as stop:
            train.main(argv)
    state, code = end
    assert stop.value.code == code
    assert steps_of(tmp_path / "run") == [4]
    assert status_of(tmp_path / "run") == (state, 4, code)
    train.main(argv)
    assert status_of(tmp_path / "run") == ("done", 7, 0)
    train.main(flags(data, tmp_path / "straight", "--max_steps", "7", "--log_interval", "3"))
    assert same_weights(tmp_path / "run", tmp_path / "straight", 7)
    # Step 4 was in the middle of a log interval, whose row is the mean over the steps before and after the stop.
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["3", "6", "7"]


def test_a_damaged_newest_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "4", "--save_interval", "2"))
    file = run / "checkpoints" / "step_000004" / "opt000004.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (run / "checkpoints" / ".step_000006.partial").mkdir()
    train.main(flags(data, run, "--max_steps", "3", "--keep_last", "1"))
    assert steps_of(run) == [3]
    train.main(flags(data, run, "--max_steps", "6", "--save_interval", "2"))
    out = capsys.readouterr().out
    assert "step_000004 is damaged (opt000004.pt has another content than was written) and left out" in out
    assert "step_000004 is kept as step_000004.damaged" in out
    assert "at step 2" in out
    assert "an unfinished checkpoint (step_000006) is cleared away" in out
    assert steps_of(run) == [3, 4, 6]
    train.main(flags(data, tmp_path / "straight", "--max_steps", "6"))
    assert same_weights(run, tmp_path / "straight", 6)


@pytest.mark.parametrize("name", ["config.json", "status.json", "latest"])
def test_a_disk_without_room_for_small_files(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file meets the full disk, the error is one sentence, and the run continues once there is room."""
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "1"))
    write = files.atomic_write

    def full(path: Path, *, sync: bool = True) -> AbstractContextManager[BinaryIO]:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, sync=sync)

    with monkeypatch.context() as patched:
        patched.setattr(files, "atomic_write", full)
        with pytest.raises(UserError, match=r"--run_dir: .*can't be written.*No space left on device"):
            train.main(flags(data, run, "--max_steps", "2"))
    train.main(flags(data, run, "--max_steps", "3"))
    assert status_of(run) == ("done", 3, 0)
    assert steps_of(run)[-1] == 3


def test_another_disk_without_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and not the run's folder: a compiler's cache may lie elsewhere."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/of/triton")

    at_step(monkeypatch, 2, full)
    with pytest.raises(
        UserError, match=r"^/cache/of/triton can't be written to \(No space left on device\); make room"
    ):
        train.main(flags(data, tmp_path / "run", "--max_steps", "3"))


def test_keeping_few_and_saving_by_the_clock(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "9", "--save_interval", "1", "--keep_last", "2", "--keep_every", "4"))
    assert steps_of(run) == [4, 8, 9]
    often = tmp_path / "often"
    train.main(flags(data, often, "--max_steps", "4", "--save_interval", "0.0001min"))
    assert steps_of(often) == [1, 2, 3, 4]
    seldom = tmp_path / "seldom"
    train.main(flags(data, seldom, "--max_steps", "4", "--save_interval", "30 minutes"))
    assert steps_of(seldom) == [4]


def test_in_the_foreground_too(data: Path, tmp_path: Path) -> None:
    for beside in ("True", "False"):
        more = ("--max_steps", "3", "--save_interval", "1", "--save_in_background", beside)
        train.main(flags(data, tmp_path / beside, *more))
    assert steps_of(tmp_path / "True") == steps_of(tmp_path / "False") == [1, 2, 3]
    assert same_weights(tmp_path / "True", tmp_path / "False", 2)


def test_another_batch_or_seed_must_be_allowed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "2"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for name, value in (("batch_size", "6"), ("seed", "1")):
        for folder, more in ((run, ()), (tmp_path / "new", ("--resume_checkpoint", str(run)))):
            with pytest.raises(UserError, match=f"--{name} {value}: .*--allow_change {name}"):
                train.main(flags(data, folder, "--max_steps", "3", f"--{name}", value, *more))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    capsys.readouterr()
    more = ("--batch_size", "6", "--seed", "1", "--lr", "2e-3", "--allow_change", "batch_size,seed")
    train.main(flags(data, run, "--max_steps", "3", "--log_interval", "1", *more))
    out = capsys.readouterr().out
    assert "batch_size is 6 from here on; it was 4" in out
    assert "seed is 1 from here on; it was 0" in out
    assert "lr is 0.002 from here on; it was 0.001" in out
    assert "max_steps is" not in out
    assert rows_of(run)[-1]["samples"] == "14"


def test_two_runs_in_one_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train.main(flags(data, run, "--max_steps", "1"))
    monkeypatch.setattr(resume, "LOCK_WAIT", 0.1)
    with (run / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"process \d+ on .* is training in .*run; stop it"):
            train.main(flags(data, run, "--max_steps", "2"))
    train.main(flags(data, run, "--max_steps", "2"))


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[Trainer], bool]) -> None:
    """Make losses NaN in the steps for which `bad` is true."""
    real = Trainer.losses

    def losses(self: Trainer, network: Any, batch: Batch) -> LossResult:
        result = real(self, network, batch)
        return result._replace(loss=result.loss * float("nan")) if bad(self) else result

    monkeypatch.setattr(Trainer, "losses", losses)


def test_going_back_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If losses are NaN from step 6 on, the run goes back to step 4 and continues with another stream of images.

    Step 8 was saved since then, and only one checkpoint is to be kept.
    """
    run = tmp_path / "run"
    spoil(monkeypatch, lambda trainer: trainer.step >= 5 and trainer.stream_seed == trainer.train.seed)
    limits = ("--max_bad_steps", "5", "--keep_last", "1")
    more = ("--max_steps", "14", "--save_interval", "4", "--log_interval", "1", *limits)
    train.main(flags(data, run, *more))
    out = capsys.readouterr().out
    assert "5 steps in a row had a non-finite loss or gradient" in out
    assert "going back to" in out
    assert status_of(run) == ("done", 14, 0)
    assert steps_of(run) == [14]
    rows = rows_of(run)
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert all("skipped_steps" not in row for row in rows)  # the skipped steps are removed from the table
    state = torch.load(run / "checkpoints" / "step_000014" / "state.pt", weights_only=True)
    assert state["rollbacks"] == 1
    assert state["stream_seed"] != 0
    assert state["updates"] == 14
    # A resumed run keeps the new stream; with the old one its losses would be NaN again.
    train.main([*flags(data, run, *more), "--max_steps", "16"])
    assert torch.load(run / "checkpoints/step_000016/state.pt", weights_only=True)["skipped_steps"] == 0


def test_numbers_that_stay_bad(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes back once, and then ends with a diagnosis and exit code 77; the good checkpoint is kept."""
    run = tmp_path / "run"
    spoil(monkeypatch, lambda trainer: trainer.step >= 3)
    more = ("--max_steps", "40", "--save_interval", "2", "--log_interval", "1", "--max_bad_steps", "3")
    with pytest.raises(StopWith, match="once more; the diagnosis is in") as stop:
        train.main(flags(data, run, *more))
    assert stop.value.code == errors.DIVERGED == 77
    assert status_of(run)[::2] == ("diverged", 77)
    out = capsys.readouterr().out
    assert out.count("going back to") == 1
    diagnosis = json.loads((run / "diagnosis.json").read_text())
    assert diagnosis["worst"]
    assert "timestep" in out
    assert 2 in steps_of(run)
    skipped = [row["skipped_steps"] for row in rows_of(run) if "skipped_steps" in row]
    assert skipped == sorted(skipped, key=float)


def test_bad_numbers_before_any_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda trainer: True)
    with pytest.raises(StopWith, match="there is no checkpoint from before"):
        train.main(flags(data, tmp_path / "run", "--max_steps", "40", "--max_bad_steps", "3"))
    assert not steps_of(tmp_path / "run")


def test_previews_that_are_not_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nan = torch.full((4, 3, 8, 8), float("nan"))
    monkeypatch.setattr(Engine, "steps", lambda *_, **__: iter([Step(0, nan, nan)]))
    train.main(flags(data, tmp_path / "run", "--max_steps", "2", "--sample_interval", "1"))
    assert "the samples after step 1 are not finite" in caplog.text
    assert not (tmp_path / "run" / "samples").exists()


def test_asked_to_stop_while_drawing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is abandoned, because the time until the end may be short, and the last step is saved."""
    steps = Engine.steps

    def stopped(*args: Any, **kwargs: Any) -> Iterator[Step]:
        for step in steps(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            yield step
            raise AssertionError("it continues to draw")

    monkeypatch.setattr(Engine, "steps", stopped)
    with pytest.raises(StopWith, match="stopped by SIGTERM after step 3"):
        train.main(flags(data, tmp_path / "run", "--max_steps", "9", "--sample_interval", "2"))
    assert status_of(tmp_path / "run") == ("preempted", 3, 75)
    assert steps_of(tmp_path / "run") == [3]
    assert not (tmp_path / "run" / "samples").exists()


def test_another_run_that_began_meanwhile(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two runs start in a folder at once, the later one must not overwrite what the other has saved."""
    run, make = tmp_path / "run", Trainer.__init__

    def build(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        (run / ".lock").touch()

    run.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", build)
        with pytest.raises(UserError, match="another run has begun in .*run since this one started"):
            train.main(flags(data, run, "--max_steps", "2"))
    assert not (run / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_as_many_threads_as_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run keeps the number on a CPU, because another one would change the last bits of sums."""
    count = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "allowed_cores", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    try:
        for busy, steps in ((0, "2"), (50, "3")):
            monkeypatch.setattr(psutil, "cpu_percent", lambda interval, busy=busy: busy)
            train.main(flags(data, tmp_path / "run", "--max_steps", steps))
        assert torch.get_num_threads() == 2
        assert "threads: 2, as before" in capsys.readouterr().out
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        train.main(flags(data, tmp_path / "run", "--max_steps", "4"))
        assert "threads: 1, where the run had 2" in capsys.readouterr().out
    finally:
        torch.set_num_threads(count)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_trying_threads_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose number of threads was tried has the bits of one that was given it, and keeps it when resumed."""
    count = torch.get_num_threads()
    monkeypatch.setattr(machine, "allowed_cores", lambda: 2)
    monkeypatch.setattr("fastdiff.training.run.WORTHWHILE_TRIAL", 1)
    monkeypatch.setattr(machine, "_mean_seconds", lambda work: (work(), float(torch.get_num_threads()))[1])
    more = ["--dropout", "0.1", "--ema_rate", "0.9"]
    try:
        torch.set_num_threads(1)
        train.main(flags(data, tmp_path / "given", "--max_steps", "2", *more))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        capsys.readouterr()
        train.main(flags(data, tmp_path / "tried", "--max_steps", "2", *more))
        assert "threads: 1 from here on, by trial (the network takes 1 s with 1, " in capsys.readouterr().out
        train.main(flags(data, tmp_path / "tried", "--max_steps", "3", *more))
        printed = capsys.readouterr().out
        assert "threads: 1, as before" in printed
        assert "by trial" not in printed
    finally:
        torch.set_num_threads(count)
    one, other = (
        torch.load(tmp_path / run / "checkpoints/step_000002/model000002.pt", weights_only=True)
        for run in ("given", "tried")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_detect_anomaly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first non-finite operation is named, and the exit code is 77."""
    real = Trainer.take_step

    def take_step(self: Trainer) -> None:
        if self.step == 1:
            self.master_weights.shards[5].detach().view(-1)[0] = 3e38
        real(self)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(StopWith) as stop:
        train.main(flags(data, tmp_path / "run", "--max_steps", "4", "--detect_anomaly", "True"))
    assert stop.value.code == errors.DIVERGED
    assert "input_blocks" in str(stop.value)
    assert status_of(tmp_path / "run")[::2] == ("diverged", 77)
    with pytest.raises(UserError, match="--detect_anomaly True contradicts compile True"):
        train.main(flags(data, tmp_path / "other", "--detect_anomaly", "True", "--compile", "True"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--save_interval", "0"), "at least 1, or minutes such as 30min, not '0'"),
        (("--save_interval", "ten"), "or minutes such as 30min, not 'ten'"),
        (("--save_interval", "0min"), "or minutes such as 30min"),
        (("--keep_every", "4"), "keep_every 4 needs keep_last"),
        (("--allow_change", "lr"), "must be among batch_size, .*seed, .*noise_schedule, .*, not 'lr'"),
        (("--allow_change", "num_channels"), "must be among batch_size, .*, not 'num_channels'"),
        (("--allow_change", "noise_shedule"), "not 'noise_shedule'; did you mean noise_schedule?"),
        (("--stall_minutes", "0"), "stall_minutes"),
        (("--run_dir", "r" * 300), "--run_dir: 'rrr.*can't be opened"),
        (("--run_dir", os.fsdecode(b"b\xff")), r"--run_dir: 'b\\udcff' is not Unicode"),
        (("--resume_checkpoint", "r" * 300), "--resume_checkpoint: 'rrr.*can't be opened"),
        (("--max_bad_steps", "-1"), "max_bad_steps"),
    ],
)
def test_settings_that_can_not_be(given: tuple[str, str], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train.main(flags(data, tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()
