"""AdamW with averages, by the kernel or by torch, gives the same in DeepSpeed at every ZeRO stage and precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.small_trainer import start_deepspeed
from helpers.waits import Waits
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.training.deepspeed_engine import create_engine, start_processes
from fastdiff.training.master_weights import TRIED, MasterWeights
from fastdiff.training.optimizer import AdamWEMA, OnDevice
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step

SHAPES = [(5, 3, 3, 3), (5,), (7, 11), (1,), (130, 4)]
RATES = [0.999, 0.5]
STEPS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Dot(nn.Module):
    """One parameter whose gradient is the input."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class Dots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dots = nn.ModuleList(Dot(shape, generator) for shape in SHAPES)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return sum(dot(x).float() for dot, x in zip(self.dots, inputs, strict=True))  # type: ignore[return-value]


@dataclass
class Run:
    """An engine around `Dots`, its optimiser and its averages; the inputs determine the gradients."""

    engine: Any
    optimizer: AdamWEMA
    master_weights: MasterWeights
    averages: dict[float, list[Tensor]]
    dtype: torch.dtype

    def step(self, i: int, factor: float = 1.0) -> bool:
        """Take update i, with its own learning rate and weight decay, and return whether it was applied."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 / (1 + i), 0.1 * i
        self.engine.backward(self.engine([x.to(self.engine.device) for x in inputs(i, self.dtype, factor)]))
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors that a step changes."""
        states = [self.optimizer.state[flat] for flat in self.master_weights.shards]
        sets: dict[str, list[Tensor]] = {"weight": self.master_weights.shards}
        sets |= {f"average {rate}": tensors for rate, tensors in self.averages.items()}
        sets |= {key: [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")}
        sets["model"] = list(self.master_weights.gather(self.master_weights.shards).values())
        return {f"{kind} {i}": t.detach().clone() for kind, ts in sets.items() for i, t in enumerate(ts)}


def inputs(i: int, dtype: torch.dtype, factor: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return [(0.3 * factor * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def start(stage: int, precision: str, fused_kernel: bool, grad_clip: float = 1.0) -> Run:
    """Build engine, optimiser and averages like the trainer."""
    processes = start_processes()
    train = TrainSettings(batch_size=1, zero_stage=stage, precision=precision, grad_clip=grad_clip)
    section = {"fp16": {"initial_scale_power": 4}} if precision == "fp16" else {}
    model = Dots().to(processes.device)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = AdamWEMA(model.parameters(), lr=1e-3, weight_decay=0.0, fused_kernel=fused_kernel)
    engine = create_engine(model, optimizer, plan_step(train, section, processes))
    master_weights = MasterWeights(engine.optimizer, model, 0, 1)
    master_weights.fill(master_weights.shards, weights)
    optimizer.state.clear()
    averages = {rate: master_weights.clone() for rate in RATES}
    optimizer.attach_averages(master_weights.shards, averages)
    return Run(engine, optimizer, master_weights, averages, DTYPES[precision])


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], ulps: float) -> None:
    """Assert equality within `ulps` float32 roundings of the largest value of each tensor."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        off = (got[name].double() - value.double()).abs().max().item()
        assert off <= ulps * 2.0**-23 * value.abs().max().item(), (name, off)


# --- in DeepSpeed's engines ---

CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_kernel_equals_torch(stage: int, precision: str) -> None:
    ours, torchs = start(stage, precision, fused_kernel=True), start(stage, precision, fused_kernel=False)
    for i in range(STEPS):
        assert ours.step(i)
        assert torchs.step(i)
        assert_close(ours.tensors(), torchs.tensors(), ulps=2 * (i + 1))
    last = ours.tensors()
    assert last["step 0"].item() == STEPS
    for i, flat in enumerate(ours.master_weights.shards):  # the averages differ from the weights and from each other
        assert not torch.equal(last[f"average 0.999 {i}"], flat)
        assert not torch.equal(last[f"average 0.5 {i}"], last[f"average 0.999 {i}"])


@pytest.mark.parametrize("stage", [0, 2])
def test_kernel_equals_plain_adamw(stage: int) -> None:
    """Plain AdamW outside DeepSpeed, with averages by their definition, gives the same."""
    ours = start(stage, "fp32", fused_kernel=True, grad_clip=0.0)
    model = Dots().to(ours.engine.device)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    averages = {rate: [p.detach().clone() for p in model.parameters()] for rate in RATES}
    for i in range(STEPS):
        ours.step(i)
        plain.param_groups[0].update(lr=1e-2 / (1 + i), weight_decay=0.1 * i)
        for p, x in zip(model.parameters(), inputs(i, torch.float32), strict=True):
            p.grad = x.to(p.device)
        plain.step()
        for rate, tensors in averages.items():
            ops.update_ema(tensors, [p.detach() for p in model.parameters()], rate)
    for rate, tensors in averages.items():
        got = ours.master_weights.gather(ours.averages[rate])
        names = [name for name, _ in model.named_parameters()]
        assert_close(got, dict(zip(names, (t.cpu() for t in tensors), strict=True)), ulps=2 * STEPS)
    wanted = {name: p.detach().cpu() for name, p in model.named_parameters()}
    assert_close(ours.master_weights.gather(ours.master_weights.shards), wanted, ulps=2 * STEPS)


@pytest.mark.parametrize("fused_kernel", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_a_step_skipped_by_overflow_leaves_averages_alone(
    stage: int, fused_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_deepspeed()
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # slow on a CPU, and correct
    run = start(stage, "fp16", fused_kernel)
    assert run.step(0)
    before = run.tensors()
    assert not run.step(1, factor=1e5)
    for name, value in run.tensors().items():
        assert torch.equal(value, before[name]), name
    assert run.step(2)
    assert not torch.equal(run.tensors()["average 0.5 0"], before["average 0.5 0"])


# --- outside DeepSpeed ---


def alone(fused_kernel: bool = True, **settings: Any) -> tuple[list[nn.Parameter], AdamWEMA]:
    params = [nn.Parameter(p.detach().clone()) for p in Dots().parameters()]
    return params, AdamWEMA(params, fused_kernel=fused_kernel, **settings)


def give_gradients(params: list[nn.Parameter], i: int) -> None:
    for p, x in zip(params, inputs(i, torch.float32), strict=True):
        p.grad = x


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_state_dict_is_torchs(fused_kernel: bool) -> None:
    params, ours = alone(fused_kernel, lr=0.02, weight_decay=0.1)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    torchs = torch.optim.AdamW(twins, lr=0.02, weight_decay=0.1, fused=True)
    for i in range(2):
        give_gradients(params, i)
        give_gradients(twins, i)
        ours.step()
        torchs.step()
    got, wanted = ours.state_dict(), torchs.state_dict()
    assert got["param_groups"] == wanted["param_groups"]
    assert got["state"].keys() == wanted["state"].keys()
    for i, state in wanted["state"].items():
        assert list(got["state"][i]) == list(state)
        assert all(got["state"][i][key].dtype == value.dtype for key, value in state.items())
        assert_close(got["state"][i], state, ulps=4)


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
def test_state_of_any_adamw_loads(settings: dict[str, bool]) -> None:
    """After two steps by torch, both take the same third step."""
    twins = [nn.Parameter(p.detach().clone()) for p in Dots().parameters()]
    torchs = torch.optim.AdamW(twins, lr=0.02, weight_decay=0.1, **settings)
    for i in range(2):
        give_gradients(twins, i)
        torchs.step()
    params, ours = alone()
    for p, twin in zip(params, twins, strict=True):
        p.data.copy_(twin.detach())
    give_gradients(params, 5)
    ours.step()  # makes moments that loading replaces
    for p, twin in zip(params, twins, strict=True):
        p.data.copy_(twin.detach())
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    give_gradients(twins, 2)
    give_gradients(params, 2)
    torchs.step()
    ours.step()
    for p, twin in zip(params, twins, strict=True):
        assert_close({"": p.detach()}, {"": twin.detach()}, ulps=2)
        assert_close(ours.state[p], torchs.state[twin], ulps=2)


def test_round_trip_is_exact() -> None:
    """An optimiser that is saved after two steps and loaded takes a bit-identical third step, with its averages."""
    params, ours = alone(lr=0.02)
    averages = {rate: [p.detach().clone() for p in params] for rate in RATES}
    ours.attach_averages(params, averages)
    for i in range(2):
        give_gradients(params, i)
        ours.step()
    saved = copy.deepcopy((ours.state_dict(), [p.detach() for p in params], averages))
    others, loaded = alone(lr=0.5)
    loaded.load_state_dict(saved[0])
    for p, value in zip(others, saved[1], strict=True):
        p.data.copy_(value)
    loaded.attach_averages(others, saved[2])
    for each, optimizer in ((params, ours), (others, loaded)):
        give_gradients(each, 2)
        optimizer.step()
    for rate in RATES:
        assert all(map(torch.equal, averages[rate], loaded.averages[rate]))
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_groups_closures_and_missing_gradients(fused_kernel: bool) -> None:
    params, _ = alone()
    optimizer = AdamWEMA(
        [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5}], fused_kernel=fused_kernel
    )
    before = [p.detach().clone() for p in params]
    averages = {0.5: [torch.zeros_like(p) for p in before]}
    optimizer.attach_averages(params, averages)

    def closure() -> float:
        assert torch.is_grad_enabled()
        give_gradients(params, 0)
        params[1].grad = None
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert params[1] not in optimizer.state
    assert torch.equal(params[1], before[1])
    for p, old, average in zip(params, before, averages[0.5], strict=True):
        assert torch.equal(average, 0.5 * p.detach())  # half of zero and half of the weight
        assert p is params[1] or not torch.equal(p, old)


def test_a_step_counts_as_a_change_in_place() -> None:
    params, optimizer = alone()
    give_gradients(params, 0)
    version = params[0]._version
    optimizer.step()
    assert params[0]._version > version


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_a_step_on_the_device_reads_nothing(fused_kernel: bool) -> None:
    """The host does not read even whether gradients overflowed; the count of steps then stays the same."""
    params, optimizer = alone(fused_kernel)
    optimizer.attach_averages(params, {0.5: [torch.zeros_like(p) for p in params]})
    for i, (found_inf, taken) in enumerate([(0.0, 1), (1.0, 1), (0.0, 2)]):
        give_gradients(params, i)
        given = OnDevice(torch.full((), 0.1), found_inf=torch.full((), found_inf))
        optimizer.prepare()
        with Waits() as waits:
            optimizer.step_on_device(given)
        assert not waits.seen
        assert [int(optimizer.state[p]["step"]) for p in params] == [taken] * len(params)


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_gradients_in_another_layout(fused_kernel: bool) -> None:
    """A channels-last weight may have a channels-first gradient."""
    p = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    twin = nn.Parameter(p.detach().clone())
    ours, torchs = AdamWEMA([p], fused_kernel=fused_kernel), torch.optim.AdamW([twin])
    p.grad = torch.randn(4, 3, 3, 3)
    twin.grad = p.grad.clone(memory_format=torch.channels_last)
    ours.step()
    torchs.step()
    assert_close({"": p.detach()}, {"": twin.detach()}, ulps=2)


def test_copies() -> None:
    """Masters are updated by their copies' gradients or by their own, and copies follow; all else is as without."""
    params, plain = alone(fused_kernel=True)
    masters = [p.detach().clone().requires_grad_() for p in params]
    weights = [masters[0], *(p.detach().half().requires_grad_() for p in masters[1:])]
    ours = AdamWEMA(masters, fused_kernel=True)
    ours.attach_copies(masters, weights)
    for optimizer, stepped in ((plain, params), (ours, masters)):
        optimizer.attach_averages(stepped, {0.5: [p.detach().clone() for p in stepped]})
    for i in range(3):
        for p, weight, x in zip(params, weights, inputs(i, torch.float16), strict=True):
            weight.grad = x.to(weight.dtype)
            p.grad = weight.grad.float()
        if i == 1:  # sums over micro-batches
            for p, master in zip(params[1:], masters[1:], strict=True):
                master.grad = p.grad = 2 * p.grad
        with ops.using("triton"):
            norms = [optimizer.squared_norm() for optimizer in (plain, ours)]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-6)
        versions = [weight._version for weight in weights]
        plain.step()
        ours.step()
        assert all(weight._version > version for weight, version in zip(weights, versions, strict=True))
        for master in masters:
            master.grad = None
        for p, master, weight in zip(params, masters, weights, strict=True):
            assert torch.equal(p, master)
            assert torch.equal(weight, master.to(weight.dtype))
    assert all(map(torch.equal, plain.averages[0.5], ours.averages[0.5]))
    with pytest.raises(ValueError, match="only with fused_kernel"):
        alone(fused_kernel=False)[1].attach_copies(masters, weights)


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_refusals(fused_kernel: bool) -> None:
    params, optimizer = alone(fused_kernel)
    with pytest.raises(ValueError, match="in the shape of each of 5 master weights"):
        optimizer.attach_averages(params, {0.9: [torch.zeros(3)]})
    optimizer.attach_averages(params[1:], {0.9: [p.detach().clone() for p in params[1:]]})
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="none of a parameter"):
        optimizer.step()
    params, optimizer = alone(fused_kernel)
    give_gradients(params, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.step()


# --- DeepSpeed's private attributes ---


def test_the_release_of_deepspeed_that_was_tried() -> None:
    assert f"deepspeed=={TRIED}" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.parametrize("attribute", ["_hp_mapping", "single_partition_of_fp32_groups"])
def test_a_deepspeed_without_a_private_attribute(attribute: str) -> None:
    """The error is one sentence that names the release to install."""
    run = start(2, "bf16", fused_kernel=False)
    owner = next(run.engine.module.parameters()) if attribute == "_hp_mapping" else run.engine.optimizer
    delattr(owner, attribute)
    with pytest.raises(UserError, match=rf"has no \w+\); install deepspeed=={TRIED}"):
        MasterWeights(run.engine.optimizer, run.engine.module, 0, 1)
