"""A step on the device equals a step through DeepSpeed, and never waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastdiff.kernels import launch
from helpers.small_trainer import THROUGH_ENGINE, losses_of, small_trainer, start_deepspeed, weights_of
from helpers.waits import Waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.training import device_step as steps
from fastdiff.training.checkpoints.format import read_snapshot
from fastdiff.training.deepspeed_engine import EngineStep
from fastdiff.training.device_step import DeviceStep, LossScale
from fastdiff.training.metrics import LossResult


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"microbatch": -1},
        {"grad_clip": 0.5, "weight_decay": 0.1},
        {"schedule_sampler": "loss-second-moment", "lr_warmup_steps": 3, "lr_anneal_steps": 50},
    ],
    ids=["plain", "one micro-batch", "clipped", "loss-aware"],
)
def test_equals_deepspeed(settings: dict[str, Any]) -> None:
    """Losses, norms, weights, averages and moments are equal, with dropout and accumulation."""
    alone, engine = small_trainer(**settings), small_trainer(deepspeed=THROUGH_ENGINE, **settings)
    assert isinstance(alone.stepper, DeviceStep)
    assert isinstance(engine.stepper, EngineStep)
    for ours, theirs in zip(losses_of(alone, 4), losses_of(engine, 4), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5), name
    assert_same_weights(weights_of(alone), weights_of(engine), rtol=1e-4, atol=2e-6)


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float, atol: float) -> None:
    """Assert that 99% are close: where a gradient is nearly 0, rounding decides the sign of AdamW's first steps."""
    assert ours.keys() == theirs.keys()
    for kind in {name.split("/")[0] for name in ours}:
        names = [name for name in ours if name.startswith(f"{kind}/")]
        a, b = (torch.cat([side[name].flatten() for name in names]) for side in (ours, theirs))
        assert torch.isclose(a, b, rtol=rtol, atol=atol).float().mean() > 0.99, kind


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_never_waits(precision: str, sampler: str) -> None:
    trainer = small_trainer(precision=precision, schedule_sampler=sampler, grad_clip=1.0, zero_stage=1)
    trainer.take_step()  # brings the schedule's tables to the device
    with Waits() as waits:
        trainer.take_step()
    assert not waits.seen
    with Waits() as waits:
        trainer.read_metrics()
    assert waits.seen, "the one place that may wait"


def test_never_waits_for_a_loss_scale() -> None:
    """The loss scale of fp16, the skips and the norm stay on the device, too."""
    trainer = small_trainer(precision="fp16", dtype=torch.float32, grad_clip=1.0)  # fp16 is slow on a CPU
    trainer.take_step()
    with Waits() as waits:
        trainer.take_step()
    assert not waits.seen


class Operations(TorchDispatchMode):
    """Counts operations other than views and allocations: on a GPU each is one launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and not func.name().startswith("aten::empty")
        return func(*args, **(kwargs or {}))


def test_few_launches_beside_the_network() -> None:
    """Random numbers, timesteps and sums of losses are one kernel each, whatever else a GPU has to do in a step."""
    trainer = small_trainer()
    trainer.take_step()
    batch, terms = trainer.last_batch, dict.fromkeys(("loss", "mse", "vb"), torch.ones(4))
    with ops.using("triton", anywhere=True), launch.record() as launches, Operations() as others:
        t, weights = trainer.draw_timesteps(batch)
        trainer.meter.add(t, weights, terms)
    assert [made.kernel.fn.__name__ for made in launches] == ["_image_uniform", "_timesteps_at", "_add_losses"]
    assert others.count == 1, "the op fastdiff::image_uniform"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["", "cuda graph"])
def test_never_waits_gpu(cuda_graph: bool) -> None:
    trainer = small_trainer(precision="bf16", cuda_graph=cuda_graph)
    losses_of(trainer, steps.WARM_UP + 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.take_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("microbatch", [-1, 2])
def test_cuda_graph_gpu(precision: str, microbatch: int) -> None:
    """Replayed steps equal plain ones."""
    settings = {"precision": precision, "microbatch": microbatch, "grad_clip": 1.0}
    plain, graphed = small_trainer(**settings), small_trainer(cuda_graph=True, **settings)
    for ours, theirs in zip(losses_of(graphed, 8), losses_of(plain, 8), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_losses_change_nothing() -> None:
    """The losses are computed first, and then recorded by the meter and in the timestep sampler's history."""
    trainer = small_trainer(schedule_sampler="loss-second-moment", model={"dropout": 0.0})
    trainer.take_step()
    trainer.read_metrics()  # empties the meter
    before = trainer.timestep_sampler.counts.clone()
    batch = trainer.micro_batches(trainer.last_batch)[0]
    first, again = (trainer.losses(trainer.model, batch) for _ in range(2))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.loss, (first.terms["loss"] * first.weights).mean())
    assert torch.equal(trainer.timestep_sampler.counts, before)
    assert not trainer.meter.sums.any()
    trainer.record(first)
    assert trainer.timestep_sampler.counts.sum() == before.sum() + len(first.t)
    assert trainer.read_metrics()["loss"] == pytest.approx(first.loss.item())


