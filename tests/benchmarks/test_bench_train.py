"""The benchmark of whole training steps runs at a small size."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import tiny
from helpers.tiny import pictures, refusal

from benchmarks import bench_sampling, bench_train, contest, long_runs, report, report_rows, train_variants
from benchmarks.result_file import ResultFile
from fastdiff.config.sections import Config, SuperResConfig
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
        assert row["computes"] == "fp32"
        assert row["host_ms"] is None, "a CPU computes the step itself"
    shares = {row["variant"]: row["executed_share"] for row in content["rows"]}
    assert shares["reference"] == 1
    assert 4 / 9 < shares["ours eager"] < 1, "upsampling takes 4/9 of its operations"
    reference = content["rows"][0]
    assert reference["ratio"] == [1.0, 1.0, 1.0]
    bench_train.main([*argv, "--resume"])
    assert json.loads(results.read_text())["rows"] == content["rows"]
    report.main([str(results), "--markdown", str(tmp_path / "table.md")])
    assert "ours eager" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--configs", "nothing"], "--configs: nothing is neither a file nor one of quick, 128_512_upsampler"),
        (["--variants", "theirs"], "--variants: 'theirs' is not one of reference"),
        (["--levers", "luck"], "--levers: 'luck' is not one of compile"),
        (["--precisions", "fp8"], "--precisions: 'fp8' is not one of fp32"),
        (["--batches", "8,x"], "--batches: 8,x must be whole numbers such as 256,16,1"),
        (["--batches", "0"], "--batches: 0 is no number of images; give 1 or more"),
        (["--configs", "quick,quick", "--batches", "1,2,3"], "--batches: give one number or one per configuration"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    assert message in refusal(bench_train.main, argv)


def short(config: Path, *more: str) -> list[str]:
    words = ["--configs", str(config), "--batches", "2", "--precisions", "fp32", "--rounds", "2", "--seconds", "0.01"]
    return [*words, "--threads", "1", *more]


def test_a_process_for_each_variant(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row says that it was timed apart, ratios are those of the medians, and a failing process costs itself."""
    results = tmp_path / "results.json"
    more = ["--variants", "reference,ours eager", "--levers", "one embedding product", "--separate", "always"]
    bench_train.main(short(config, *more, "--json", str(results)))
    rows = {row["variant"]: row for row in json.loads(results.read_text())["rows"]}
    assert list(rows) == ["reference", "ours eager", "ours -one embedding product"]
    low, middle, high = rows["ours eager"]["ratio"]
    assert middle == pytest.approx(rows["reference"]["ms"][1] / rows["ours eager"]["ms"][1])
    assert low <= middle <= high
    assert rows["ours eager"]["apart"]
    assert rows["ours -one embedding product"]["ratio_to"] == "ours"
    assert capsys.readouterr().out.count("in a process of its own") == 3


def test_a_failing_process_costs_itself(tmp_path: Path) -> None:
    results = ResultFile(None, {"matmul_tflops": 1.0}, resume=False)
    label = {"config": "small", "precision": "fp32", "batch": 2}
    contest.time_apart(label, ["reference"], [], ["-c", "raise SystemExit('no such thing')"], str, results)
    assert results.rows == []
    assert results.failed == ["reference"]
    assert "exit code 1" in results.content["left_out"][0]["reason"]


