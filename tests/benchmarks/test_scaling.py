"""The model of scaling agrees with what DeepSpeed sends and stores on two processes, and its arithmetic is right."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import HELPERS, zero_run
from helpers.ranks import run_ranks
from helpers.tiny import refusal

from benchmarks import roofline, scaling

CASES = ["0:bf16", "1:bf16", "2:bf16", "3:bf16", "3:bf16:0", "0:fp32"]
SIZE = scaling.Size(parameters=1_000_000, persistent=1_000, tensors=10)
LINKS = scaling.Links(intra=400e9, inter=40e9)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the counts of each case, from one launch of two processes."""
    out = tmp_path_factory.mktemp("zero") / "counts.json"
    run_ranks([str(HELPERS / "zero_run.py"), str(out), *CASES])
    return dict(zip(CASES, json.loads(out.read_text()), strict=True))


def formula(case: dict[str, Any]) -> tuple[scaling.Size, int]:
    return scaling.size_of(zero_run.MODEL, zero_run.PERSISTENT, case["reuse"]), 4 if case["precision"] == "fp32" else 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_messages_are_deepspeeds(name: str, real: dict[str, dict[str, Any]]) -> None:
    """The formulae give all messages that DeepSpeed logs, but for a few scalars."""
    case = real[name]
    size, weight_bytes = formula(case)
    expected = scaling.messages(size, case["stage"], zero_run.ACCUMULATION, weight_bytes=weight_bytes)
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        assert case["messages"].pop(kind, 0) == pytest.approx(getattr(expected, kind), rel=1e-4, abs=64), kind
    assert sum(case["messages"].values()) < 1e-3 * weight_bytes * size.parameters, case["messages"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_is_deepspeeds(name: str, real: dict[str, dict[str, Any]]) -> None:
    """Gradients of stage 1 are whole until the last micro-batch, and only the rank's own part after it."""
    case = real[name]
    size, weight_bytes = formula(case)
    expected = scaling.memory(size, case["stage"], 2, weight_bytes=weight_bytes, averages=2)
    for kind in ("weights", "masters", "moments", "averages"):
        assert case[kind] == pytest.approx(getattr(expected, kind), rel=0.01), kind
    gradients = case["gradients"] + (case["accumulated"] if case["stage"] == 1 else 0)
    assert gradients == pytest.approx(expected.gradients, rel=0.01)
    if case["stage"] >= 2:
        assert case["accumulated"] == 0
    if case["stage"] == 3:
        assert case["whole"] == pytest.approx(expected.gathered + weight_bytes * size.persistent, rel=0.01)


def test_a_ring_by_hand() -> None:
    """Each of 4 GPUs of a node sends 3/4 of 100 GB; of 2 nodes of 8 GPUs, also half of an eighth to the other node."""
    assert LINKS.seconds(100e9, 4) == pytest.approx(75e9 / 400e9)
    assert LINKS.seconds(100e9, 16) == pytest.approx(100e9 * 7 / 8 / 400e9 + 100e9 / 8 / 2 / 40e9)
    assert LINKS.seconds(100e9, 1) == 0
    slow = scaling.Links(400e9, 40e9, latency=1e-3)
    assert slow.seconds(0, 8, messages=2) == pytest.approx(6e-3)
    assert scaling.Messages(all_reduce=8.0, reduce_scatter=4.0, all_gather=2.0).sent(4) == pytest.approx(22 * 3 / 4)


def row(stage: int, gpus: int, accumulation: int = 1, **changes: Any) -> scaling.Row:
    step = scaling.Step(launches=0.001, per_image=0.001, optimiser=0.004)
    return scaling.row(SIZE, step, stage, gpus, 9, accumulation, LINKS, **changes)


def test_one_gpu_is_the_measured_step() -> None:
    step = scaling.measured_step(100.0, 16, optimiser=0.004, launches=0.002)
    assert step.micro(16) + step.optimiser == pytest.approx(0.1)
    alone = scaling.row(SIZE, step, 0, 1, 16, 1, LINKS)
    assert alone.step_ms == pytest.approx(100)
    assert alone.exposed_ms == alone.sent_mb == 0


def test_time_by_hand() -> None:
    """One graph hides nothing; of two regions, the first one's full bucket is sent during the second one's backward."""
    reduction = 1e3 * 2 * 2e6 / 2 / 400e9  # of 2 MB on 2 GPUs, ms
    whole = row(0, 2, overlap=1.0)
    assert whole.step_ms == pytest.approx(10 + 4 + reduction)
    shared = row(1, 2, overlap=1.0)
    assert shared.step_ms == pytest.approx(10 + 2 + 1.5 * reduction)
    regions = [scaling.Region(0.5, 400_000), scaling.Region(0.5, 600_000)]
    hidden = row(1, 2, overlap=1.0, bucket=300_000, regions=regions)
    assert hidden.exposed_ms == pytest.approx((1 - 0.3 + 0.5) * reduction)  # the gather follows the step
    assert hidden.one_graph_ms == shared.exposed_ms == shared.one_graph_ms
    assert row(1, 2, overlap=0.5, bucket=300_000, regions=regions).exposed_ms == pytest.approx(1.35 * reduction)
    assert row(2, 2, accumulation=4, overlap=1.0, bucket=300_000, regions=regions).exposed_ms == pytest.approx(
        (4 * 0.7 + 0.5) * reduction
    )
    assert row(3, 2, overlap=1.0).exposed_ms == 0
    assert row(2, 2, accumulation=4, overlap=0.0).exposed_ms == pytest.approx(4.5 * reduction)
    assert whole.usd_per_step == pytest.approx(scaling.USD_PER_HOUR * 2 * whole.step_ms / 3.6e6)
    assert whole.images_per_second == pytest.approx(18 / whole.step_ms * 1e3)


def test_the_backward_pass_waits_for_a_bucket() -> None:
    """Region 1 ends after 5 s and fills 3 buckets of 2 s each: the second waits for the first, the third isn't full.

    Region 2 begins after 7 s and ends after 12 s. Its bucket and the last one end after 16 s, 6 s late, so 2 of the 8 s
    are hidden: the one bucket that was sent while region 2 computed.
    """
    regions = [scaling.Region(0.5, 3), scaling.Region(0.5, 1)]
    assert scaling.below_backward(regions, backward=10.0, bucket=1, reducing=8.0) == pytest.approx(2.0)
    # Of buckets that need longer than the rest of the backward pass, only that rest is hidden.
    assert scaling.below_backward(regions, backward=10.0, bucket=2, reducing=80.0) == pytest.approx(5.0)
    assert scaling.below_backward([scaling.Region(1.0, 4)], backward=10.0, bucket=1, reducing=8.0) == 0.0


def test_regions_of_a_network() -> None:
    """They are all of the network, and the first and the last of the backward pass have few parameters."""
    settings = roofline.load_config("imagenet64_uncond")
    regions = scaling.regions_of(settings, "bf16", 32, roofline.machine_for("H200"))
    assert sum(region.share for region in regions) == pytest.approx(1.0)
    assert sum(region.parameters for region in regions) == scaling.size_of(settings.model).parameters
    counts, shares = [r.parameters for r in regions], [r.share for r in regions]
    assert max(counts[0], counts[3]) < 0.3 * min(counts[1:3])
    assert min(shares[0], shares[3]) > max(shares[2], 0.15)


def test_memory_falls_with_the_stage() -> None:
    """Memory falls with the stage, but for weights that stage 3 gathers and keeps for the backward pass."""
    for size, stages in ((SIZE, range(3)), (replace(SIZE, reuse_distance=0), range(4))):
        needed = [scaling.memory(size, stage, 8, activations=1e7, bucket=1000).peak for stage in stages]
        assert needed == sorted(needed, reverse=True)
    both = [scaling.memory(replace(SIZE, reuse_distance=d), 3, 8, activations=1e7).peak for d in (0, scaling.REUSE)]
    assert both[1] - both[0] == pytest.approx(2 * (SIZE.parameters - SIZE.persistent))
    assert not row(0, 1, gpu_memory=1e6).fits
    parts = scaling.memory(SIZE, 0, 1, activations=5e6)
    assert parts.peak == pytest.approx(1e6 * (2 + 4 + 8 + 4 + 2) + 5e6)
    assert scaling.memory(SIZE, 0, 1).peak == pytest.approx(1e6 * (2 + 4 + 8 + 4 + 2 + 4))


def test_batches_are_shared_evenly() -> None:
    assert list(scaling.shares([1, 2, 3, 4, 32], 32, 12, None)) == [(1, 8, 4), (2, 8, 2), (4, 8, 1), (32, 1, 1)]
    assert list(scaling.shares([1, 3], 32, 12, 5)) == [(1, 12, 5), (3, 12, 5)]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "imagenet64_uncond", "--micro", "32", "--step_ms", "20", "--gpus", "1,8,16"]
    words += ["--usd_per_hour", "2", "--json", str(tmp_path / "out.json"), "--csv", str(tmp_path / "out.csv")]
    scaling.main(words)
    printed = capsys.readouterr().out
    assert "assumption" in printed
    assert "measured step of 20 ms" in printed
    made = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["gpus"], r["stage"]) for r in made] == [(n, stage) for n in (1, 8, 16) for stage in range(4)]
    assert made[0]["accumulation"] == 4
    assert {r["batch"] for r in made} == {128}
    lines = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [float(line["step_ms"]) for line in lines] == [r["step_ms"] for r in made]
    assert made[0]["usd_per_step"] == pytest.approx(2 / 3600 * made[0]["step_ms"] / 1e3)


def test_a_predicted_step_is_the_rooflines_target() -> None:
    settings = roofline.load_config("cifar10_uncond")
    ops, machine = roofline.operations_of(settings, "bf16"), roofline.machine_for("A100")
    target = roofline.predict(ops, 64, machine, convolution_efficiency=0.8, copy_efficiency=0.9)
    step = scaling.predicted_step(ops, machine, 64, 38)
    assert math.isclose(step.micro(64) + step.optimiser, target.ms / 1e3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "T4"], "--gpu T4"),
        (["--stages", "1,4"], "--stages"),
        (["--gpus", "0"], "--gpus"),
        (["--overlap", "50"], "--overlap"),
        (["--accumulation", "2", "--batch_size", "64"], "--batch_size"),
        (["--step_ms", "0.001"], "--step_ms"),
        (["--inter_gbs", "0"], "--inter_gbs"),
        (["--gpus", "3"], "--batch_size"),
    ],
)
def test_refusals(words: list[str], says: str) -> None:
    assert says in refusal(scaling.main, ["--config", "imagenet64_uncond", *words])
