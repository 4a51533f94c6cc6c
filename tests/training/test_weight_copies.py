"""A lone process with 16-bit copies of its weights takes the steps, to the bit, that casting in every pass takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastdiff.kernels import adamw_ema, reference
from helpers.small_trainer import losses_of, small_trainer, state_of
from torch import Tensor

from fastdiff import ops
from fastdiff.training import optimizer
from fastdiff.training.checkpoints.format import Snapshot, read_snapshot
from fastdiff.training.device_step import DeviceStep
from fastdiff.training.trainer import Trainer

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}  # Triton's interpreter truncates to bf16


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels, but for the norm's and attention's, and in large blocks: the interpreter would take minutes."""
    for name in ("BLOCK", "NORM_BLOCK"):
        monkeypatch.setattr(adamw_ema, name, adamw_ema.CHUNK)
    monkeypatch.setattr(ops, "triton_norm", reference)
    monkeypatch.setattr(ops, "attention", reference.attention)
    monkeypatch.setattr(ops, "has_self_attention", lambda *_: False)
    with ops.using("triton"):
        yield


def trainer(
    monkeypatch: pytest.MonkeyPatch,
    casts: bool = False,
    precision: str = "fp16",
    snapshot: Snapshot | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer with copies or, if `casts`, one whose network casts its weights."""
    with monkeypatch.context() as patched:
        if casts:
            patched.setattr(optimizer, "arrange_weights", lambda model: list(model.parameters()))
        made = small_trainer(
            snapshot, {"channel_mult": "1,1"}, dtype=PRECISIONS[precision], precision=precision, **settings
        )
    assert isinstance(made.stepper, DeviceStep)
    assert bool(made.optimizer.copies) == (not casts and precision == "fp16")
    assert (made.model.projection is None) == casts
    return made


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch", "precision"), [(-1, "fp16"), (-1, "fp32"), (2, "fp16")], ids=str)
def test_the_same_bits(precision: str, microbatch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, weights, averages and moments; gradients of micro-batches are summed in float32.

    The norm of the gradients is summed in the order of memory, and so differs by roundings.
    """
    settings = {"microbatch": microbatch, "weight_decay": 0.1}
    ours, casting = (trainer(monkeypatch, casts, precision, **settings) for casts in (False, True))
    for mine, its in zip(losses_of(ours, 2), losses_of(casting, 2), strict=True):
        assert mine.pop("grad_norm") == pytest.approx(its.pop("grad_norm"), rel=1e-6)
        assert mine == its
    assert_equal(state_of(ours), state_of(casting))
    for name, p in ours.model.named_parameters():
        assert torch.equal(p, ours.master_weights.gather(ours.master_weights.shards)[name].to(p))  # type: ignore[index]


@pytest.mark.slow
def test_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint is contiguous float32; a run with copies continues that of one that casts, and returns to it."""
    straight = trainer(monkeypatch, True)
    losses_of(straight, 2)
    straight.save(tmp_path, {})
    file = tmp_path / "step_000002" / "model000002.pt"
    for value in torch.load(file, weights_only=True).values():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
    snapshot = read_snapshot(tmp_path / "step_000002", ["0.9", "0.99"])
    resumed = trainer(monkeypatch, False, snapshot=snapshot)
    assert_equal(state_of(resumed), state_of(straight))
    for each in (resumed, straight):
        losses_of(each, 1)
    assert_equal(state_of(resumed), state_of(straight))
    for each in (resumed, straight):
        each.roll_back(snapshot)
        losses_of(each, 1)
    assert_equal(state_of(resumed), state_of(straight))


def test_a_skipped_step_leaves_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(monkeypatch, microbatch=-1)
    before = [p.detach().clone() for p in made.model.parameters()]
    losses = made.stepper.losses
    made.stepper.losses = lambda *given: (found := losses(*given))._replace(loss=found.loss * float("inf"))
    made.take_step()
    assert made.stepper.skipped_steps == 1
    assert all(map(torch.equal, made.model.parameters(), before))
    made.stepper.losses = losses
    made.take_step()
    assert not any(torch.equal(p, old) for p, old in zip(made.model.parameters(), before, strict=True) if p.dim() > 1)


def test_nothing_is_cast_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight with a copy reaches its products as it lies in memory."""
    made = trainer(monkeypatch)
    copies = {copy.untyped_storage().data_ptr() for _, copy in made.optimizer.copies}

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name().startswith(("aten::_to_copy", "aten::clone", "aten::copy_")):
                assert not any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in copies for x in args), func
            return func(*args, **(kwargs or {}))

    batch = made.micro_batches(made._next_batch())[0]
    with Casts():
        made.losses(made.model, batch)
