"""A step with a non-finite loss or gradient is skipped on every path and counted, and enters no mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import HELPERS
from helpers.guard_checks import check_skip, spoilt
from helpers.ranks import run_ranks
from helpers.small_trainer import THROUGH_ENGINE, small_trainer, start_deepspeed, state_of

from fastdiff.diffusion.timesteps import LossSecondMomentSampler
from fastdiff.errors import UserError
from fastdiff.training.deepspeed_engine import EngineStep
from fastdiff.training.device_step import DeviceStep, SkipCounter, poison_gradients
from fastdiff.training.metrics import LossMeter
from fastdiff.training.optimizer import learning_rate, learning_rate_on_device
from fastdiff.training.settings import TrainSettings, adopt

pytestmark = pytest.mark.slow

TWO = [
    *("0:fp32:loss", "0:bf16:gradient", "1:fp32:gradient", "1:bf16:loss"),
    *("2:fp32:loss", "2:bf16:gradient", "3:fp32:gradient", "3:bf16:loss"),
]


# --- skipping ---


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_on_the_device_is_as_if_it_had_not_been(precision: str, what: str) -> None:
    check_skip(1, precision, what)


@pytest.mark.parametrize("case", ["0:fp32:loss", "1:fp32:gradient", "2:bf16:loss", "3:fp32:gradient"])
def test_a_bad_step_through_deepspeed_is_as_if_it_had_not_been(case: str) -> None:
    stage, precision, what = case.split(":")
    check_skip(int(stage), precision, what, deepspeed=THROUGH_ENGINE)


def test_one_rank_of_two_has_a_bad_micro_batch() -> None:
    """Every rank skips the step, at every ZeRO stage."""
    out = run_ranks([str(HELPERS / "guard_checks.py"), *TWO])
    assert [line for line in out.splitlines() if line.startswith("skipped")] == [f"skipped: {c}" for c in TWO]


@pytest.mark.parametrize("deepspeed", [None, THROUGH_ENGINE], ids=["device", "engine"])
@pytest.mark.parametrize("value", [math.inf, 1e30, math.nan])
def test_clipping_hides_nothing(deepspeed: dict[str, Any] | None, value: float) -> None:
    """Clipping by an infinite norm would make gradients of 0; a norm of 1e30 is finite, but its square is not."""
    trainer = small_trainer(deepspeed=deepspeed, grad_clip=0.5)
    trainer.take_step()
    before = state_of(trainer)
    hook = next(trainer.model.parameters()).register_hook(lambda gradient: torch.full_like(gradient, value))
    trainer.take_step()
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in state_of(trainer).items())
    assert trainer.stepper.skipped_steps == 1
    trainer.take_step()
    assert trainer.stepper.state_dict() == {"skipped_steps": 1, "bad_streak": 0}


@pytest.mark.parametrize(
    "section", [{"bf16": {"check_grad_overflow": False}}, {"zero_optimization": {"compute_grad_norm": False}}]
)
def test_deepspeeds_checks_stay_on(section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="false can't be given: it is needed to skip bad steps"):
        adopt(TrainSettings(), section)


def test_guarded_losses() -> None:
    """A finite loss and its gradients keep every bit, and every gradient of a non-finite loss is NaN."""
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    loss = (x**3).sum()
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    (got,) = torch.autograd.grad(poison_gradients(loss), x, retain_graph=True)
    assert torch.equal(got, wanted)
    assert poison_gradients(loss).item() == loss.item()
    for bad in (math.inf, -math.inf, math.nan):
        (got,) = torch.autograd.grad(poison_gradients(loss + bad), x, retain_graph=True)
        assert got.isnan().all()


# --- counting ---


@pytest.mark.parametrize("deepspeed", [None, THROUGH_ENGINE], ids=["device", "engine"])
def test_streaks(deepspeed: dict[str, Any] | None) -> None:
    trainer = small_trainer(deepspeed=deepspeed, lr_anneal_steps=10)
    trainer.take_step()
    with spoilt(trainer, "loss"):
        for streak in (1, 2, 3):
            trainer.take_step()
            assert trainer.stepper.bad_streak() == streak
    trainer.take_step()
    assert trainer.stepper.bad_streak() == 0
    metrics = trainer.read_metrics()
    assert (trainer.step, metrics["skipped_steps"]) == (5, 3)
    assert metrics["lr"] == learning_rate(trainer.train, 1)  # of the second update
    assert "skipped_steps" not in small_metrics(deepspeed)
    trainer.stepper.load_state_dict({"skipped_steps": 7, "bad_streak": 4})
    assert trainer.stepper.bad_streak() == 4
    trainer.stepper.start_over()
    assert trainer.stepper.state_dict() == {"skipped_steps": 7, "bad_streak": 0}


def small_metrics(deepspeed: dict[str, Any] | None) -> dict[str, float]:
    trainer = small_trainer(deepspeed=deepspeed)
    trainer.take_step()
    return trainer.read_metrics()


@pytest.mark.parametrize("deepspeed", [None, THROUGH_ENGINE], ids=["device", "engine"])
def test_the_search_for_a_loss_scale_is_no_streak(
    deepspeed: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped step counts once the scale can fall no further."""
    if deepspeed:
        start_deepspeed()
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # slow on a CPU, and correct
    trainer = small_trainer(deepspeed=deepspeed, precision="fp16")
    assert isinstance(trainer.stepper, EngineStep if deepspeed else DeviceStep)
    if not deepspeed:
        trainer.model.set_precision(torch.float32)  # fp16 is slow on a CPU, and the scale works in any precision
    trainer.stepper.load_scaler_state({"cur_scale": 4.0})
    streaks = []
    with spoilt(trainer, "gradient"):
        for _ in range(4):
            trainer.take_step()
            streaks.append(trainer.stepper.bad_streak())
    assert streaks == [0, 0, 1, 2]
    assert trainer.stepper.skipped_steps == 4
    assert trainer.stepper.scaler_state()["cur_scale"] == 1.0
    trainer.take_step()
    assert trainer.stepper.bad_streak() == 0


