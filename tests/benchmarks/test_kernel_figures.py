"""Figures of single kernels: calls of a step are recorded, every way can be forced, and every section has rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import refusal

from benchmarks import bench_train, figure_rows, kernel_figures, norm_figures, step_calls
from fastdiff.models import cost
from fastdiff.runtime.machine import Rates

CPU = torch.device("cpu")
BATCH = 2


@pytest.fixture(scope="module")
def case() -> tuple[str, Any, int]:
    return kernel_figures.cases_of(kernel_figures.parse(["--tiny"]))[0]


def bench(rows: list[dict[str, Any]], **settings: Any) -> figure_rows.Bench:
    return figure_rows.Bench(CPU, Rates(1e12, 1e9), rows.append, rounds=1, **settings)


# --- calls of a step ---


@pytest.mark.parametrize("name", ["tiny", "cifar10_uncond", "upsample_256"])
def test_a_step_calls_what_the_network_has(name: str, case: tuple[str, Any, int]) -> None:
    """The numbers of norms and the FLOPs of convolutions and products are those of `cost.operations`."""
    config = case[1] if name == "tiny" else bench_train.load(name)
    calls = step_calls.training_calls(config, BATCH, torch.bfloat16, r"aten::(convolution|mm$|addmm$)|fastdiff::")
    by_op: Counter[str] = Counter()
    for call in calls:
        by_op[call.op] += call.count
    known = cost.operations(config.model)
    norms = sum(op.kind == "group norm" for op in known) - 1  # the last one is the output layer's
    assert by_op["fastdiff::output_layer"] == by_op["fastdiff::output_layer_backward"] == 1
    assert by_op["fastdiff::group_norm_silu"] + by_op["fastdiff::add_group_norm_silu"] == norms
    assert by_op["fastdiff::group_norm_silu_backward"] == norms
    assert by_op["fastdiff::attention"] == sum(op.kind == "attention" for op in known)
    flops: Counter[str] = Counter()
    for call in calls:
        if call.op.startswith("aten"):
            for direction, part in kernel_figures._parts(call, torch.bfloat16):
                flops[direction] += part.count * kernel_figures.flops_of(part)
    spatial = ("conv3x3", "downsample conv", "upsample conv")
    assert flops["dgrad"] == BATCH * sum(op.run_flops for op in known if op.kind in spatial)
    first = next(op for op in known if op.kind == "input conv")  # images are padded, without gradient
    assert flops["forward"] == flops["wgrad"]
    padded = first.flops if "small_size" in config.model.model_dump() else first.flops / first.shape[0] * 8
    assert flops["forward"] - flops["dgrad"] == BATCH * padded
    assert flops["product"] == 3 * BATCH * sum(op.flops for op in known if op.kind == "conv1x1")


def test_arguments_with_memory() -> None:
    """Arguments have the recorded shapes and strides, maps are channels-last, and equal seeds give equal numbers."""
    meta = lambda *shape, **settings: torch.empty(*shape, device="meta", **settings)
    args = (meta(2, 8, 4, 4), None, meta(8).expand(2, 8), meta(3, 5).t(), meta(1, dtype=torch.int64), [meta(3)], 0.5)
    x, none, offset, weight, seed, others, number = step_calls.realised(step_calls.Call("aten::any", args), 3, CPU)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (none, number) == (None, 0.5)
    assert offset.stride() == (0, 1)
    assert weight.shape == (5, 3)
    assert weight.stride() == (1, 5)
    assert seed.dtype == torch.int64
    assert others[0].shape == (3,)
    assert torch.equal(x, step_calls.realised(step_calls.Call("aten::any", args), 3, CPU)[0])
    assert not torch.equal(x, step_calls.realised(step_calls.Call("aten::any", args), 4, CPU)[0])


# --- norms ---


def norm_call(op: str, side: int) -> step_calls.Call:
    """Make a call on one image of 32 + 32 channels that is twice as high as wide."""
    meta = lambda *shape: torch.empty(*shape, device="meta")
    (x, skip, dy), C = (meta(1, channels, side, side // 2) for channels in (32, 32, 64)), meta(64)
    after = (skip, C, C, None, None, None, None, 32, 1e-5, True, 0.0)
    if op == "group_norm_silu":
        return step_calls.Call(f"fastdiff::{op}", (x, *after), 1)
    if op == "add_group_norm_silu":  # as behind a convolution, whose bias it adds
        return step_calls.Call(f"fastdiff::{op}", (x, None, meta(32), *after), 1)
    args = (dy, None, None, None, x, None, skip, C, C, None, None, None, None, meta(1, 3, 64), 32, True, 0.0)
    return step_calls.Call(f"fastdiff::{op}", args, 1)


@pytest.mark.parametrize("op", ["group_norm_silu", "group_norm_silu_backward"])
def test_every_way_computes_the_same(op: str) -> None:
    """Results agree on maps of several blocks, the planned way is timed first, and no way stays forced."""
    from fastdiff.kernels import group_norm_silu as norm

    before, rows = norm.plan, list[dict[str, Any]]()
    call = norm_call(op, side=24)
    label = {"direction": norm_figures.Norm(call).direction}
    sums = figure_rows.Sums([(label["direction"], call)])
    norm_figures._rows_of_ways(bench(rows), label, call, 1000, sums)
    planned = [] if label["direction"] == "forward" else ["32 rows"]
    assert [row["way"] for row in rows] == [*planned, "whole", "128 rows", "256 rows"], "the map has 288 pixels"
    assert [row["planned"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows[0]["difference"] == 0
    assert 0 < max(row["difference"] for row in rows) < 1e-5, "another order of sums, the same function"
    assert norm.plan is before
    least = min(row["microseconds"] for row in rows)
    assert sums.ms[label["direction"], "the fastest way"] == pytest.approx(least / 1e3, abs=1e-5)
    assert sums.ms[label["direction"], "planned"] == pytest.approx(rows[0]["microseconds"] / 1e3, abs=1e-5)


def test_ways_that_are_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts longer than the map have no row, and any other error has a row that names it."""
    from fastdiff.kernels import group_norm_silu as norm

    rows: list[dict[str, Any]] = []
    launcher = norm.launcher

    def without_parts(kernel: Any, *args: Any, **settings: Any) -> Any:
        if not settings["WHOLE"]:
            raise RuntimeError("out of resources")
        return launcher(kernel, *args, **settings)

    monkeypatch.setattr(norm, "launcher", without_parts)
    call = norm_call("group_norm_silu", side=20)
    norm_figures._rows_of_ways(bench(rows), {"direction": "forward"}, call, 1000, figure_rows.Sums([]))
    assert [(row["way"], row.get("left_out")) for row in rows] == [
        ("whole", None),
        ("128 rows", "RuntimeError: out of resources"),
    ]


