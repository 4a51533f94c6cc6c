"""Where a step's time goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from training.small_trainer import small_trainer

from fastdiff.training.profile import GAPS, OTHER, SETTLING, WAIT, Breakdown, StepProfiler, classify, floor_of, union

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64"], "convolutions"),
        (["void cudnn::ops::nhwcToNchwKernel<__nv_bfloat16>"], "convolutions"),
        (["aten::mkldnn_convolution", "aten::_convolution"], "convolutions"),
        (["_slab_forward"], "norms"),
        (["aten::sum", "_GroupNormSiLU"], "norms"),
        (["_forward_short"], "attention"),
        (["pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>"], "attention"),
        (["nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN"], "matrix products"),
        (["_adamw_ema"], "optimiser"),
        (["aten::add_", "Optimizer.step#AdamWEMA.step"], "optimiser"),
        (["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"], "communication"),
        (["_q_sample"], "noising and loss"),
        (["Memcpy DtoD (Device -> Device)"], "copies"),
        (["triton_poi_fused_add_3"], OTHER),
    ],
)
def test_classes(names: list[str], kind: str) -> None:
    assert classify(names) == kind


def test_union() -> None:
    assert union([]) == 0
    assert union([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7


def test_profile_of_a_trainer(tmp_path: Path) -> None:
    """It begins once the run has settled, watches as many steps as asked for, and accounts for all of their time."""
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
