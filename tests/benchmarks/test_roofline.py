"""The roofline model agrees with arithmetic by hand and with earlier predictions, and its command line works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import MODEL, refusal

from benchmarks import kernel_cost, roofline
from fastdiff.errors import UserError
from fastdiff.models import UNetSettings, cost
from fastdiff.training.diagnostics.profile import CLASS_OF

ROUND = roofline.Machine("round numbers", matmul_flops=1e12, copy_bytes=1e9, peak_flops=2e12)
# Images per second of one H200, predicted by hand at 65% and 80% of the matmul rate, and the batch.
BY_HAND = {
    "imagenet64_uncond": (1720, 2015, 128),
    "cifar10_uncond": (7180, 8210, 128),
    "imagenet64_270M": (824, 979, 128),
    "upsample_256": (124, 146, 16),
    "lsun_bedroom_lr1e-4": (260, 301, 32),
}


def test_one_operation_by_hand() -> None:
    """The forward pass is bound by products, the backward pass by bytes, and weights are read once per batch."""
    op = cost.Operation("x", "conv3x3", (8, 8, 4, 4), 9e9, 4e9, 1e6, 9e6, parameters=10_000)
    made = roofline.predict([op], 3, ROUND, launch_us=100, optimiser_bytes=38)
    forward, backward = 3 * 4e9 / 1e12, (3 * 9e6 + 40_000) / 1e9
    assert made.shares["convolutions"].ms == pytest.approx(1e3 * (forward + backward))
    assert made.shares["convolutions"].run_flops == pytest.approx(12e9)
    assert made.shares["optimiser"].ms == pytest.approx(1e3 * 38 * 10_000 / 1e9)
    assert made.shares["launch gaps"].ms == pytest.approx(0.1 * (1 + 2 + 1))
    assert made.ms == pytest.approx(sum(share.ms for share in made.shares.values()))
    assert made.images_per_second == pytest.approx(3e3 / made.ms)
    assert made.mfu(2e12) == pytest.approx(made.images_per_second * 27e9 / 2e12)


def test_every_kind_has_a_class() -> None:
    assert set(CLASS_OF) == set(cost.KINDS)
    assert {*CLASS_OF.values(), "optimiser", "launch gaps"} == set(roofline.FLOOR_CLASSES)


def test_efficiencies_slow_what_they_name() -> None:
    ops = cost.operations(UNetSettings(**MODEL))
    floor = roofline.predict(ops, 4, ROUND)
    slow_copies = roofline.predict(ops, 4, ROUND, copy_efficiency=0.5)
    assert slow_copies.shares["norms"].ms == pytest.approx(2 * floor.shares["norms"].ms)
    fast_memory = replace(ROUND, copy_bytes=1e15)
    for name, ratio in (("convolutions", 2), ("norms", 1)):
        full, half = (roofline.predict(ops, 4, fast_memory, convolution_efficiency=e).shares[name].ms for e in (1, 0.5))
        assert half == pytest.approx(ratio * full, rel=1e-3)


@pytest.mark.parametrize("name", BY_HAND)
def test_predictions_by_hand(name: str) -> None:
    """The predictions assumed the full cost of upsampling convolutions, and norms that read their maps twice."""
    low, high, batch = BY_HAND[name]
    settings = roofline.load_config(name)
    ops = [replace(op, run_flops=op.flops) for op in cost.operations(settings.model)]
    ops = [
        replace(op, forward_bytes=op.forward_bytes / 2 * 3, backward_bytes=op.backward_bytes / 3 * 5)
        if op.kind == "group norm"
        else op
        for op in ops
    ]
    for efficiency, images in ((0.65, low), (0.8, high)):
        made = roofline.predict(
            ops, batch, roofline.machine_for("H200"), convolution_efficiency=efficiency, copy_efficiency=0.9
        )
        assert made.images_per_second == pytest.approx(images, rel=0.03)


def _row(kernel: str, count: int, dram_bytes: float, busy_us: float) -> kernel_cost.Row:
    cost = kernel_cost.Cost(10.0, 64, 32, 1e4, dram_bytes, dram_bytes, busy_us, "issue")
    return kernel_cost.Row(kernel, "4x8x4x4", count, cost)


def test_our_kernels_by_hand() -> None:
    """Times of our kernels replace their classes', those of a batch grow with it, and all launches have a gap."""
    norm = cost.Operation("n", "group norm", (8, 4, 4), forward_bytes=3e6, backward_bytes=5e6)
    heads = [cost.Operation(f"a{i}", "attention", (1, 16, 8), forward_bytes=1e6) for i in range(2)]
    general = roofline.predict([norm, *heads], 8, ROUND, launch_us=100, optimiser_bytes=0)
    rows = [_row("norm_forward_group_norm", 2, 1e6, 500), _row("forward_short", 1, 1e6, 9000), _row("sum", 1, 0, 3)]
    kernels = roofline.Kernels(rows, batch=4, batch_asked=8)
    made = roofline.with_kernels(general, [norm, *heads], kernels, ROUND, launch_us=100)
    ramp = 1e3 * kernel_cost.RAMP
    assert made.shares["norms"].ms == pytest.approx(2 * (ramp + 2 * 1.0))
    assert made.shares["norms"].bytes == pytest.approx(2 * 2e6 / 8)
    assert made.shares["attention"].ms == pytest.approx(ramp + 2 * 9.0 + general.shares["attention"].ms / 2)
    assert made.shares["optimiser"].ms == pytest.approx(ramp + 0.003)
    # Launches of the norm 2, of our attention 1, of the other block 3, of the optimiser 1.
    assert made.shares["launch gaps"].ms == pytest.approx(0.1 * (2 + 1 + 3 + 1))


