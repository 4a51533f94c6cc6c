"""The network is compiled once, as one graph, and computes what the uncompiled one computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdiff.kernels import aot, launch
from functorch.compile import make_boxed_func
from helpers.small_trainer import MODEL, THROUGH_ENGINE, losses_of, small_trainer, weights_of
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings
from fastdiff.models import UNetSettings, build_model
from fastdiff.models.arrangement import arrange_weights
from fastdiff.models.blocks import AttentionBlock, Conv2d, ResBlock
from fastdiff.runtime.machine import compile_kwargs
from fastdiff.training import step_plan
from fastdiff.training.checkpoints.format import read_snapshot

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without compiled code and without DeepSpeed's F.linear, which ZeRO-3 leaves in the process.

    Eager code has its maps channels-last, as compiled code does: another layout rounds differently, and four steps of
    AdamW make a difference in the fourth digit of that.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(ops, "_channels_last", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the graphs of Dynamo and AOTAutograd without Inductor, whose C++ compiler would take minutes."""
    chosen = step_plan.compile_kwargs
    monkeypatch.setattr(step_plan, "compile_kwargs", lambda *a, **k: {**chosen(*a, **k), "backend": "aot_eager"})


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule_sampler": "loss-second-moment"},
        {"deepspeed": THROUGH_ENGINE},
        {"deepspeed": THROUGH_ENGINE, "zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 2, "model": {"use_checkpoint": True}},
    ],
    ids=["alone", "through DeepSpeed", "ZeRO-1 bf16", "ZeRO-2 recomputing"],
)
def test_compiled_once(settings: dict[str, Any], tmp_path: Path, no_backend: None) -> None:
    """Accumulation, averages, logging, a checkpoint and a resume recompile nothing; losses are the uncompiled ones."""
    plain = losses_of(small_trainer(**settings), 4)
    trainer = small_trainer(compile=True, **settings)
    losses = losses_of(trainer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += losses_of(trainer, 1)
        trainer.save(tmp_path, {})
        losses += losses_of(trainer, 2)
        snapshot = read_snapshot(tmp_path / "step_000002", ["0.9", "0.99"])
        resumed = small_trainer(snapshot, compile=True, **settings)
        assert losses_of(resumed, 2) == losses[2:]
    # Compiled code rounds in other places, to bf16 if the CPU has it.
    rounding = 2.0**-8 if settings.get("precision") == "bf16" else 1e-4
    for ours, theirs in zip(losses, plain, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=rounding), name
    for name, value in weights_of(trainer).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_with_inductor() -> None:
    """Inductor's code gives the same metrics, for the smallest network."""
    smallest = {"channel_mult": "1", "attention_resolutions": "", "dropout": 0.0}
    plain = losses_of(small_trainer(model=smallest), 2)
    compiled = losses_of(small_trainer(model=smallest, compile=True), 2)
    for ours, theirs in zip(compiled, plain, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4), name


def test_bf16_gradients_with_inductor() -> None:
    """A residual block's gradients in bf16 err by no more than its maps' rounding, 2^-9 in each of a handful of steps.

    Without `machine.KEEPS_STORES` those that pass the block's first norm are not finite on a CPU with AVX-512, where
    g++ 11 and 12 drop stores.
    """
    torch.manual_seed(0)
    before = Conv2d(32, 32, 3, padding=1)
    block = ResBlock(64, 16, 32, dropout=0.0, use_scale_shift_norm=True)
    with torch.no_grad():
        for parameter in block.parameters():  # some start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    emb = torch.randn(2, block.emb_width)
    maps = [torch.randn(2, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(3)]

    def gradients(network: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, skip, upstream = (each.to(dtype) for each in maps)
        x.requires_grad_()
        skip.requires_grad_()
        return list(torch.autograd.grad(network(x, skip), [x, skip, before.weight], upstream))

    def network(x: Tensor, skip: Tensor) -> Tensor:
        return block(before(x), emb, skip)

    compiled = torch.compile(network, **compile_kwargs(torch.device("cpu")))
    names = ("x", "skip", "weight")
    exact = gradients(network, torch.float64)
    for name, ours, right in zip(names, gradients(compiled, torch.bfloat16), exact, strict=True):
        assert ours.isfinite().all(), name
        assert (ours.double() - right).norm() < 2.0**-6 * right.norm(), name


def test_kernels_stay_in_one_graph() -> None:
    """Ops with kernels are nodes of the graph and don't break it."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    settings = UNetSettings(**{**MODEL, "learn_sigma": False})
    meta = torch.device("meta")
    with meta:
        network = build_model(settings).train()
    x, t = torch.empty(2, 8, 8, 8, device=meta), torch.empty(2, dtype=torch.int64, device=meta)
    with ops.using("triton", anywhere=True):
        torch.compile(network.forward, fullgraph=True, dynamic=False, backend=backend)(x, t)
    norms = sum("group_norm_silu" in name or "norm_and_shortcut" in name for name in names)
    assert norms == sum(isinstance(module, torch.nn.GroupNorm) for module in network.modules())
    attention = sum(isinstance(module, AttentionBlock) for module in network.modules())
    products = sum("linear" in name for name in names)
    assert products == 2 + 1 + 2 * attention, "two for the time embedding, one that projects it for all blocks"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of maps between regions, which Dynamo looks at
@pytest.mark.parametrize("in_regions", [False, True], ids=["whole", "in regions"])
def test_recorded_launches_are_those_of_compiled_code(in_regions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's launches recorded in eager code equal those of its graphs, over which the pass for sums has gone.

    The attention before the Downsample reads a map whose gradient is a sum that has other readers.
    """

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.sums_in_norms()(graph.graph)
        graph.recompile()
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    monkeypatch.setattr(step_plan, "compile_kwargs", lambda *_, **__: {"backend": backend, "dynamic": False})
    settings = UNetSettings(**{**MODEL, "attention_resolutions": "8,4"})
    network = build_model(settings).train().set_precision(torch.bfloat16)
    arrange_weights(network)
    step_plan.compile_network(network, zero_stage=0, in_regions=in_regions)
    x = torch.zeros(2, 8, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with ops.using("triton", anywhere=True), launch.record() as made:
        network(x, torch.zeros(2, dtype=torch.int64)).sum().backward()
    given = (settings, DiffusionSettings(diffusion_steps=50), 2, torch.bfloat16)
    recorded = step_plan.training_launches(*given, in_regions=in_regions)
    ours, expected = (Counter(map(aot.to_json, filter(_of_the_network, each))) for each in (made, recorded))
    assert ours == expected


def _of_the_network(one: launch.Launch) -> bool:
    """Return whether a launch computes a layer, and not the loss or the update."""
    return one.kernel.fn.__module__.endswith((".attention", ".group_norm_silu_kernels", ".output_layer"))