def test_processes_are_separate_where_memory_is_short(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = train_variants.Case(bench_train.load(str(config)), 2, "fp32", start_processes())
    both = ["reference", "ours eager"]
    assert not bench_train.is_apart("auto", both, case)
    assert bench_train.is_apart("always", both, case)
    monkeypatch.setattr(bench_train, "free_memory", lambda _: 1 << 20)
    assert bench_train.is_apart("auto", both, case)
    assert not bench_train.is_apart("auto", both[:1], case), "one variant is alone already"
    assert not bench_train.is_apart("never", both, case)


def test_rates_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1/16 s become steps of 1/8 s after four seconds, which the first and the last third show."""
    clock = [0.0]

    def step() -> None:
        clock[0] += 1 / 16 if clock[0] < 4 else 1 / 8

    monkeypatch.setattr(long_runs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(long_runs, "seconds_of", lambda step: 1 / 16)
    monkeypatch.setattr(long_runs, "build", lambda make, device: SimpleNamespace(step=make))
    case: Any = SimpleNamespace(device=torch.device("cpu"), batch=4)
    assert long_runs.sustained(step, case, 9.0) == {
        "seconds": 9.5,
        "window_seconds": 3.0,
        "images_per_second": 4 * 108 / 9.5,
        "first": 4 * 16,
        "last": 4 * 8,
        "clocks": [None, None],
    }


def test_long_runs(config: Path, tmp_path: Path) -> None:
    """A sustained rate and one with the loader have their own lists, and the report has their tables."""
    results = tmp_path / "results.json"
    pictures(tmp_path / "data", "abcd")
    more = ["--variants", "ours eager", "--sustained", "0.6", "--images", str(tmp_path / "data")]
    bench_train.main(short(config, *more, "--json", str(results)))
    content = json.loads(results.read_text())
    (row,) = content["sustained"]
    assert row["variant"] == "ours eager, sustained"
    assert row["seconds"] >= 0.6
    assert row["window_seconds"] == pytest.approx(0.2)
    assert min(row["first"], row["last"], row["images_per_second"]) > 0
    assert row["clocks"] == [None, None]
    (row,) = content["loader"]
    assert row["images_per_second"] > 0
    assert 0 <= row["waiting"] < 1
    text = report.markdown(report_rows.read(results))
    assert "## Rates in one go" in text
    assert f"| {row['loader']} |" in text


def test_images_that_are_none(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    bench_train.main(short(config, "--variants", "ours eager", "--images", str(tmp_path / "empty")))
    assert "ours, from JPEG files left out: --images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed_checkout", "nowhere"], "nowhere is no checkout of improved-diffusion: it has no script_util.py"),
        (["--images", "nowhere"], "argument --images: there is no folder nowhere"),
        (["--sustained", "-1"], "argument --sustained: must be a number of at least 0, but is -1"),
        (["--separate", "perhaps"], "argument --separate: invalid choice: 'perhaps'"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is timed before they are found."""
    with pytest.raises(SystemExit) as stopped:
        bench_train.main(["--quick", *flags])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


STAND_IN = {
    "__init__.py": "",
    "unet.py": """
        from benchmarks.seed_step import SeedUNet
        from fastdiff.config.sections import Config

        class UNetModel(SeedUNet):
            def __init__(self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                         dropout, channel_mult, num_classes, num_heads, num_heads_upsample, use_scale_shift_norm):
                assert all(isinstance(mult, int) for mult in channel_mult)
                size = 8
                given = dict(image_size=size, num_channels=model_channels, num_res_blocks=num_res_blocks,
                             attention_resolutions=",".join(str(size // factor) for factor in attention_resolutions),
                             channel_mult=",".join(map(str, channel_mult)), num_heads=num_heads,
                             learn_sigma=out_channels == 6, use_scale_shift_norm=use_scale_shift_norm)
                super().__init__(Config.model_validate({"model": given}).model)
    """,
    "script_util.py": """
        class Process:
            def __init__(self, given):
                self.given = given

            def training_losses(self, model, x_start, t, model_kwargs):
                return {"loss": model(x_start, t.float(), **model_kwargs).square().mean(dim=(1, 2, 3))}

        def create_gaussian_diffusion(**given):
            return Process(given)
    """,
}
"""Files with the original's names and arguments, whose network is ours of the benchmark."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "theirs" / "improved_diffusion"
    folder.mkdir(parents=True)
    for name, text in STAND_IN.items():
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder.parent
    for name in [name for name in sys.modules if name.startswith("improved_diffusion")]:
        del sys.modules[name]


def test_a_checkout_of_any_network(checkout: Path, tmp_path: Path) -> None:
    """The original's classes are given the settings, also those that its functions have no network for."""
    case = train_variants.Case(
        Config.model_validate({"model": MODEL, "diffusion": DIFFUSION}), 2, "fp32", start_processes()
    )
    network, process = train_variants.from_checkout(case, checkout)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in case.weights.items())
    assert process.given["steps"] == DIFFUSION["diffusion_steps"]
    assert process.given["learn_sigma"]
    train_variants.seed(case, checkout)()


def test_quick_networks_can_be_the_originals(checkout: Path, tmp_path: Path) -> None:
    """--quick --seed_checkout has a reference row."""
    results = tmp_path / "results.json"
    small = {"model": MODEL, "diffusion": DIFFUSION}
    with mock.patch.object(bench_train, "QUICK", small):
        bench_train.main(["--quick", "--seed_checkout", str(checkout), "--variants", "reference", "--rounds", "1",
                          "--seconds", "0.01", "--precisions", "fp32", "--json", str(results)])  # fmt: skip
    assert [row["variant"] for row in json.loads(results.read_text())["rows"]] == ["reference"]


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
        names = [name for name in bench_train.VARIANTS if "max-autotune" not in name]
        if importlib.util.find_spec("diffusers") is None:
            names.remove("diffusers")
        for name in (*names, "ours -cuda graph"):
            step = bench_train.MAKERS[name](case)
            for _ in range(6):
                step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_without_a_gpu() -> None:
    assert "--precisions: fp16 needs a GPU" in refusal(bench_train.main, ["--precisions", "fp16"])


@pytest.mark.parametrize("flag", [["--rounds", "0"], ["--seconds", "nan"], ["--threads", "-1"]])
def test_numbers_that_time_nothing(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench_train.main(["--quick", *flag])
    assert end.value.code == 2
    assert f"argument {flag[0]}: must be a" in capsys.readouterr().err


@pytest.mark.parametrize("main", [bench_train.main, bench_sampling.main])
def test_quick_with_a_configuration(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--quick", "--configs", "lsun_bedroom"])
    assert end.value.code == 2
    assert "argument --quick: it has a network of its own" in capsys.readouterr().err


def test_results_that_can_not_be_written(tmp_path: Path) -> None:
    """It is said before anything is timed."""
    assert "is a folder; give a file in it" in refusal(bench_train.main, ["--quick", "--json", str(tmp_path)])
    (tmp_path / "file").write_text("[]")
    beside = ["--quick", "--json", str(tmp_path / "file" / "results.json")]
    assert f"--json: {tmp_path / 'file'} can't be made" in refusal(bench_train.main, beside)
    kept = ["--quick", "--resume", "--json", str(tmp_path / "file")]
    assert f"--resume: {tmp_path / 'file'} holds no results" in refusal(bench_train.main, kept)


def test_file_of_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"model": {"image_sise": 32}}')
    message = refusal(bench_train.main, ["--configs", str(file)])
    assert str(file) in message
    assert "image_sise" in message
