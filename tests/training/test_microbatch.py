"""The estimated memory of a step is close to the measured one, and the micro-batch is chosen by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.errors import UserError
from fastdiff.models import UNetSettings, build_model
from fastdiff.models.arrangement import arrange_weights
from fastdiff.models.unet import dummy_batch
from fastdiff.runtime.processes import Processes
from fastdiff.training import microbatch
from fastdiff.training.microbatch import BUCKET, LiveBytes, Memory, estimate
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALONE = Processes(0, 0, 1, CPU)
NETWORK = UNetSettings(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, dropout=0.1)


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    return create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)


def _measured(settings: UNetSettings, diffusion: GaussianDiffusion, batch: int) -> int:
    """Return the peak bytes that the allocator handed out in a forward and backward pass."""
    network = build_model(settings).train()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    given = dummy_batch(settings, batch, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        diffusion.training_losses(network, *given)["loss"].mean().backward()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["", "recomputing"])
def test_within_ten_percent(use_checkpoint: bool, diffusion: GaussianDiffusion) -> None:
    settings = NETWORK.model_copy(update={"use_checkpoint": use_checkpoint})
    memory = estimate(settings, TrainSettings(), diffusion, torch.float32, CPU, on_device=True)
    for batch in (3, 9):
        found = memory.of(batch) - memory.states
        assert found == pytest.approx(_measured(settings, diffusion, batch), rel=0.1)


def test_recomputing_saves_memory(diffusion: GaussianDiffusion) -> None:
    plain = estimate(NETWORK, TrainSettings(), diffusion, torch.bfloat16, GPU)
    again = NETWORK.model_copy(update={"use_checkpoint": True})
    assert estimate(again, TrainSettings(), diffusion, torch.bfloat16, GPU).per_image < 0.6 * plain.per_image


def test_states() -> None:
    """The bytes per parameter depend on precision and ZeRO stage; AdamW's moments take 8, an average 4."""
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)
    count = sum(p.numel() for p in build_model(NETWORK).parameters())

    def per_parameter(world_size: int = 1, on_device: bool = False, **train: Any) -> float:
        memory = estimate(NETWORK, TrainSettings(**train), diffusion, torch.float32, GPU, world_size, on_device)
        return memory.states / count

    assert per_parameter() == 4 + 4 + 8 + 4
    assert per_parameter(ema_rate="0.9,0.99") == 4 + 4 + 8 + 8
    assert per_parameter(kernels="reference", on_device=True) == 4 + 4 + 8 + 4
    assert per_parameter(precision="bf16") == 2 + (2 + 4) + (4 + 8) + 4
    assert per_parameter(4, precision="bf16", zero_stage=1) == pytest.approx(2 + 2 + (4 + 4 + 8 + 4) / 4, rel=1e-3)
    assert per_parameter(4, precision="bf16", zero_stage=3) == pytest.approx((2 + 2 + 4 + 4 + 8 + 4) / 4, rel=1e-3)


