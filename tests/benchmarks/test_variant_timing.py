"""A variant is built, timed and profiled, and gets the weights of its case."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.tiny import DIFFUSION, MODEL

from benchmarks import bench_sampling, bench_train, sampling_variants, train_variants, variant_timing
from fastdiff.config.sections import Config
from fastdiff.models import build_model
from fastdiff.runtime.processes import Processes

CONFIG = Config.model_validate({"model": MODEL, "diffusion": DIFFUSION})


def emitted(make: Any, case: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    variant_timing.measure(make, case, lambda **row: rows.append(row), seconds=0.02, rounds=2, profile_steps=1)
    return rows


@pytest.mark.parametrize("variant", ["reference", "ours eager"])
def test_a_training_variant(variant: str, processes: Processes) -> None:
    """Figures are emitted one after the other, and rates are computed from the median of the rounds."""
    case = train_variants.Case(CONFIG, 2, "fp32", processes)
    begun, times, profile = emitted(lambda: bench_train.VARIANTS[variant](case), case)
    assert begun["start_seconds"] > 0
    assert begun["peak_memory_gb"] > 0
    assert len(times["ms"]) == 2
    assert times["host_ms"] > 0
    assert times["images_per_second"] == pytest.approx(2e3 / (sum(times["ms"]) / 2))
    assert times["mfu"] is None, "a CPU's peak is not known"
    assert sum(profile["classes"].values()) == pytest.approx(profile["busy_ms"])
    assert list(profile["classes"].values()) == sorted(profile["classes"].values(), reverse=True)
    assert any("convolution" in name for _, _, name in profile["top"])
    assert profile["launches"] is None, "a CPU launches nothing"


def test_a_drawing_variant(processes: Processes) -> None:
    case = sampling_variants.DrawCase(CONFIG, 2, "fp32", processes, "ddpm", 3)
    _, times, _ = emitted(lambda: bench_sampling.VARIANTS["ours eager"](case), case)
    ms = sum(times["ms"]) / 2
    assert times["ms_per_evaluation"] == pytest.approx(ms / 3)
    assert times["evaluations_per_second"] == pytest.approx(2 * 3 * 1e3 / ms)
    assert times["images_per_second"] == pytest.approx(2e3 / ms)


def test_host_time_is_of_single_steps() -> None:
    """Rounds have as many steps as fill them, and the host's time is always that of one step."""
    calls = []

    def step() -> None:
        calls.append(None)
        time.sleep(0.002)

    timing = variant_timing.timed(step, seconds=0.09, rounds=3)
    assert len(timing.ms) == 3
    assert all(value >= 2 for value in (*timing.ms, timing.host_ms))
    assert len(calls) >= 1 + 3 * 2 + 2


def test_launches_by_name() -> None:
    """Launches are counted by the names of CUDA's runtime and driver in a profile."""
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"]
    names += ["cudaLaunchCooperativeKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamSynchronize"]
    names += ["cudaDeviceSynchronize", "cudaMalloc", "aten::add", "cudaFuncGetAttributes"]
    assert variant_timing.count_launches(names) == {"kernels": 5, "graphs": 1, "copies and fills": 2, "waits": 1}


def test_memory_of_graphs() -> None:
    """Only memory of private pools beyond their live tensors counts, because those are counted already."""
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 10},
        {"segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 20},
        {"total_size": 7, "allocated_size": 0},
    ]
    assert variant_timing.bytes_kept_by_graphs(segments) == 30


def test_networks_are_filled_with_the_weights_of_the_case(processes: Processes) -> None:
    """Networks draw no initial values, and training one variant does not change the next."""
    case = train_variants.Case(CONFIG, 2, "fp32", processes)
    before = torch.get_rng_state()
    model = case.filled(build_model)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, case.weights[name], rtol=0, atol=0)
        assert value.data_ptr() != case.weights[name].data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())
    same = train_variants.Case(CONFIG, 2, "fp32", processes)
    assert all(torch.equal(value, same.weights[name]) for name, value in case.weights.items())
    assert torch.equal(case.images, same.images)


def test_the_reference_is_checked_at_few_channels() -> None:
    """For a narrow network of the same kind as each shipped one, the reference equals ours."""
    for name in ("cifar10_uncond", "imagenet64_270M", "demo"):
        train_variants.check_same_function(bench_train.load(name).model)


def test_a_wrong_reference_is_noticed() -> None:
    class Wrong(train_variants.SeedUNet):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 1.01 * super().forward(*args, **kwargs)

    with pytest.raises(AssertionError, match="not close"):
        train_variants.check_same_function(CONFIG.model, Wrong)
