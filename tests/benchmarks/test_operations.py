"""Operations, precision, launches and memory of a step are what the variants have."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import DIFFUSION, MODEL

from benchmarks import operations
from benchmarks.bench_train import load
from fastdiff.config.sections import Config
from fastdiff.models import build_model
from fastdiff.runtime.machine import tf32

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def small(**changes: object) -> Config:
    return Config.model_validate({"model": {**MODEL, **changes}, "diffusion": DIFFUSION})


def test_what_the_reference_keeps() -> None:
    """356 MB for every image of the 270M network, as is known of its memory on a GPU."""
    assert operations.reference_activations(load("imagenet64_270M").model) == pytest.approx(356e6, rel=0.01)


def test_variants_in_one_process_keep_their_states_and_graphs() -> None:
    model = load("cifar10_uncond").model
    state, activations = operations.memory_of("ours", model, 256)
    alone = operations.memory_together(["reference"], model, 256, gpu=True)
    assert operations.memory_together(["reference", "ours"], model, 256, gpu=True) == alone + state + activations
    assert operations.memory_together(["reference", "ours eager"], model, 256, gpu=True) == alone + state
    assert operations.memory_together(["reference", "ours"], model, 256, gpu=False) == alone + state
    fused = operations.memory_together(["reference+compile"], model, 256, gpu=True)
    assert 0.5 * alone < fused < alone, "fused operations keep less"


@pytest.mark.parametrize(
    ("variant", "asked", "device", "computed"),
    [
        ("reference", "bf16", GPU, "fp16"),
        ("reference", "bf16", CPU, "fp32"),
        ("reference+compile", "bf16", GPU, "bf16"),
        ("ours -compile", "bf16", GPU, "bf16"),
        ("ours", "fp32", GPU, "fp32"),
        ("diffusers", "fp32", GPU, "tf32"),
        ("diffusers", "fp32", CPU, "fp32"),
    ],
)
def test_precisions(variant: str, asked: str, device: torch.device, computed: str) -> None:
    """improved-diffusion has fp16 only, and all but ours leave PyTorch's TF32 on for float32 convolutions."""
    with tf32(True):
        assert operations.precision_of(variant, asked, device) == computed


def test_executed_shares() -> None:
    model = small().model
    ours = operations.executed_share("ours", model, training=True)
    assert 4 / 9 < ours < 1
    assert operations.executed_share("ours", model, training=False) == ours
    assert operations.executed_share("ours -kernels", model, training=True) == 1
    assert operations.executed_share("reference+compile", model, training=True) == 1
    recomputing = model.model_copy(update={"use_checkpoint": True})
    assert ours < operations.executed_share("ours", recomputing, training=True) < ours + 1 / 3
    assert operations.executed_share("ours", recomputing, training=False) == ours


def test_the_network_of_diffusers_has_as_many_operations() -> None:
    pytest.importorskip("diffusers")
    assert operations.executed_share("diffusers", load("cifar10_uncond").model, training=True) == pytest.approx(
        1, abs=0.02
    )


def test_launches_are_counted_call_by_call() -> None:
    """Blocks of equal shapes, whose calls have the same signature, count each."""
    counts = [operations.recorded_launches(small(num_res_blocks=n), 2, "bf16") for n in (1, 2, 3)]
    for kind in ("fastdiff kernels", "library products"):
        first, second = (b[kind] - a[kind] for a, b in zip(counts, counts[1:], strict=False))
        assert first == second > 0
    blocks = [sum("in_layers.2" in name for name, _ in build_model(small(num_res_blocks=n).model).named_modules())
              for n in (1, 2)]  # fmt: skip
    norms = 2 * (blocks[1] - blocks[0])
    assert counts[1]["fastdiff kernels"] - counts[0]["fastdiff kernels"] >= 2 * norms, "forward and backward"
