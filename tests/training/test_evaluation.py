"""Scores of the averages during training: the table, the best average, stopping and resuming, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.killed import Killed, killed_after
from helpers.ranks import run_ranks
from helpers.tiny import nothing_written, pictures, refusal
from helpers.train_flags import flags
from training.test_nothing_lost import rows_of, same_weights, status_of, steps_of

from fastdiff import evaluate, super_res_train, train
from fastdiff.errors import StopWith, UserError
from fastdiff.evaluation.classifier import Classifier, write_classifier
from fastdiff.evaluation.judge import Judge, Verdict
from fastdiff.evaluation.metrics import Score
from fastdiff.models.weights import find, info_of, read_state_dict
from fastdiff.sampling.engine import Engine
from fastdiff.training import loop
from fastdiff.training.checkpoints.best import read_best, write_best
from fastdiff.training.checkpoints.folder import tidy
from fastdiff.training.evaluation import AverageEvaluation, Candidate, Result
from fastdiff.training.reporting import Reporter
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.slow

RATES, METRICS = "0.9999,0.5", "fid,precision"
CLASSES = ("--class_cond", "True", "--num_classes", "3", "--dropout", "0.1")
PLAIN = ("--max_steps", "6", "--ema_rate", RATES, "--microbatch", "2", "--save_interval", "100")


class Narrow(torch.nn.Module):
    """A network that only takes images of 64 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 3 * 64 * 64).float()


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature network of random weights for images of 8x8 pixels."""
    path = tmp_path_factory.mktemp("features") / "tiny.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        write_classifier(Classifier(3, (8, 8), 3).eval(), path)
    return path


@pytest.fixture
def argv(data: Path, network: Path) -> Callable[..., list[str]]:
    """argv(run, *more) returns the flags of a run of 6 steps that scores two averages after steps 2, 4 and 6."""

    def make(run: Path, *more: str) -> list[str]:
        given = ("--eval_interval", "2", "--eval_reference", str(data), "--eval_samples", "14")
        return flags(data, run, *PLAIN, *given, "--eval_features", str(network), "--eval_metrics", METRICS, *more)

    return make


def scores_of(run: Path) -> dict[int, dict[str, str]]:
    """Step → the scores in its row of progress.csv."""
    rows = {int(row["step"]): {k: v for k, v in row.items() if k.endswith(("_0.9999", "_0.5"))} for row in rows_of(run)}
    return {step: scores for step, scores in rows.items() if scores}


def test_scores_change_nothing_in_training(data: Path, tmp_path: Path, argv: Callable[..., list[str]]) -> None:
    """A run with scores has the weights and the losses of one without them, and its table has them besides."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    train.main(argv(run, *CLASSES, "--log_interval", "4"))
    scored, best = scores_of(run), read_best(run / "checkpoints")
    train.main(flags(data, plain, *PLAIN, *CLASSES, "--log_interval", "4"))
    assert same_weights(run, plain, 6)
    assert sorted(scored) == [2, 4, 6]
    names = {f"{metric}[classifier tiny]_{rate}" for metric in ("fd", "precision") for rate in RATES.split(",")}
    assert all(set(scores) == names for scores in scored.values())
    losses = [{k: v for k, v in row.items() if k not in names} for row in rows_of(run)]
    assert [row for row in losses if len(row) > 1] == rows_of(plain)  # the step that is logged has one row
    assert [int(row["step"]) for row in losses] == [2, 4, 6]
    log = (run / "log.txt").read_text()
    assert log.count("evaluation after step") == 3
    assert log.count("note: only 14 samples") == 1
    assert best["value"] == pytest.approx(
        min(float(scores[n]) for scores in scored.values() for n in names if "fd" in n)
    )


def test_scores_leave_global_state_as_it_was(
    tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random states, switches of PyTorch, the model's mode and the place in the stream of images."""
    score, seen = AverageEvaluation.score, []

    def state(trainer: Trainer) -> tuple[Any, ...]:
        switches = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads()
        modes = torch.is_grad_enabled(), trainer.model.training, torch.get_default_dtype()
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            *(switches, modes, trainer.step, trainer.samples, trainer.loader.state_dict()),
        )

    def watched(self: AverageEvaluation, trainer: Trainer, go_on: Callable[[], bool]) -> Result | None:
        before = state(trainer)
        result = score(self, trainer, go_on)
        seen.append(state(trainer) == before)
        return result

    monkeypatch.setattr(AverageEvaluation, "score", watched)
    train.main(argv(tmp_path / "run", *CLASSES, "--eval_metrics", "kid,is,fid,recall", "--eval_samples", "13"))
    assert seen == [True] * 3


