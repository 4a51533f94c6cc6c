"""--detect_anomaly names the operation, and a diagnosis describes the state of a run that can't continue."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.guard_checks import check_diagnosis, spoilt
from helpers.small_trainer import THROUGH_ENGINE, small_trainer, state_of
from torch import Tensor, nn

from fastdiff.training.diagnostics.anomaly import NonFinite, detect_anomaly
from fastdiff.training.diagnostics.diagnosis import block_of, diagnose
from fastdiff.training.metrics import LossResult
from fastdiff.training.trainer import Trainer

PATHS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "engine": {"deepspeed": THROUGH_ENGINE, "zero_stage": 2, "precision": "bf16"},
    "checkpointed": {"model": {"use_checkpoint": True}},
}


def found(trainer: Trainer) -> str:
    with detect_anomaly(trainer.model), pytest.raises(NonFinite) as error:
        trainer.take_step()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return str(error.value)


def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda module, args, output: change(output))


@pytest.mark.parametrize("settings", PATHS.values(), ids=list(PATHS))
def test_healthy_steps_pass(settings: dict[str, Any]) -> None:
    """Finite steps raise nothing and give the same numbers as without --detect_anomaly."""
    watched, alone = (small_trainer(schedule_sampler="loss-second-moment", grad_clip=1.0, **settings) for _ in "ab")
    with detect_anomaly(watched.model):
        for _ in range(2):
            watched.take_step()
    for _ in range(2):
        alone.take_step()
    ours, wanted = state_of(watched), state_of(alone)
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert not watched.model.middle_block[0]._forward_hooks


@pytest.mark.parametrize("settings", PATHS.values(), ids=list(PATHS))
def test_forward(settings: dict[str, Any]) -> None:
    trainer = small_trainer(**settings)
    with torch.no_grad():
        dict(trainer.model.named_parameters())["middle_block.0.in_layers.2.weight"].fill_(3e37)
    words = found(trainer)
    assert words.startswith("in the forward pass aten.convolution in middle_block.0.in_layers.2 is the first operation")
    assert "[2, 64, 4, 4]" in words
    assert " inf" in words


@pytest.mark.parametrize("settings", PATHS.values(), ids=list(PATHS))
def test_backward(settings: dict[str, Any]) -> None:
    """The square root of 0 is finite, but its derivative is not."""
    trainer = small_trainer(**settings)
    changed(trainer.model.time_embed[0], lambda y: y + (y * 0).sqrt())
    words = found(trainer)
    assert words.startswith("in the backward pass aten.div in time_embed")
    assert "first operation to make a non-finite value" in words


def test_in_the_loss() -> None:
    trainer = small_trainer()
    losses = trainer.stepper.losses

    def logarithm(network: Any, batch: Any) -> LossResult:
        result = losses(network, batch)
        return result._replace(loss=(result.loss * 0).log())

    trainer.stepper.losses = logarithm
    words = found(trainer)
    assert words.startswith("in the forward pass aten.log in the loss is the first operation to make")
    assert "float32 [], 1 inf of 1" in words


def test_weights_that_are_bad_already() -> None:
    trainer = small_trainer()
    with torch.no_grad():
        trainer.model.out[2].bias[1] = math.nan
    words = found(trainer)
    assert "to be given a non-finite value, by the weights or the images" in words
    assert "out.2.bias float32 [6] from" in words
    assert "1 nan of 6" in words


def test_infinities_on_purpose_pass() -> None:
    trainer = small_trainer()

    def masked(y: Tensor) -> Tensor:
        far = torch.full_like(y, math.inf).masked_fill(y > y, -math.inf)
        return torch.where(far > 0, y, far)

    changed(trainer.model.time_embed[0], masked)
    with detect_anomaly(trainer.model):
        trainer.take_step()
    assert trainer.stepper.skipped_steps == 0


# --- diagnosis ---


@pytest.mark.parametrize(
    "settings", [{}, {"deepspeed": THROUGH_ENGINE, "zero_stage": 3, "precision": "bf16"}], ids=["device", "zero 3"]
)
def test_diagnosis(settings: dict[str, Any]) -> None:
    check_diagnosis(settings)


def test_diagnosis_of_an_overflow() -> None:
    """If every loss is non-finite, so is every gradient; weights and activations show where that begins."""
    trainer = small_trainer(lr=2e-3, precision="bf16")
    with torch.no_grad():
        trainer.model.middle_block[0].in_layers[2].weight.fill_(3e37)
        trainer.model.out[2].bias[0] = math.nan
    trainer.take_step()
    lines, content = diagnose(trainer)
    assert (content["bad_losses"], content["gradients_without"], content["bad_weights"]) == (4, 0, ["out.2.bias"])
    assert content["bad_gradients"]
    blocks = content["blocks"]
    assert math.isfinite(blocks["input_blocks.0"]["greatest_activation"])
    assert blocks["middle_block"]["greatest_activation"] in ("inf", "nan")
    assert blocks["middle_block"]["greatest_weight"] == pytest.approx(3e37)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert any("non-finite weights: out.2.bias; gradients: " in line for line in lines)


def test_diagnosis_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer()
    with spoilt(trainer, "loss"):
        trainer.take_step()

    def full(settings: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("fastdiff.training.diagnostics.diagnosis.build_network", full)
    lines, content = diagnose(trainer)
    assert content["left_out"] == "the GPU's memory was too small for a second network"
    assert content["skipped_in_a_row"] == 1
    assert any(line.startswith("incomplete: ") for line in lines)


def test_blocks() -> None:
    names = ["time_embed.0.weight", "input_blocks.12.0.bias", "middle_block.1.qkv.weight", "out.2.bias"]
    assert [block_of(name) for name in names] == ["time_embed", "input_blocks.12", "middle_block", "out"]