# --- the loss scale ---


def _deepspeeds(window: int) -> Any:
    start_deepspeed()  # DynamicLossScaler asks for its rank
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(2.0**20, window, 1, 1, False, raise_error_at_min_scale=False)


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_loss_scale_follows_deepspeeds(window: int) -> None:
    ours, theirs = LossScale(window, torch.device("cpu")), _deepspeeds(window)
    generator = torch.Generator().manual_seed(window)
    for _ in range(200):
        overflow = bool(torch.rand((), generator=generator) < 0.2)
        ours.update(torch.tensor(float(overflow)))
        theirs.update_scale(overflow)
        state = ours.state_dict()
        assert {name: getattr(theirs, name) for name in LossScale.NAMES} == state
    again = LossScale(window, torch.device("cpu"))
    again.load_state_dict(state)
    assert again.state_dict() == state


def test_overflow_skips_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, averages and moments stay, the scale halves, the step is counted, and training continues."""
    trainer = small_trainer(precision="fp16", dtype=torch.float32, fp16_scale_growth=1.0)
    step = trainer.stepper
    assert isinstance(step, DeviceStep)
    trainer.take_step()
    before = {name: value.clone() for name, value in weights_of(trainer).items()}
    scale = step.scaler_state()["cur_scale"]
    losses = step.losses

    def infinite(network: Any, batch: Any) -> LossResult:
        result = losses(network, batch)
        return result._replace(loss=result.loss * float("inf"))

    step.losses = infinite
    trainer.take_step()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    assert step.scaler_state()["cur_scale"] == scale / 2
    step.losses = losses
    trainer.take_step()
    metrics = trainer.read_metrics()
    assert metrics["skipped_steps"] == 1
    assert metrics["lg_loss_scale"] == torch.tensor(scale / 2).log2().item()
    assert metrics["grad_norm"] < float("inf")
    assert not torch.equal(weights_of(trainer)["model/out.2.weight"], before["model/out.2.weight"])
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())


def test_scaled_steps_equal_plain_ones() -> None:
    """A loss scale, and its inverse applied to the gradients, change only the rounding."""
    scaled, plain = small_trainer(precision="fp16", dtype=torch.float32, grad_clip=0.7), small_trainer(grad_clip=0.7)
    for ours, theirs in zip(losses_of(scaled, 3), losses_of(plain, 3), strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_resume_with_a_loss_scale(tmp_path: Path) -> None:
    """The scale and the count of skipped steps are restored."""
    trainer = small_trainer(precision="fp16", dtype=torch.float32, fp16_scale_growth=0.5)
    losses_of(trainer, 3)
    trainer.stepper.load_state_dict({"skipped_steps": 2, "bad_streak": 0})
    trainer.save(tmp_path, {})
    snapshot = read_snapshot(tmp_path / "step_000003", ["0.9", "0.99"])
    resumed = small_trainer(snapshot, precision="fp16", dtype=torch.float32, fp16_scale_growth=0.5)
    assert resumed.stepper.scaler_state() == trainer.stepper.scaler_state()
    assert resumed.stepper.skipped_steps == 2
    assert losses_of(resumed, 2) == losses_of(trainer, 2)


def test_kernel_steps_on_the_device() -> None:
    """The optimiser's kernel takes its learning rate, scale and overflow flag from the device."""
    made = {}
    for mode in ("reference", "triton"):
        with ops.using(mode):  # type: ignore[arg-type]
            settings: dict[str, Any] = {"precision": "fp16", "grad_clip": 0.5, "weight_decay": 0.1}
            # Dropout's mask would follow the memory layout, which differs.
            trainer = small_trainer(model={"channel_mult": "1", "dropout": 0.0}, dtype=torch.float32, **settings)
            with ops.using("reference"):  # the network itself would be slow in the interpreter
                made[mode] = (losses_of(trainer, 2), weights_of(trainer))
            assert trainer.optimizer.fused_kernel == (mode == "triton")
    for ours, theirs in zip(made["triton"][0], made["reference"][0], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert_same_weights(made["triton"][1], made["reference"][1], rtol=1e-3, atol=2e-5)


# --- a single process calls no collective ---


class Collectives(TorchDispatchMode):
    """Records the operations of torch.distributed that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"zero_stage": 1}], ids=str)
def test_no_collective(settings: dict[str, Any]) -> None:
    """On a GPU the first collective would start NCCL. There is a group here; a run of one process has none."""
    start_deepspeed()
    with Collectives() as seen:
        torch.distributed.barrier()  # shows that collectives are recorded
        trainer = small_trainer(**settings)
        losses_of(trainer, 2)
    assert seen.names == ["barrier.default"]


@pytest.mark.parametrize("stage", [2, 3])
def test_no_broadcast_by_a_lone_engine(stage: int) -> None:
    with Collectives() as seen:
        small_trainer(zero_stage=stage)
    assert [name for name in seen.names if name.startswith("broadcast")] == []