def test_steps_of_the_nearest_batch() -> None:
    steps = {f"demo {batch} bf16": [_row("sum", batch, 0, 1)] for batch in (16, 128)}
    found = roofline.kernels_of(steps, "demo", 40, "bf16")
    assert found is not None
    assert (found.batch, found.batch_asked, found.rows[0].count) == (16, 40, 16)
    assert roofline.kernels_of(steps, "demo", 40, "fp16") is None


def test_the_file_of_costs() -> None:
    """Every kernel in it has a class that the roofline knows; its steps are those of the configurations."""
    steps = kernel_cost.read(roofline.KERNEL_COSTS)
    assert {"imagenet64_270M 128 bf16", "cifar10_uncond 256 bf16"} <= set(steps)
    for step, rows in steps.items():
        kernels = roofline.kernels_of(steps, *(int(word) if word.isdigit() else word for word in step.split()))
        assert kernels is not None
        assert kernels.rows == rows
        assert set(kernels.classes()) <= set(roofline.FLOOR_CLASSES)


def test_what_the_target_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--gpu", "H100", "--batch", "256"], "as predicted from the machine code of our kernels\n"),
        (["--gpu", "H200", "--batch", "200"], "of our kernels, scaled from batch 256"),
        (["--gpu", "A100"], "target: our kernels move their bytes at 90% of the copy rate"),
    ):
        roofline.main(["--config", "cifar10_uncond", *words])
        assert says in capsys.readouterr().out


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, out = tmp_path / "profile.json", tmp_path / "out.json"
    classes = {"convolutions": 40.0, "norms": 20.0, "input wait": 3.0, "launch gaps": 0.0}
    profile.write_text(json.dumps({"steps": 5, "batch": 64, "classes": classes, "step_ms": 63.0}))
    words = ["--config", "imagenet64_uncond", "--gpu", "H100", "--profile", str(profile), "--json", str(out)]
    roofline.main(words)
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["floor"]["batch"] == figures["target"]["batch"] == 64
    assert figures["floor"]["ms"] < figures["target"]["ms"]
    assert figures["machine"]["name"] == "H100 SXM"
    assert figures["target"]["mfu"] == pytest.approx(
        figures["target"]["images_per_second"] * 3 * figures["forward_flops"] / 989e12
    )
    norms = next(line for line in printed.splitlines() if line.startswith("norms"))
    assert norms.split()[-2:] == ["20.000", f"{20 / figures['target']['classes']['norms']['ms']:.2f}"]
    waiting = next(line for line in printed.splitlines() if line.startswith("input wait"))
    assert waiting.split() == ["input", "wait", "-", "-", "-", "-", "3.000", "-"]
    assert f"{64 / 0.063:.1f} images/s" in printed


def test_here_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that is in no table is measured, and has no share of a peak."""
    roofline.main(["--config", "demo", "--gpu", "here", "--precision", "fp32", "--batch", "2"])
    printed = capsys.readouterr().out
    assert "images/s" in printed
    machine = roofline.machine_for("here", "fp32", matmul_tflops=3, copy_tbs=0.5)
    assert (machine.matmul_flops, machine.copy_bytes) == (3e12, 5e11)


def test_batch_by_default_is_the_micro_batch() -> None:
    settings = roofline.load_config("demo")
    for batch_size, microbatch, usual in ((64, 16, 16), (64, -1, 64), (8, 16, 8)):
        train = settings.train.model_copy(update={"batch_size": batch_size, "microbatch": microbatch})
        assert roofline.usual_batch(settings.model_copy(update={"train": train})) == usual


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "imagenet64_uncon"], "did you mean imagenet64_uncond"),
        (["--config", "demo", "--gpu", "H300"], "--gpu H300"),
        (["--config", "demo", "--gpu", "H200", "--precision", "fp32"], "--matmul_tflops"),
        (["--config", "demo", "--batch", "0"], "--batch"),
        (["--config", "demo", "--conv_efficiency", "80"], "--conv_efficiency"),
        (["--config", "demo", "--launch_us", "-1"], "--launch_us"),
        (["--config", "demo", "--profile", "nowhere.json"], "--profile nowhere.json"),
        (["--config", "demo", "--kernel_costs", "nowhere.json"], "nowhere.json: can't be read"),
    ],
)
def test_refusals(words: list[str], says: str) -> None:
    assert says in refusal(roofline.main, words)


def test_profiles_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in ("{", "[]", '{"batch": 2}', '{"batch": 2, "classes": {"norms": "x"}, "step_ms": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match="is not what --profile"):
            roofline.read_profile(path)
    path.write_text('{"batch": 2, "classes": {}, "step_ms": 1}')
    assert "contradicts" in refusal(roofline.main, ["--config", "demo", "--batch", 4, "--profile", path])