def test_the_best_average_can_be_drawn_from(tmp_path: Path, argv: Callable[..., list[str]]) -> None:
    """It is the file of the checkpoint of its step, and evaluate.py finds the value that made it the best."""
    run = tmp_path / "run"
    train.main(argv(run, *CLASSES, "--save_interval", "2", "--keep_last", "1"))
    assert steps_of(run) == [6]
    best = read_best(run / "checkpoints")
    file = find(str(run / "checkpoints" / "best"))
    assert file.name == f"ema_{best['ema_rate']}_{best['step']:06d}.pt"
    newest = find(str(run))
    assert newest == run / "checkpoints" / "step_000006" / "ema_0.9999_000006.pt"
    state, reference = read_state_dict(file), read_state_dict(newest)
    assert info_of(state) == info_of(reference)
    assert best["step"] == 6  # of these rates the lower one learns from step to step
    same = read_state_dict(newest.with_name(file.name))
    assert all(torch.equal(state[name], same[name]) for name in same)
    drawing = ("--solver", "dpmpp_2m_sde", "--steps", "20", "--classes", "balanced", "--batch_size", "2")
    given = argv(run)
    pairs = dict(zip(given[::2], given[1::2], strict=True))
    judging = ("--reference", pairs["--eval_reference"], "--features", pairs["--eval_features"], "--resamplings", "0")
    out = tmp_path / "results"
    evaluate.main(
        ["--model_path", str(file.parent), *drawing, "--num_samples", "14", *judging, "--results_dir", str(out)]
    )
    (result,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert result["scores"]["fd[classifier tiny]"]["value"] == best["value"]


# --- stopping and resuming ---


@pytest.mark.parametrize("at", [4, 6], ids=["midway", "at the end"])
def test_stopped_while_drawing(
    at: int, tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation ends within a batch and writes nothing; the resumed run makes up for it."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    train.main(argv(straight))
    draw, drawn = Engine.draw, 0
    last = 14 * (at // 2 - 1) + 3  # each evaluation draws 14 batches

    def stopped(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        if drawn == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "draw", stopped)
        with pytest.raises(StopWith, match=f"stopped by SIGTERM after step {at}"):
            train.main(argv(run))
    assert drawn == last
    assert status_of(run) == ("preempted", at, 75)
    assert steps_of(run) == [at]
    assert sorted(scores_of(run)) == list(range(2, at, 2))
    assert read_best(run / "checkpoints")["step"] == at - 2
    assert f"the evaluation after step {at} is put off" in (run / "log.txt").read_text()
    train.main(argv(run))
    assert status_of(run) == ("done", 6, 0)
    assert scores_of(run) == scores_of(straight)
    assert read_best(run / "checkpoints") == read_best(straight / "checkpoints")
    assert same_weights(run, straight, 6)


def killed_at_second(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, whose second call ends the process instead."""
    calls: list[int] = []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*args, **kwargs)

    return killed


def test_resumed_at_a_step_whose_scores_are_missing(
    tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run is killed during an evaluation, the resumed one ends with the table and the best of another."""
    straight = tmp_path / "straight"
    train.main(argv(straight, "--save_interval", "2"))
    for place, patch in {
        "drawing": (AverageEvaluation, "_network"),
        "before the best": (loop, "write_best"),
        "before the row": (Reporter, "add"),
    }.items():
        run = tmp_path / place
        with monkeypatch.context() as patched:
            patched.setattr(*patch, killed_at_second(getattr(*patch)))
            with pytest.raises(Killed):
                train.main(argv(run, "--save_interval", "2"))
        assert sorted(scores_of(run)) == ([2] if place != "drawing" else [])
        train.main(argv(run, "--save_interval", "2"))
        assert scores_of(run) == scores_of(straight)
        assert rows_of(run) == rows_of(straight)
        assert read_best(run / "checkpoints") == read_best(straight / "checkpoints")
        assert same_weights(run, straight, 6)


def test_scores_of_a_run_that_had_none(tmp_path: Path, data: Path, argv: Callable[..., list[str]]) -> None:
    """A resumed run begins with the scores of its step; no setting of the scores counts as a change of the run."""
    run = tmp_path / "run"
    train.main(flags(data, run, *PLAIN))
    train.main(argv(run))
    assert sorted(scores_of(run)) == [6]
    assert "from here on" not in (run / "log.txt").read_text()
    before = (run / "progress.csv").read_bytes()
    train.main(argv(run))
    assert (run / "progress.csv").read_bytes() == before


# --- the best ---


def test_the_best_is_replaced_only_by_a_better_one(
    tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([5.0, 4.0, float("nan"), 3.0, 3.0, 3.5])

    def score(*_: object) -> Verdict:
        value = next(values)
        return Verdict({"fid": Score(value), "precision": Score(0.5)})

    monkeypatch.setattr(Judge, "score", score)
    run = tmp_path / "run"
    train.main(argv(run))
    best = read_best(run / "checkpoints")
    assert (best["step"], best["ema_rate"], best["value"], best["metric"]) == (4, "0.5", 3.0, "fid")
    assert [p.name for p in (run / "checkpoints" / "best").glob("*.pt")] == ["ema_0.5_000004.pt"]
    log = (run / "log.txt").read_text()
    assert log.count("the best average so far is in") == 2


def about(**changes: Any) -> dict[str, Any]:
    given = {"step": 2, "ema_rate": "0.9", "metric": "fid", "value": 3.0, "samples": 10, "reference": "a"}
    return {**given, "pixels": "sha256:1", "network": "net", "weights": "sha256:2", **changes}


@pytest.mark.parametrize(
    ("ours", "theirs", "beats"),
    [
        ({"value": 2.0}, {}, True),
        ({}, {}, False),
        ({"value": 4.0}, {}, False),
        ({"value": 4.0, "metric": "is"}, {"metric": "is"}, True),
        ({"value": 2.0, "metric": "recall"}, {"metric": "recall"}, False),
        ({"value": 4.0, "reference": "b"}, {}, False),  # the same images elsewhere
        ({"value": 4.0, "pixels": "sha256:3"}, {}, True),
        ({"value": 4.0, "samples": 20}, {}, True),
        ({"value": 4.0, "weights": "sha256:4"}, {}, True),
        ({"value": 4.0, "metric": "kid"}, {}, True),
    ],
)
def test_better(ours: dict[str, Any], theirs: dict[str, Any], beats: bool) -> None:
    """What was measured otherwise is not compared, but replaced."""
    assert Candidate(about(**ours), {}).beats(about(**theirs)) is beats


def test_no_best_or_an_unreadable_one(tmp_path: Path) -> None:
    assert read_best(tmp_path) == {}
    assert Candidate(about(), {}).beats({})
    (tmp_path / "best").mkdir()
    for text in ("", "[]", '{"value": null}', '{"value": "3"}'):
        (tmp_path / "best" / "best.json").write_text(text)
        assert read_best(tmp_path) == {}


def test_killed_between_any_two_operations_on_the_best(tmp_path: Path) -> None:
    """Once it is tidied, the old best or the new one is whole, and nothing else is left."""
    at, seen = 0, set()
    while True:
        folder = tmp_path / f"{at}"
        write_best(folder, about(step=1), {"w": torch.tensor(1.0)}, {})

        def overwrite(folder: Path = folder) -> None:
            write_best(folder, about(step=2), {"w": torch.tensor(2.0)}, {})

        dead = killed_after(at, overwrite)
        tidy(folder)
        assert [p.name for p in folder.iterdir()] == ["best"]
        step = read_best(folder)["step"]
        assert float(read_state_dict(find(str(folder / "best")))["w"]) == step
        seen.add(step)
        if not dead:
            break
        at += 1
    assert at > 6
    assert seen == {1, 2}


def test_a_best_that_cannot_be_written(
    tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.training.checkpoints.best.save_file", full)
    with pytest.raises(UserError, match=r"--run_dir: the best average can't be written to .*best \(No space left"):
        train.main(argv(run))
    assert not (run / "checkpoints" / "best").exists()


# --- images that are not finite ---


def test_samples_that_are_not_finite(
    tmp_path: Path, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their average has no scores, the others have, and the run goes on."""
    finite, calls = Engine.finite, []

    def watched(self: Engine, count: int) -> torch.Tensor:
        calls.append(1)
        return finite(self, count) & (len(calls) != 3)

    monkeypatch.setattr(Engine, "finite", watched)
    run = tmp_path / "run"
    train.main(argv(run))
    assert "samples of ema_rate 0.9999 after step 2 are not finite" in caplog.text
    assert {step: len(scores) for step, scores in scores_of(run).items()} == {2: 2, 4: 4, 6: 4}


# --- two ranks ---

STOPPED_ON_ONE = """
import os, signal, sys
from fastdiff import errors, train
from fastdiff.runtime.processes import current
from fastdiff.sampling.engine import Engine
draw, drawn = Engine.draw, []

def counted(self, *args, **kwargs):
    drawn.append(1)
    if current().rank == 1 and len(drawn) == 2 and sys.argv[1] == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(self, *args, **kwargs)

Engine.draw = counted
try:
    train.main(sys.argv[2:])
except errors.StopWith as stop:
    print(f"code {stop.code} after {len(drawn)} batches", flush=True)
os._exit(0)
"""


def test_two_ranks_score_as_one(tmp_path: Path, data: Path, argv: Callable[..., list[str]]) -> None:
    """From one checkpoint, with averages that ZeRO partitions, two ranks have the scores of one, bit for bit.

    A signal to one of them ends the evaluation of both within a batch.
    """
    script = tmp_path / "script.py"
    script.write_text(STOPPED_ON_ONE)
    first = tmp_path / "first"
    train.main(flags(data, first, *PLAIN, "--save_interval", "2"))
    begun = ("--resume_checkpoint", str(first / "checkpoints" / "step_000004"))
    begun += ("--eval_metrics", "fid,precision,kid,is", "--eval_samples", "13")
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(argv(one, *begun))
    more = ("--zero_stage", "1", "--max_steps", "5")
    out = run_ranks([str(script), "stop", *argv(two, *begun, *more)])
    assert out.count("code 75 after 2 batches") == 2, out
    assert not (two / "progress.csv").exists()
    assert not (two / "checkpoints" / "best").exists()
    shutil.rmtree(two)
    run_ranks([str(script), "go", *argv(two, *begun, *more)])
    assert sorted(scores_of(two)) == [4, 5]
    assert scores_of(two)[4] == scores_of(one)[4]
    assert len(scores_of(one)[4]) == 8


# --- what is refused ---


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_settings_that_are_refused(tmp_path: Path, data: Path, network: Path, argv: Callable[..., list[str]]) -> None:
    """All in one sentence, before anything is written."""
    pictures(tmp_path / "large", ["a", "b", "c", "d"], size=16)
    pictures(tmp_path / "two", ["a", "b"])
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    torch.jit.script(Narrow()).save(str(tmp_path / "narrow.pt"))
    cases: dict[tuple[str, ...], tuple[str, ...]] = {
        ("--eval_reference", ""): ("--eval_interval 2 needs eval_reference",),
        ("--eval_interval", "0"): ("eval_reference needs eval_interval",),
        ("--eval_metrics", "fad"): ("--eval_metrics: must be among fid",),
        ("--eval_metrics", "sfid"): ("--eval_metrics: sfid needs the spatial features of Inception",),
        ("--eval_samples", "9"): ("--eval_samples",),
        ("--eval_reference", f"{tmp_path / 'absent'}"): ("--eval_reference: ", "absent does not exist"),
        ("--eval_reference", f"{tmp_path / 'large'}"): (
            "images of 8x8x3, those of --eval_reference of 16x16x3",
            "--resize 8x8",
        ),
        ("--eval_reference", f"{tmp_path / 'broken.npz'}"): ("--eval_reference: ", "broken.npz"),
        ("--eval_reference", f"{tmp_path / 'two'}", "--eval_metrics", "recall"): (
            "--eval_metrics: recall needs 3 neighbours of each image, and so at least 4 images; there are 2",
        ),
        ("--eval_metrics", "kid", "--eval_samples", "20"): (
            "--eval_metrics: kid takes subsets of 20 images, at most --eval_samples",
            "there are 13 reference images",
        ),
        ("--eval_features", f"{tmp_path / 'absent.pt'}"): ("--eval_features: ", "is neither a file"),
        ("--eval_features", f"{tmp_path / 'narrow.pt'}"): (
            "--eval_features: ",
            "narrow.pt fails on uint8 images [13, 3, 8, 8]",
        ),
        ("--eval_feature_weights", "w.pth"): ("--eval_feature_weights is for --eval_features inception-v3-compat",),
        ("--in_channels", "4"): ("--eval_features: ", "takes images of 3 channels, these have 4"),
    }
    with nothing_written(tmp_path):
        for given, said in cases.items():
            message = refusal(train.main, argv(tmp_path / "run", *given))
            assert all(part in message for part in said), message


def test_a_super_resolution_model_is_refused(tmp_path: Path, data: Path, network: Path) -> None:
    given = {"data_dir": data, "run_dir": tmp_path / "run", "large_size": 64, "small_size": 16, "eval_interval": 1}
    words = [str(w) for pair in given.items() for w in (f"--{pair[0]}", pair[1])]
    message = refusal(super_res_train.main, [*words, "--eval_reference", str(data), "--num_channels", "32"])
    assert "--eval_interval: a super-resolution model is not scored while it trains" in message
