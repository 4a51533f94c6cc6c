"""The profiler attributes the time of a step to classes of operations."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from helpers.small_trainer import small_trainer

from fastdiff.training.diagnostics.profile import (
    GAPS,
    OTHER,
    POINTWISE,
    REDUCTIONS,
    SETTLING,
    WAIT,
    Breakdown,
    StepProfiler,
    classify,
    floor_of,
    times_of,
    union,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = ROOT / "kernels"
CLASS_OF_FILE = {
    "adamw_ema": "optimiser",
    "attention": "attention",
    "group_norm_silu": "norms",
    "diffusion_loss": "noising and loss",
    "noise": "noising and loss",
    "output_layer": "norms",
    "q_sample": "noising and loss",
    "sampler_step": "noising and loss",
    "timesteps": "noising and loss",
}
LAUNCHED = r"\b(?:launcher\(\s*|device\.)(_\w+)"
"""A kernel that is launched, by its name in the file where it is defined or in another one, called `device`."""


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64"], "convolutions"),
        (["void cudnn::ops::nhwcToNchwKernel<__nv_bfloat16>"], "convolutions"),
        (["aten::mkldnn_convolution", "aten::_convolution"], "convolutions"),
        (["void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_64x64>"], "convolutions"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1"], "attention"),
        (["sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_stage5_warpsize2x2x1"], "matrix products"),
        (["aten::sum", "_GroupNormSiLU"], "norms"),
        (["_forward_short"], "attention"),
        (["pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>"], "attention"),
        (["nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN"], "matrix products"),
        (["_adamw_ema"], "optimiser"),
        (["aten::add_", "Optimizer.step#AdamWEMA.step"], "optimiser"),
        (["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"], "communication"),
        (["_q_sample"], "noising and loss"),
        (["Memcpy DtoD (Device -> Device)"], "copies"),
        (["void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
          "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>"], "copies"),
        (["void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>>"], POINTWISE),
        (["void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>"], REDUCTIONS),
        (["aten::add_", "autograd::engine::evaluate_function: AddBackward0"], POINTWISE),
        (["aten::sum"], REDUCTIONS),
        (["triton_poi_fused_add_3"], POINTWISE),
        (["triton_poi_fused__to_copy_convolution_native_group_norm_17"], POINTWISE),
        (["triton_red_fused_convolution_backward_sum_5"], REDUCTIONS),
        (["triton_per_fused__softmax_mm_2"], REDUCTIONS),
        (["triton_for_fused_lerp_0"], POINTWISE),
        (["triton_tem_fused_convolution_4"], "convolutions"),
        (["Context Sync"], OTHER),
    ],
)  # fmt: skip
def test_classes(names: list[str], kind: str) -> None:
    assert classify(names) == kind


@pytest.mark.parametrize("name", sorted(CLASS_OF_FILE))
def test_classes_of_our_own_kernels(name: str) -> None:
    """Every kernel that a file in `kernels/` launches has the class of that file."""
    launched = re.findall(LAUNCHED, (KERNELS / f"{name}.py").read_text())
    assert launched
    assert {kernel: classify([kernel]) for kernel in launched} == dict.fromkeys(launched, CLASS_OF_FILE[name])


def test_no_file_of_kernels_is_left_out() -> None:
    launching = {path.stem for path in KERNELS.glob("*.py") if re.search(LAUNCHED, path.read_text())}
    assert launching == set(CLASS_OF_FILE)


@dataclass
class Event:
    """One of a profiler's results, as PyTorch's `_KinetoEvent` presents it; times in nanoseconds."""

    label: str
    start: int
    end: int
    annotation: bool = False
    where: torch.autograd.DeviceType = torch.autograd.DeviceType.CUDA

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.end - self.start

    def is_user_annotation(self) -> bool:
        return self.annotation

    def device_type(self) -> torch.autograd.DeviceType:
        return self.where


def test_times_on_a_gpu() -> None:
    """Annotations and events of the host don't count, and events that overlap count as busy time only once."""
    epoch = 1_700_000_000_000_000_000  # real times are this large, and must not be rounded
    events = [
        Event("Optimizer.step#AdamWEMA.step", 0, 900, annotation=True),
        Event("ProfilerStep#3", 0, 5_000, annotation=True),
        Event("aten::convolution", 0, 5_000, where=torch.autograd.DeviceType.CPU),
        Event("_adamw_ema", 100, 400),
        Event("_adamw_ema", 500, 900),
        Event("triton_poi_fused_convolution_3", 800, 1_100),
        Event("sm90_xmma_fprop_implicit_gemm_bf16", 2_000, 3_000),
    ]
    for event in events:
        event.start, event.end = epoch + event.start, epoch + event.end
    watched = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    found = times_of(watched, GPU)  # type: ignore[arg-type]
    assert found.classes == pytest.approx({"optimiser": 700e-9, POINTWISE: 300e-9, "convolutions": 1000e-9}, rel=1e-12)
    assert found.busy == pytest.approx(1_900e-9, rel=1e-12)
    assert list(found.kernels) == [
        "sm90_xmma_fprop_implicit_gemm_bf16",
        "_adamw_ema",
        "triton_poi_fused_convolution_3",
    ]
    assert found.kernels["_adamw_ema"] == (pytest.approx(700e-9, rel=1e-12), 2)


def test_times_on_a_cpu() -> None:
    """Each operation counts with its own time only, in the class of its caller."""
    a = torch.ones(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        with torch.profiler.record_function("Optimizer.step#Test.step"):
            a.add_(1.0)
        a @ a
    found = times_of(watched, CPU)
    assert found.kernels["aten::mm"][1] == 1
    assert found.classes["matrix products"] >= found.kernels["aten::mm"][0] > 0
    assert found.classes["optimiser"] >= found.kernels["aten::add_"][0] > 0
    assert POINTWISE not in found.classes
    assert found.busy == pytest.approx(sum(seconds for seconds, _ in found.kernels.values()))


def test_union() -> None:
    assert union([]) == 0
    assert union([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7


@pytest.mark.slow
def test_profile_of_a_trainer(tmp_path: Path) -> None:
    """The profiler skips the first steps, records as many as requested, and accounts for all of their time."""
    trainer = small_trainer()
    profiler = StepProfiler(2, tmp_path / "profile", 4, CPU, floor_of(trainer.model_settings, trainer.train, 4, CPU))
    found = []
    for i in range(SETTLING + 3):
        trainer.take_step()
        result = profiler.advance(trainer.waited)
        if result is not None:
            assert i == SETTLING + 1
            found.append(result)
    (breakdown,) = found
    assert breakdown.steps == 2
    assert breakdown.classes["convolutions"] > 0
    assert breakdown.classes["norms"] > 0
    assert breakdown.classes["optimiser"] > 0
    assert {WAIT, GAPS} <= set(breakdown.classes)
    assert sum(breakdown.classes.values()) >= 0.99 * breakdown.step_ms
    assert breakdown.floor["convolutions"] > 0
    written = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert written["classes"] == breakdown.classes
    assert (tmp_path / "profile" / "profile.txt").read_text().splitlines() == breakdown.rows()
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


def test_rows() -> None:
    rows = Breakdown(4, 8, 20.0, {"norms": 5.0, "convolutions": 15.0, "copies": 0.0}, {"norms": 2.5}, "CPU").rows()
    assert [row.split()[0] for row in rows[1:]] == ["convolutions", "norms", "step"]
    assert "75.0%" in rows[1]
    assert rows[2].split()[-1] == "2.50"
    assert rows[1].split()[-1] == "-"
    assert "400 images/s" in rows[-1]