def test_counts_on_the_device() -> None:
    skips = SkipCounter(torch.device("cpu"))
    for bad, searching, wanted in ((1, 1, (1, 0)), (1, 0, (2, 1)), (1, 1, (3, 1)), (1, 0, (4, 2)), (0, 0, (4, 0))):
        skips.note(torch.tensor(bool(bad)), torch.tensor(bool(searching)))
        skips.publish()
        assert skips.poll() == wanted


@pytest.mark.parametrize("settings", [{}, {"lr_warmup_steps": 7}, {"lr_anneal_steps": 90}])
def test_the_learning_rate_is_the_same_on_the_device(settings: dict[str, int]) -> None:
    train = TrainSettings(lr=1.7e-4, **settings)
    for updates in range(100):
        assert learning_rate_on_device(train, torch.tensor(updates)).item() == learning_rate(train, updates)


# --- means and histories ---


def test_the_meter_leaves_bad_values_out() -> None:
    meter = LossMeter(8, torch.device("cpu"))
    t, weights = torch.tensor([0, 1, 7, 7]), torch.ones(4)
    meter.add(
        t, weights, {"loss": torch.tensor([1.0, math.nan, 2.0, 4.0]), "mse": torch.tensor([1.0, 2.0, math.inf, 3.0])}
    )
    saved = meter.state_dict()
    again = LossMeter(8, torch.device("cpu"))
    again.load_state_dict(saved)
    for each in (meter, again):
        metrics = each.read()
        assert (metrics["loss"], metrics["loss_q0"], metrics["loss_q3"]) == (7 / 3, 1, 3)
        assert (metrics["mse"], metrics["mse_q3"], metrics["bad_losses"]) == (2, 3, 1)
    meter.add(t, weights, {"loss": torch.ones(4)})
    assert "bad_losses" not in meter.read()


def test_a_history_takes_finite_losses_only() -> None:
    sampler, clean = LossSecondMomentSampler(3, history_per_term=2), LossSecondMomentSampler(3, history_per_term=2)
    sampler.update(torch.tensor([0, 1, 1, 2, 1]), torch.tensor([1.0, math.nan, 2.0, math.inf, 3.0]))
    clean.update(torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(sampler.history, clean.history)
    assert torch.equal(sampler.counts, clean.counts)
    for each in (sampler, clean):
        each.update(torch.tensor([0, 2, 2, 1]), torch.tensor([5.0, 1.0, 2.0, 7.0]))
    sampler.update(torch.tensor([0, 1]), torch.tensor([math.nan, -math.inf]))
    assert sampler.warmed_up()
    assert torch.equal(sampler.weights(), clean.weights())