def test_states_of_a_lone_process() -> None:
    """Beside its master weights it has 16-bit copies with 16-bit gradients, and sums them in float32."""
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)
    model = build_model(NETWORK).set_precision(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    arrange_weights(model)
    copied = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert copied > 0.5 * count
    train = TrainSettings(precision="bf16")
    memory = estimate(NETWORK, train, diffusion, torch.bfloat16, GPU, on_device=True)
    assert memory.states == 20 * count + (2 - 2) * copied
    assert memory.accumulating().states == memory.states + 4 * copied
    assert memory.accumulating() == memory.accumulating().accumulating()
    plain = TrainSettings(precision="bf16", kernels="reference")
    casting = estimate(NETWORK, plain, diffusion, torch.bfloat16, GPU, on_device=True)
    assert casting.states == 20 * count
    assert casting.fixed - memory.fixed > 1.5 * copied, "a forward pass keeps no casts of the weights"


def test_buckets() -> None:
    """Several processes at ZeRO-1 have two buckets of a third of the parameters, one process at ZeRO-2 has one."""
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)
    count = sum(p.numel() for p in build_model(NETWORK).parameters())

    def fixed(zero_stage: int, world_size: int) -> int:
        train = TrainSettings(precision="bf16", zero_stage=zero_stage)
        return estimate(NETWORK, train, diffusion, torch.float32, GPU, world_size).fixed

    assert fixed(1, 4) - fixed(0, 4) == 2 * 2 * -(-count // 3)
    assert fixed(2, 1) - fixed(0, 1) == 2 * BUCKET


def test_live_bytes() -> None:
    with LiveBytes(block=1) as live:
        a = torch.empty(100, dtype=torch.uint8, device="meta")
        view = a[10:]
        b = torch.empty(50, dtype=torch.uint8, device="meta")
        assert live.now == live.peak == 150
        del a
        assert live.now == 150, "the view keeps it"
        del view
        assert (live.now, live.peak) == (50, 150)
        del b
    assert live.now == 0


def test_does_not_touch_the_process(diffusion: GaussianDiffusion) -> None:
    """Tables made from tensors without memory must not stay in the diffusion process, which the run uses next."""
    estimate(NETWORK, TrainSettings(), diffusion, torch.float32, CPU)
    x, t = torch.zeros(2, 3, 32, 32), torch.tensor([0, 3])
    assert torch.isfinite(diffusion.q_sample(x, t)).all()


# --- choosing ---

MEMORY = Memory(weights=100, gradients=100, optimizer=200, averages=100, per_image=50, fixed=100)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate memory for 8 images, or for 16 with recomputing, and speed that grows up to micro-batches of 4."""
    few = Memory(100, 100, 200, 100, per_image=25, fixed=100)
    monkeypatch.setattr(
        microbatch, "available_memory", lambda processes: int((600 + 8 * 50) / (1 - microbatch.SPARE)) + 1
    )
    monkeypatch.setattr(microbatch, "estimate", lambda settings, *a: few if settings.use_checkpoint else MEMORY)
    monkeypatch.setattr(
        microbatch, "seconds_of_step", lambda network, diffusion, device, size: size / min(size, 4) * (1 + size / 100)
    )
    return monkeypatch


def _fit(diffusion: GaussianDiffusion, use_checkpoint: Any = False, before: int | None = None, **train: Any) -> Any:
    settings = NETWORK.model_copy(update={"use_checkpoint": use_checkpoint})
    return microbatch.fit(settings, plan_step(TrainSettings(**train), {}, ALONE), diffusion, ALONE, before)


def test_most_that_fits() -> None:
    assert MEMORY.of(3) == 750
    assert MEMORY.most(750) == 3
    assert MEMORY.most(749) == 2
    assert MEMORY.most(10) == 0


def test_microbatch_auto(room: pytest.MonkeyPatch, diffusion: GaussianDiffusion) -> None:
    """The micro-batch is the fastest of the largest that fit and divide the batch evenly."""
    assert _fit(diffusion, batch_size=48, microbatch="auto").microbatch == 4
    made = _fit(diffusion, batch_size=48, microbatch="auto")
    assert [word for word in ("8:", "6:", "4:", "3:", "12:") if word in made.lines[0]] == ["8:", "6:", "4:", "3:"]
    assert _fit(diffusion, batch_size=14, microbatch="auto").microbatch == 7
    assert _fit(diffusion, batch_size=48, microbatch="auto", before=6).microbatch == 6, "as the run began"
    assert _fit(diffusion, batch_size=48, microbatch="auto", before=16).microbatch == 4, "which doesn't fit here"


def test_use_checkpoint_auto(room: pytest.MonkeyPatch, diffusion: GaussianDiffusion) -> None:
    assert _fit(diffusion, "auto", batch_size=8).use_checkpoint is False
    assert _fit(diffusion, "auto", batch_size=16).use_checkpoint is True
    assert _fit(diffusion, "auto", batch_size=16, microbatch=8).use_checkpoint is False
    assert _fit(diffusion, "auto", batch_size=512, microbatch="auto").use_checkpoint is False


def test_too_large(room: pytest.MonkeyPatch, diffusion: GaussianDiffusion) -> None:
    room.setattr(microbatch, "available_memory", lambda processes: 500)
    with pytest.raises(UserError, match="--microbatch auto: not even one image fits, .*; try --use_checkpoint True"):
        _fit(diffusion, batch_size=8, microbatch="auto")

    def full(network: Any, diffusion: Any, device: Any, size: int) -> float:
        if size > 3:
            raise torch.OutOfMemoryError("full")
        return 1.0

    room.setattr(microbatch, "available_memory", lambda processes: 10**6)
    room.setattr(microbatch, "seconds_of_step", full)
    assert _fit(diffusion, batch_size=6, microbatch="auto").microbatch == 3


def test_nothing_to_choose(diffusion: GaussianDiffusion) -> None:
    made = _fit(diffusion, batch_size=12, microbatch=5)
    assert (made.microbatch, made.use_checkpoint, made.lines) == (4, False, [])


def test_really_tried() -> None:
    """A tiny network is timed on this machine."""
    tiny = UNetSettings(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="8")
    plain = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=False)
    made = microbatch.fit(tiny, plan_step(TrainSettings(batch_size=4, microbatch="auto"), {}, ALONE), plain, ALONE)
    assert made.microbatch in (1, 2, 4)
    assert "images/s" in made.lines[0]
    assert "expected memory" in made.lines[1]
