"""Settings with which a run would change nothing are refused or warned about, and others are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.tiny import nothing_written, refusal

from fastdiff import super_res_train, train
from fastdiff.errors import UserError
from fastdiff.training.effect import check_effect, effect_warnings
from fastdiff.training.optimizer import learning_rate
from fastdiff.training.settings import TrainSettings


@pytest.mark.parametrize(("steps", "anneal"), [(11, 10), (2000, 700), (10**9, 1)])
def test_steps_past_the_end_of_annealing(steps: int, anneal: int) -> None:
    settings = TrainSettings(max_steps=steps, lr_anneal_steps=anneal)
    assert learning_rate(settings, steps - 1) == 0
    wanted = f"--max_steps {steps} is past --lr_anneal_steps {anneal}, .* give --lr_anneal_steps {steps}, .*"
    with pytest.raises(UserError, match=wanted + f"--lr_anneal_steps 0 .* or --max_steps {anneal}$"):
        check_effect(settings)


@pytest.mark.parametrize("steps", [0, 1, 9, 10])
def test_steps_up_to_the_end_of_annealing(steps: int) -> None:
    settings = TrainSettings(max_steps=steps, lr_anneal_steps=10)
    check_effect(settings)
    assert learning_rate(settings, settings.last_step - 1) > 0


def test_decay_that_leaves_no_weights() -> None:
    with pytest.raises(UserError, match=r"--weight_decay 1000 with --lr 0\.001 takes every weight to 0"):
        check_effect(TrainSettings(lr=1e-3, weight_decay=1000))
    check_effect(TrainSettings(lr=1e-3, weight_decay=999))


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "warm-up": ({"max_steps": 100, "lr_warmup_steps": 400, "ema_rate": 0.9}, "learning rate reaches 2.5e-05 at most"),
    "warm-up to the end": (
        {"lr_anneal_steps": 50, "lr_warmup_steps": 50, "ema_rate": 0.9},
        "lr_warmup_steps 50 are not",
    ),
    "no average": ({"max_steps": 1000, "ema_rate": "0.9,0"}, "ema_rate 0 keeps no average"),
    "slow average": ({"max_steps": 1000}, "90% of the average with ema_rate 0.9999, .* give e.g. --ema_rate 0.99$"),
    "slowest average": ({"ema_rate": 0.9999999}, "90% of the average .* give e.g. --ema_rate 0.9999$"),
    "rate": ({"lr": 1e-20}, "lr 1e-20 is so small"),
}


@pytest.mark.parametrize("case", WARNED)
def test_warnings(case: str) -> None:
    settings, message = WARNED[case]
    (line,) = effect_warnings(TrainSettings.model_validate(settings))
    assert re.search(f"^warning: .*{message}", line), line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 2},
        {"max_steps": 100_000, "lr_warmup_steps": 5000, "lr_anneal_steps": 200_000, "weight_decay": 0.05},
        {"max_steps": 1000, "ema_rate": "0.99,0.9", "save_interval": 5000, "sample_interval": 2000},
    ],
)
def test_usual_settings(settings: dict[str, Any]) -> None:
    usual = TrainSettings.model_validate(settings)
    check_effect(usual)
    assert not effect_warnings(usual)


def words(data: Path, run: Path, **settings: Any) -> list[str]:
    given = {"data_dir": data, "run_dir": run, "batch_size": 4, "loader": "pillow", **tiny.MODEL}
    return tiny.flags({**given, **tiny.DIFFUSION, **settings})


@pytest.mark.slow
def test_a_run_extended_past_its_annealing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train.main(words(data, run, lr_anneal_steps=2))
    with nothing_written(run):
        for given in (words(data, run), words(data, tmp_path / "new", resume_checkpoint=run)):
            message = refusal(train.main, [*given, "--lr_anneal_steps", "2", "--max_steps", "4"])
            assert "--max_steps 4 is past --lr_anneal_steps 2" in message
    capsys.readouterr()
    train.main(words(data, run, lr_anneal_steps=2))
    assert (
        "nothing is left to do: the run is at step 2 and ends after step 2 (lr_anneal_steps)" in capsys.readouterr().out
    )
    train.main(words(data, run, lr_anneal_steps=4, max_steps=4))
    out = capsys.readouterr().out
    assert "lr_anneal_steps is 4 from here on; it was 2" in out
    assert "done: 4 steps" in out


@pytest.mark.slow
def test_a_new_run_without_steps(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(words(data, run, max_steps=3))
    for more, end in (({"max_steps": 3}, "3 (max_steps)"), ({"lr_anneal_steps": 2}, "2 (lr_anneal_steps)")):
        message = refusal(train.main, words(data, tmp_path / "new", resume_checkpoint=run, **more))
        assert message.startswith(f"--resume_checkpoint: {run} is at step 3, and the run ends after step {end};")
    assert not (tmp_path / "new").exists()
    train.main(words(data, tmp_path / "new", resume_checkpoint=run, max_steps=4))
    given = {"data_dir": data, "run_dir": tmp_path / "large", **tiny.SUPER_RES, **tiny.DIFFUSION}
    message = refusal(super_res_train.main, tiny.flags({**given, "max_steps": 30, "lr_anneal_steps": 20}))
    assert "--max_steps 30 is past --lr_anneal_steps 20" in message
