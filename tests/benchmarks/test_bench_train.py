"""The benchmark of whole training steps runs at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.tiny import refusal

from benchmarks import bench_train, report, train_variants
from fastdiff.config.load import Config, SuperResConfig
from fastdiff.training.deepspeed_engine import start_processes

MODEL = {**tiny.MODEL, "learn_sigma": True}
DIFFUSION = {"diffusion_steps": 20, "noise_schedule": "cosine"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"model": MODEL, "diffusion": DIFFUSION}))
    return path


def test_results(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variant has a row from which the report is made, and --resume measures nothing again."""
    results = tmp_path / "results.json"
    argv = ["--configs", str(config), "--batches", "2", "--precisions", "fp32", "--variants", "reference,ours eager"]
    argv += ["--rounds", "2", "--seconds", "0.01", "--threads", "1", "--json", str(results)]
    bench_train.main(argv)
    shown = capsys.readouterr().out
    last = shown.splitlines()[-1]
    assert last.startswith("ratios: small fp32 ")
    assert last.endswith(" x reference")
    content = json.loads(results.read_text())
    assert {row["variant"] for row in content["rows"]} == {"reference", "ours eager"}
    for row in content["rows"]:
        assert row["ms"][0] <= row["ms"][1] <= row["ms"][2]
        assert row["images_per_second"][1] == pytest.approx(2e3 / row["ms"][1])
        assert row["peak_memory_gb"] > 0
        assert row["start_seconds"] > 0
        assert row["ratio_to"] == "reference"
    reference = content["rows"][0]
    assert reference["ratio"] == [1.0, 1.0, 1.0]
    bench_train.main([*argv, "--resume"])
    assert json.loads(results.read_text())["rows"] == content["rows"]
    report.main([str(results), "--markdown", str(tmp_path / "table.md")])
    assert "ours eager" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--configs", "nothing"], "--configs: nothing is neither a file nor one of quick, baseline"),
        (["--variants", "theirs"], "--variants: 'theirs' is not one of reference"),
        (["--levers", "luck"], "--levers: 'luck' is not one of compile"),
        (["--precisions", "fp8"], "--precisions: 'fp8' is not one of fp32"),
        (["--configs", "quick,quick", "--batches", "1,2,3"], "--batches: give one number or one per configuration"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    assert message in refusal(bench_train.main, argv)


def test_a_checkout_must_be_one(tmp_path: Path) -> None:
    case = train_variants.Case(Config.model_validate({"model": MODEL}), 1, "fp32", start_processes())
    with pytest.raises(train_variants.UserError, match="is no checkout of improved-diffusion"):
        train_variants.seed(case, tmp_path)


NETWORKS: dict[str, tuple[type[Config], dict[str, Any]]] = {
    "unconditional": (Config, {}),
    "classes, added embedding": (Config, {"class_cond": True, "num_classes": 5, "use_scale_shift_norm": False}),
    "super-resolution": (SuperResConfig, {"large_size": 16, "small_size": 4, "class_cond": True, "num_classes": 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_is_the_same_network(name: str) -> None:
    """`seed` compares the outputs of both networks, and its whole step runs."""
    kind, changes = NETWORKS[name]
    model = {key: value for key, value in MODEL.items() if not ("large_size" in changes and key == "image_size")}
    config = kind.model_validate({"model": {**model, **changes}, "diffusion": DIFFUSION})
    step = train_variants.seed(train_variants.Case(config, 2, "fp32", start_processes()))
    step()
    step()


@pytest.mark.parametrize("lever", ["one embedding product", "transposed upsampling", "virtual concat of skips"])
def test_levers_come_back(lever: str) -> None:
    """A step without a lever runs, and afterwards the lever is on again."""
    owner, name, _ = train_variants.LEVERS[lever].patches[0]
    before = getattr(owner, name)
    case = train_variants.Case(
        Config.model_validate({"model": MODEL, "diffusion": DIFFUSION}), 2, "fp32", start_processes()
    )
    seen = []
    off = train_variants.LEVERS[lever].off
    with off():
        seen.append(getattr(owner, name))
        train_variants.ours(case, compile=False)()
    assert seen[0] is not before
    assert getattr(owner, name) is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_variant_gpu() -> None:
    config = Config.model_validate({"model": MODEL, "diffusion": DIFFUSION})
    for precision in ("bf16", "fp16"):
        case = train_variants.Case(config, 4, precision, start_processes())
        for name in ("reference", "ours eager", "ours", "ours +cuda_graph", "reference+compile"):
            step = bench_train.VARIANTS[name](case)
            for _ in range(6):
                step()
