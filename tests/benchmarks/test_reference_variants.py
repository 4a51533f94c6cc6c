"""The variants that ours is compared with use none of our kernels, also where kernels would run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from helpers.tiny import DIFFUSION, MODEL

from benchmarks import bench_sampling, bench_train, peers, sampling_variants, train_variants
from benchmarks.seed_step import Attention, SeedStep
from fastdiff import ops
from fastdiff.config.sections import Config
from fastdiff.runtime import machine
from fastdiff.runtime.machine import tf32
from fastdiff.training.deepspeed_engine import start_processes

CONFIG = Config.model_validate({"model": {**MODEL, "learn_sigma": True}, "diffusion": DIFFUSION})
THEIRS = ("reference", *peers.VARIANTS)


class KernelWanted(Exception):
    """Raised when an op would be computed by its kernel."""


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every op use its kernel unless the mode is "reference", and skip compilation, which takes long."""

    def uses_kernels(x: torch.Tensor, unsupported: str = "") -> bool:
        if not only_reference():
            raise KernelWanted
        return False

    monkeypatch.setattr(ops, "uses_kernels", uses_kernels)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def only_reference() -> bool:
    """Return whether the mode of the ops is "reference"."""
    return [choice.op for choice in ops.choices(torch.device("cpu"))] == ["all"]


def case_of(script: Any) -> Any:
    processes = start_processes()
    if script is bench_train:
        return train_variants.Case(CONFIG, 2, "fp32", processes)
    return sampling_variants.DrawCase(CONFIG, 2, "fp32", processes, "ddpm", 3)


@pytest.mark.parametrize("variant", THEIRS)
@pytest.mark.parametrize("script", [bench_train, bench_sampling])
def test_none_of_our_kernels(script: Any, variant: str) -> None:
    """Kernels are used neither when a variant is made nor in its steps, and the mode of ours is restored in between."""
    if variant.startswith("diffusers"):
        pytest.importorskip("diffusers")
    step = script.VARIANTS[variant](case_of(script))
    assert not only_reference()
    step()
    step()
    assert not only_reference()


@pytest.mark.parametrize("script", [bench_train, bench_sampling])
def test_ours_uses_its_kernels(script: Any) -> None:
    with pytest.raises(KernelWanted):
        script.VARIANTS["ours eager"](case_of(script))()


def test_autotuned_variants_get_more_options_and_no_other_difference() -> None:
    """Peers are compiled with the arguments of ours; max-autotune adds its own and leaves graphs to the whole step."""
    device = torch.device("cuda")
    usual, tuned = (peers.compile_kwargs(device, autotune) for autotune in (False, True))
    assert usual == machine.compile_kwargs(device)
    assert tuned["options"].items() >= {**usual["options"], "max_autotune": True}.items()
    assert not tuned["options"].get("triton.cudagraphs")
    assert {**tuned, "options": None} == {**usual, "options": None}


@pytest.mark.parametrize("changes", [{}, {"num_heads": 2, "class_cond": True, "num_classes": 3}], ids=str)
def test_the_strengthened_network_is_the_same_function(changes: dict[str, Any]) -> None:
    with ops.using("reference"):
        train_variants.check_same_function(CONFIG.model.model_copy(update=changes), peers.strengthened)


def test_the_strengthened_network_uses_fused_operations() -> None:
    """Each attention is one call of scaled_dot_product_attention, whose inputs are contiguous in D."""
    network, seen = peers.strengthened(CONFIG.model), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append([x.stride(-1) for x in (q, k, v)])
        return attend(q, k, v)

    network.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", noted):
        network(x, torch.zeros(2))
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    assert seen == [[1, 1, 1]] * len(attentions)
    assert seen


def test_the_mode_comes_back_after_a_failure() -> None:
    def fail() -> None:
        assert only_reference()
        raise ZeroDivisionError

    step = train_variants.without_our_ops(lambda: fail)()
    with pytest.raises(ZeroDivisionError):
        step()
    assert not only_reference()


@pytest.mark.parametrize("script", [bench_train, bench_sampling])
def test_products_are_exact_in_ours_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours forbids TF32 as train.py and sample.py do, and the variants it is compared with keep PyTorch's default."""
    monkeypatch.setattr(ops, "uses_kernels", lambda *_: False)
    allowed: list[bool] = []
    convolve = torch.nn.functional.conv2d

    def conv2d(*args: Any, **kwargs: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return convolve(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    with tf32(True):
        for variant, expected in (("ours eager", False), ("reference", True)):
            step = script.VARIANTS[variant](case_of(script))
            allowed.clear()
            step()
            assert set(allowed) == {expected}, variant
        assert torch.backends.cudnn.allow_tf32


class _Huge(torch.nn.Module):
    """A network whose gradients overflow as long as the loss scale is above 2^10."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def convert_to_fp16(self) -> None:
        self.weight.data = self.weight.data.half()


def test_a_reference_that_overflows_lowers_its_loss_scale() -> None:
    """A skipped step would take less time, so the reference must take whole steps after the first ones."""
    model = _Huge()
    losses = lambda network, x, t, kwargs: {"loss": (network.weight * 2.0**5).float().sum().expand(len(x))}
    step = SeedStep(model, losses, 10, fp16=True)
    taken = []
    for _ in range(4):
        step(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {})
        taken.append(step.loss_scale)
        assert model.weight.isfinite().all()
    assert taken == [2.0**11, 2.0**10, 2.0**10, 2.0**10]
    assert (step.masters[0] < 1).all(), "the steps without overflow count"