def test_differences() -> None:
    one, other = (torch.tensor([1.0, -4.0]), torch.zeros(0)), (torch.tensor([1.5, -4.0]), torch.zeros(0))
    assert norm_figures.difference(other, one) == 0.125
    assert math.isnan(norm_figures.difference((torch.tensor([float("nan"), 1.0]), one[1]), one))


def test_definitions_are_the_ops() -> None:
    """The definitions compute what the ops compute, forward and backward."""
    for op in ("group_norm_silu", "add_group_norm_silu", "group_norm_silu_backward"):
        call = norm_call(op, side=4)
        run, given = norm_figures._definition(bench([]), norm_figures.Norm(call))(0)
        wanted = call.function()(*step_calls.realised(call, 0, CPU))
        if op == "group_norm_silu":
            torch.testing.assert_close(run(*given), wanted[0], atol=1e-5, rtol=1e-5)
        elif op == "add_group_norm_silu":
            torch.testing.assert_close(run(*given), tuple(wanted[:2]), atol=1e-5, rtol=1e-5)
        else:  # the op gets random statistics, and the definition computes its own
            assert run(*given)[0].shape == wanted[0].shape


# --- the sections and the command ---


def test_rows_of_all_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    kernel_figures.main(["--tiny", "--most", "1", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    by_section = Counter(row["section"] for row in rows)
    assert set(by_section) == {"machine", *kernel_figures.SECTIONS}
    timed = [row for row in rows if "microseconds" in row]
    for row in timed:
        assert row["quartiles"][0] <= row["microseconds"] <= row["quartiles"][1]
        assert row["launched"] == "plain"
        assert row["count"]
        assert row["dtype"] == "float32"
        assert "GB/s" in row or "TFLOP/s" in row
    ways = {(row["section"], row["way"]) for row in timed if "way" in row}
    assert ways >= {("norms", "copy"), ("norms", "eager"), ("attention", "ours"), ("attention", "flash")}
    directions = {row["direction"] for row in timed if row["section"] == "convolutions"}
    assert directions == {"forward", "dgrad", "wgrad", "product"}
    refused = [row for row in rows if row.get("way") == "cudnn"]
    assert all("RuntimeError" in row["left_out"] for row in refused), "a CPU has no cuDNN"
    assert refused
    sums = {(row["section"], row["direction"], row["way"]) for row in rows if row.get("what") == "sum"}
    assert sums >= {("norms", "backward", "planned"), ("convolutions", "wgrad", "cuDNN")}
    assert all(row["ms_per_step"] > 0 and row["calls"] <= row["of"] for row in rows if row.get("what") == "sum")


def test_out_of_time(case: tuple[str, Any, int]) -> None:
    """When time is up, one row reports it."""
    rows: list[dict[str, Any]] = []
    kernel_figures.measure(["convolutions"], [case], CPU, rows.append, seconds=1e-9, tiny=True, rounds=1)
    assert [row["section"] for row in rows] == ["machine", "convolutions"]
    assert "left_out" in rows[1]


def test_the_costliest_come_first(case: tuple[str, Any, int]) -> None:
    """Calls are ordered by cost times count, with at most `most` per direction."""
    calls = [
        (direction, step_calls.Call("aten::mm", (torch.empty(n, 1), torch.empty(1, 1)), count))
        for direction, n, count in (("a", 1, 1), ("a", 2, 5), ("b", 3, 1), ("a", 20, 1))
    ]
    found = bench([], most=2).costliest(calls, kernel_figures.flops_of)
    assert [(direction, len(call.args[0]), rank) for direction, call, rank in found] == [
        ("a", 20, 0),
        ("a", 2, 1),
        ("b", 3, 0),
    ]


def test_all_configurations_have_attention() -> None:
    cases = kernel_figures.cases_of(kernel_figures.parse([]))
    assert [(name, batch) for name, _, batch in cases] == [("imagenet64_270M", 128), ("cifar10_uncond", 256)]
    batches = {name: batch for name, _, batch in kernel_figures.with_all_configs(cases)}
    assert set(batches) == set(bench_train.config_names())
    assert (batches["cifar10_uncond"], batches["upsample_256"]) == (256, 16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sections", "norm"], "--sections: 'norm' is not one of norms, convolutions, attention"),
        (["--batches", "128"], "--batches: give a number of images for each of imagenet64_270M, cifar10_uncond"),
        (["--batches", "128,many"], "--batches: 128,many must be whole numbers such as 128,256"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    assert message in refusal(kernel_figures.main, argv)
