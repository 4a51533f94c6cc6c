"""The compiled network: one graph, compiled once, with the numbers of the one that isn't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_trainer import MODEL, losses_of, small_trainer, weights_of

from fastdiff import ops
from fastdiff.models import UNetSettings, build_model
from fastdiff.models.blocks import AttentionBlock
from fastdiff.runtime import machine
from fastdiff.training import step_plan
from fastdiff.training.checkpoints.format import read_snapshot
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import WORTHWHILE_STEPS, decide_compile

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled yet, and no F.linear of DeepSpeed's, which ZeRO-3 leaves behind in a process."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo and AOTAutograd as ever, but their graphs run as they are: no minutes in a C++ compiler."""
    chosen = step_plan.compile_kwargs
    monkeypatch.setattr(step_plan, "compile_kwargs", lambda *a, **k: {**chosen(*a, **k), "backend": "aot_eager"})


THROUGH_ENGINE = {"wall_clock_breakdown": False}


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
    """Through accumulation, averages, logging, a checkpoint and a resume; with the uncompiled network's losses."""
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
    # Compiled code rounds in other places; to bf16 where the CPU has it.
    rounding = 2.0**-8 if settings.get("precision") == "bf16" else 1e-4
    for ours, theirs in zip(losses, plain, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=rounding), name
    for name, value in weights_of(trainer).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_with_inductor() -> None:
    """The whole way down, for the smallest network there is."""
    smallest = {"channel_mult": "1", "attention_resolutions": "", "dropout": 0.0}
    plain = losses_of(small_trainer(model=smallest), 2)
    compiled = losses_of(small_trainer(model=smallest, compile=True), 2)
    for ours, theirs in zip(compiled, plain, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4), name


def test_kernels_stay_in_one_graph() -> None:
    """Ops with kernels are nodes of the graph, and none of them breaks it."""
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
    assert sum("group_norm_silu" in name for name in names) == sum(
        isinstance(module, torch.nn.GroupNorm) for module in network.modules()
    )
    attention = sum(isinstance(module, AttentionBlock) for module in network.modules())
    products = sum("linear" in name for name in names)
    assert products == 2 + 1 + 2 * attention, "two for the time embedding, one that projects it for all blocks"


def test_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide_compile(TrainSettings(), GPU, 1)[0]
    assert not decide_compile(TrainSettings(zero_stage=3), GPU, 10**6)[0]
    assert not decide_compile(TrainSettings(compile=False), GPU, 10**6)[0]
    assert decide_compile(TrainSettings(compile=True), CPU, 1)[0]
    assert not decide_compile(TrainSettings(), CPU, WORTHWHILE_STEPS - 1)[0]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    compiles, why = decide_compile(TrainSettings(), CPU, 10**6)
    assert not compiles
    assert "C++ compiler" in why
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert decide_compile(TrainSettings(), CPU, 10**6)[0]


def test_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set below is gone after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.keep_compiled_code() == tmp_path / "fastdiff" / "inductor"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "fastdiff" / "inductor" / "triton")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/triton")
    assert machine.keep_compiled_code() == Path("/elsewhere")
    assert os.environ["TRITON_CACHE_DIR"] == "/triton"
