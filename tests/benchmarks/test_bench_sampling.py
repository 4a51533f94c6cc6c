"""The benchmark of drawing runs at small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.tiny import refusal

from benchmarks import bench_sampling, bench_train, report, sampling_variants
from fastdiff.config.sections import Config, SuperResConfig
from fastdiff.diffusion.samplers import ddim_sample_loop, p_sample_loop
from fastdiff.runtime.processes import Processes

MODEL = {**tiny.MODEL, "learn_sigma": True}
DIFFUSION = {"diffusion_steps": 20, "noise_schedule": "cosine"}


def case_of(processes: Processes, solver: str = "ddpm", steps: int = 4, **changes: Any) -> sampling_variants.DrawCase:
    model = {**MODEL, **changes}
    config = Config.model_validate({"model": model, "diffusion": DIFFUSION})
    return sampling_variants.DrawCase(config, 2, "fp32", processes, solver, steps)


# --- throughput ---


def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variant has a row from which table and chart are made, and --resume measures nothing again."""
    config, results = tmp_path / "small.json", tmp_path / "results.json"
    config.write_text(json.dumps({"model": MODEL, "diffusion": DIFFUSION}))
    argv = ["--configs", str(config), "--batches", "2", "--solvers", "heun", "--steps", "3", "--rounds", "2"]
    argv += ["--variants", "reference,ours eager", "--seconds", "0.001", "--threads", "1", "--json", str(results)]
    bench_sampling.main(argv)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ratios: small fp32 batch 2 heun ")
    assert last.endswith(" x reference")
    content = json.loads(results.read_text())
    assert [row["variant"] for row in content["rows"]] == ["reference", "ours eager"]
    for row in content["rows"]:
        assert row["evaluations"] == 5  # two a step, and one for the last
        assert row["images_per_second"][1] * 5 == pytest.approx(row["evaluations_per_second"][1])
        assert row["ms"][1] == pytest.approx(2e3 / row["evaluations_per_second"][1])
    bench_sampling.main([*argv, "--resume"])
    assert json.loads(results.read_text())["rows"] == content["rows"]
    content["splits"] = [
        {
            **{"config": "small", "precision": "fp32", "batch": 2, "solver": "heun"},
            "split": {"all": 0.01, "network": 0.009, "step": 0.0008, "to_host": 0.0002, "gaps": None},
            "job": {"images": 16, "wall_seconds": 2.0, "drawing_seconds": 1.9, "overhead": 0.05},
        }
    ]
    results.write_text(json.dumps(content))
    table, drawn = tmp_path / "table.md", tmp_path / "chart.svg"
    report.main([str(results), "--markdown", str(table), "--chart", str(drawn)])
    text = table.read_text()
    assert "# Sampling throughput" in text
    assert "## small, batch 2, fp32, heun 3" in text
    assert "| variant | ms per evaluation | evaluations/s | images/s | × reference |" in text
    assert "| small, batch 2, fp32, heun | 10.0 | 90.0% | 8.0% | 2.0% | – | 16 images | 5.00% |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|") and "heun" not in line}
    assert len(widths) == 2, "one of the rows, one of the split"
    assert "evaluations of the network per second" in drawn.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--configs", "nothing"], "--configs: nothing is neither a file nor one of quick, 128_512_upsampler"),
        (["--variants", "theirs"], "--variants: 'theirs' is not one of reference"),
        (["--levers", "luck"], "--levers: 'luck' is not one of weights frozen once"),
        (["--solvers", "euler"], "--solvers: 'euler' is not one of ddpm"),
        (["--batches", "many"], "--batches: many must be whole numbers"),
        (["--batches", "0"], "--batches: 0 is no number of images"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    assert message in refusal(bench_sampling.main, argv)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False}])
def test_the_reference_draws_what_we_draw(
    solver: str, on_device: bool, changes: dict[str, Any], processes: Processes
) -> None:
    """Both draw the same from the same noise in all steps."""
    case = case_of(processes, solver, 5, **changes)
    diffusion, network = case.diffusion(), sampling_variants.our_network(case, frozen=False)
    generator = torch.Generator().manual_seed(1)
    x, *noises = torch.randn(6, 2, 3, 8, 8, generator=generator)
    ours = p_sample_loop if solver == "ddpm" else ddim_sample_loop
    for step in ours(diffusion, network, x, lambda t: noises[t]):
        wanted = step.sample
    left = iter(reversed(noises))
    loop = sampling_variants.SeedLoop(network, diffusion, solver == "ddim", on_device)
    torch.testing.assert_close(loop(x, {}, lambda x: next(left)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lever", ["weights frozen once", "embeddings precomputed"])
@pytest.mark.parametrize("class_cond", [False, True])
def test_levers_change_no_image(lever: str, class_cond: bool, processes: Processes) -> None:
    case = case_of(processes, class_cond=class_cond, num_classes=3)
    with_it = sampling_variants.ours(case, compiled=False, cuda_graph=False)()
    without = sampling_variants.ours(case, compiled=False, cuda_graph=False, **sampling_variants.LEVERS[lever])()
    assert with_it.shape == (2, 8, 8, 3)
    assert (with_it.int() - without.int()).abs().max() <= 1


def test_every_variant_draws_images_of_the_config(processes: Processes) -> None:
    config = SuperResConfig.model_validate(
        {
            "model": {
                **{name: value for name, value in MODEL.items() if name != "image_size"},
                "large_size": 16,
                "small_size": 4,
                "class_cond": True,
                "num_classes": 3,
            },
            "diffusion": DIFFUSION,
        }
    )
    case = sampling_variants.DrawCase(config, 2, "fp32", processes, "dpmpp_2m", 3)
    for drawn in (sampling_variants.seed(case)(), bench_sampling.VARIANTS["ours eager"](case)()):
        assert drawn.shape == (2, 16, 16, 3)
        assert drawn.dtype == torch.uint8


def test_split_and_job(processes: Processes) -> None:
    case = case_of(processes)
    parts = bench_sampling.split(case, False, 0.01)
    assert parts["gaps"] is None
    known = [value for value in parts.values() if value is not None]
    assert len(known) == 4
    assert all(0 <= value <= known[0] for value in known)
    job = bench_sampling.job_overhead(case, False, 3)
    assert job["images"] == 6
    assert 0 < job["drawing_seconds"] < job["wall_seconds"]
    assert job["overhead"] == pytest.approx(1 - job["drawing_seconds"] / job["wall_seconds"])
    lines = bench_sampling.split_lines({"split": parts, "job": job})
    assert "launch gaps do not apply to a CPU" in lines[0]


def test_quick_compiles_for_one_batch_only() -> None:
    args = bench_sampling.parse(["--quick"])
    compiled = {"reference+compile", "diffusers", "ours"}
    assert compiled & set(bench_sampling.variants_of(args, 8, torch.device("cpu"))[0])
    assert not compiled & set(bench_sampling.variants_of(args, 1, torch.device("cpu"))[0])
    assert bench_train.load(args.configs).model.num_channels == 64
