"""Several solvers, steps or guidances give one table, plot and picture, and rows that are there are not drawn again."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny import pictures, refusal, save, super_res, unet
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastdiff import evaluate
from fastdiff.evaluation import curves, drawing
from fastdiff.evaluation.classifier import Classifier, read_classifier, write_classifier
from fastdiff.evaluation.curve_files import _spaced, ordered, read_strip, shown, table, write_plots, write_strip
from fastdiff.evaluation.features import open_features
from fastdiff.evaluation.image_sets import open_image_set
from fastdiff.evaluation.judge import Judge
from fastdiff.evaluation.run import Evaluation
from fastdiff.evaluation.settings import EvaluateDrawSettings, EvaluateSettings
from fastdiff.evaluation.statistics import Described
from fastdiff.runtime.processes import current

DEVICE = torch.device("cpu")
CONDITIONAL: dict[str, Any] = {"class_cond": True, "num_classes": 3, "null_class": True}


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """A class-conditional model, a classifier of as many classes, and reference pictures."""
    model = save(unet(**CONDITIONAL), tmp_path / "ema_0.99_000010.pt", ["a", "b", "c"])
    torch.manual_seed(0)
    classifier = Classifier(3, (8, 8), 3).eval()
    with torch.no_grad():
        classifier.last.bias.copy_(torch.tensor([0.0, 5.0, -5.0]))
    write_classifier(classifier, tmp_path / "small.pt")
    pictures(tmp_path / "data", [f"{'abc'[i % 3]}_{i}" for i in range(40)])
    words = ["--model_path", model, "--features", tmp_path / "small.pt", "--reference", tmp_path / "data"]
    words += ["--num_samples", "24", "--batch_size", "7", "--resamplings", "3", "--results_dir", tmp_path / "results"]
    return [str(word) for word in words]


def files(tmp_path: Path, ending: str) -> list[Path]:
    """The files of curves with this ending."""
    bases = [path.with_suffix("") for path in (tmp_path / "results").glob("*.md")]
    return [path for base in bases if (path := base.with_name(base.name + ending)).is_file()]


def content_of(tmp_path: Path) -> dict[str, Any]:
    (path,) = files(tmp_path, ".json")
    return json.loads(path.read_text())


def rows_of(tmp_path: Path) -> list[tuple[Any, ...]]:
    return [(row["solver"], row["steps"], row["spacing"], row["guidance"]) for row in content_of(tmp_path)["rows"]]


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of images of every row that is drawn."""
    drawn: list[int] = []

    class Counted(drawing.DrawnImages):
        def __init__(self, sampler: Any, count: int, processes: Any) -> None:
            super().__init__(sampler, count, processes)
            drawn.append(count)

    monkeypatch.setattr("fastdiff.evaluation.run.DrawnImages", Counted)
    return drawn


# --- the files ---


def test_table_plot_and_strip(tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([*argv, "--solvers", "ddim,heun", "--steps", "2,3", "--metrics", "fid,precision"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"best within 20 evaluations: (ddim|heun) [23] \w+, fd\[classifier small\] \S+ ± \S+", lines[-2]
    )
    assert "-strip.png" in lines[-1]
    content = content_of(tmp_path)
    assert [row["evaluations"] for row in content["rows"]] == [2, 3, 3, 5], "heun evaluates the network 2 n - 1 times"
    assert {row["spacing"] for row in content["rows"]} == {"uniform", "karras"}, "auto is resolved"
    assert content["metrics"] == ["fd[classifier small]", "precision[classifier small]"]
    for row in content["rows"]:
        assert set(row["scores"]) == set(content["metrics"])
        assert 0 <= row["of_its_class"] <= 1
        assert row["images_per_second"] == pytest.approx(24 / row["seconds"])
    assert set(content["floor"]) == set(content["metrics"]), "precision keeps the reference's features in memory"
    (text,) = [path.read_text() for path in files(tmp_path, ".md")]
    assert "| ddim | 2 | uniform | – | 2 |" in text
    assert "of its class" in text
    assert "The reference against itself" in text
    (svg,) = [path.read_text() for path in files(tmp_path, ".svg")]
    for word in (
        "ddim uniform",
        "heun karras",
        "reference itself",
        "fd[classifier small]",
        "evaluations of the network",
    ):
        assert word in svg, word
    assert files(tmp_path, ".png")
    # Each result has its own file and its row of evaluations.csv as well.
    assert len((tmp_path / "results" / "evaluations.csv").read_text().splitlines()) == 5


def test_strip_has_the_first_images(tmp_path: Path, argv: list[str]) -> None:
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    (strip,) = files(tmp_path, "-strip.png")
    found = read_strip(strip)
    assert list(found) == ["ddim 2 uniform", "ddim 3 uniform"]
    out = tmp_path / "alone"
    evaluate.main([*argv, "--solver", "ddim", "--steps", "3", "--out_dir", str(out)])
    ((images, _),) = open_image_set(str(out), device="cpu", limit=10).batches(10)
    assert np.array_equal(found["ddim 3 uniform"], images.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_strip_is_read_as_it_was_written(tmp_path: Path, channels: int) -> None:
    generator = np.random.default_rng(0)
    rows = [{"solver": "ddim", "steps": steps, "spacing": "uniform", "guidance": 1.5} for steps in (5, 9)]
    images = {
        f"ddim {row['steps']} uniform, guidance 1.5": generator.integers(0, 256, (4, 8, 12, channels), dtype=np.uint8)
        for row in rows
    }
    write_strip(tmp_path / "strip.png", rows, images)
    found = read_strip(tmp_path / "strip.png")
    assert list(found) == list(images)
    assert all(np.array_equal(found[name], images[name]) for name in images)
    Image.new("L", (3, 3)).save(tmp_path / "other.png")
    assert read_strip(tmp_path / "other.png") == {}
    assert read_strip(tmp_path / "none.png") == {}


def test_other_features_have_no_classes_column(tmp_path: Path, argv: list[str]) -> None:
    write_classifier(Classifier(3, (8, 8), 2), tmp_path / "small.pt")
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    assert [row["of_its_class"] for row in content_of(tmp_path)["rows"]] == [None, None]
    assert content_of(tmp_path)["floor"] == {}, "fid alone keeps no features of the reference"
    (text,) = [path.read_text() for path in files(tmp_path, ".md")]
    assert "of its class" not in text
    assert "against itself" not in text


def test_share_of_its_class(tmp_path: Path, argv: list[str]) -> None:
    """A classifier's bias counts, and an image's class is the one that a sampling job writes beside it."""
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    share = {row["steps"]: row["of_its_class"] for row in content_of(tmp_path)["rows"]}
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2", "--out_dir", str(tmp_path / "job")])
    (npz,) = (tmp_path / "job").glob("*.npz")
    with np.load(npz) as arrays:
        images, labels = torch.from_numpy(arrays["arr_0"]), torch.from_numpy(arrays["arr_1"])
    network = open_features(str(tmp_path / "small.pt"), "", "fp32", DEVICE)
    classifier = read_classifier(tmp_path / "small.pt").eval()
    with torch.no_grad():
        named = classifier(Classifier.scaled(images.permute(0, 3, 1, 2))).argmax(dim=1)
    assert torch.equal(network.classes(network(images, ["logits"])["logits"]), named)
    assert share[2] == pytest.approx(float((named == labels).double().mean()))
    assert 0 < share[2] < 1, "a share that tells something"


# --- going on ---


@pytest.mark.slow
def test_rows_are_not_drawn_again(tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was stopped goes on, one with other steps adds rows, and another seed has files of its own."""
    report = Evaluation.report

    def stop_at_second(self: Evaluation, *given: Any) -> Any:
        if (tmp_path / "results").is_dir() and files(tmp_path, ".json"):
            raise KeyboardInterrupt
        return report(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "report", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    assert rows_of(tmp_path) == [("ddim", 2, "uniform", 1.0)]
    before = content_of(tmp_path)
    drawn = count_draws(monkeypatch)
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    assert len(drawn) == 1
    assert rows_of(tmp_path) == [("ddim", steps, "uniform", 1.0) for steps in (2, 3)]
    assert content_of(tmp_path)["rows"][0] == before["rows"][0]
    (strip,) = files(tmp_path, "-strip.png")
    assert list(read_strip(strip)) == ["ddim 2 uniform", "ddim 3 uniform"], "the first picture is kept"
    evaluate.main([*argv, "--solvers", "ddim,ddpm", "--steps", "3,0", "--guidance", "1,2"])
    assert len(drawn) == 1 + 7
    assert len(rows_of(tmp_path)) == 9
    assert ("ddpm", 0, "", 2.0) in rows_of(tmp_path)
    evaluate.main([*argv, "--solvers", "ddim,ddpm", "--steps", "3,0", "--guidance", "1,2"])
    assert len(drawn) == 8, "nothing is drawn again"
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3", "--seed", "1"])
    assert len(drawn) == 10
    assert len(files(tmp_path, ".json")) == 2


@pytest.mark.slow
def test_two_processes(tmp_path: Path, argv: list[str]) -> None:
    """They share each row, and all of them leave out the rows that are there."""
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3", "--metrics", "fid,precision"])
    words = [*argv, "--results_dir", str(tmp_path / "shared" / "results")]
    words += ["--solver", "ddim", "--metrics", "fid,precision"]
    alone, together = content_of(tmp_path), {}
    for steps, drawn in (("3,2,3", 2), ("2,3,4", 1)):
        said = run_ranks(["-m", "fastdiff.evaluate", *words, "--steps", steps])
        assert said.count("ddim: ") == drawn, "the first process names the solver of each row that is drawn"
        together = content_of(tmp_path / "shared")
    assert [row["steps"] for row in together["rows"]] == [2, 3, 4]
    for one, other in zip(alone["rows"], together["rows"], strict=False):
        assert one["identity"] == other["identity"]
        assert one["of_its_class"] == other["of_its_class"]
        for metric, score in one["scores"].items():
            assert other["scores"][metric] == pytest.approx(score, rel=1e-5)
    ours, theirs = (read_strip(files(folder, "-strip.png")[0]) for folder in (tmp_path, tmp_path / "shared"))
    assert np.array_equal(ours["ddim 3 uniform"], theirs["ddim 3 uniform"])
    assert "ddim 4 uniform" in theirs


def test_rows_of_another_network_are_replaced(tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another guide under the same name draws other images, whose row takes the place of the old one."""
    guided = [*argv, "--guidance", "1,2", "--solver", "ddim", "--steps", "2", "--guide_model_path"]
    guide = tmp_path / "guide.pt"
    save(unet(**CONDITIONAL), guide, ["a", "b", "c"])
    evaluate.main([*guided, str(guide)])
    before = content_of(tmp_path)["rows"]
    save(unet(**CONDITIONAL, dropout=0.3), guide, ["a", "b", "c"])
    drawn = count_draws(monkeypatch)
    evaluate.main([*guided, str(guide)])
    assert len(drawn) == 1
    after = content_of(tmp_path)["rows"]
    assert len(after) == len(before) == 2
    assert sum(row in before for row in after) == 1


# --- the plot ---


def test_without_matplotlib(
    tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2,3"])
    out = capsys.readouterr().out
    assert out.count("there is no plot: it needs matplotlib") == 1
    assert ".svg" not in out
    assert not files(tmp_path, ".svg")
    assert not files(tmp_path, ".png")
    assert len(rows_of(tmp_path)) == 2


def test_values_that_have_no_logarithm(tmp_path: Path) -> None:
    """KID may be negative, and precision lies between 0 and 1: both are drawn, and more of precision is better."""

    def row(solver: str, evaluations: int, kid: float, precision: float) -> dict[str, Any]:
        scores = {"kid": {"value": kid, "spread": 0.01}, "precision": {"value": precision}}
        cells = {"solver": solver, "steps": evaluations, "spacing": "uniform", "guidance": 1.0}
        drawn = {"of_its_class": None, "seconds": 2.0, "images_per_second": 3.0, "device": "a CPU"}
        return {**cells, "evaluations": evaluations, "scores": scores, **drawn}

    rows = [row("ddim", 10, -0.001, 0.5), row("ddpm", 10, 0.002, 0.9), row("ddpm", 5, 0.3, 0.1)]
    assert [each["solver"] for each in ordered(rows, "kid")] == ["ddpm", "ddim", "ddpm"]
    assert [each["solver"] for each in ordered(rows, "precision")] == ["ddpm", "ddpm", "ddim"]
    content = {
        **{"model": "m.pt", "num_samples": 6, "metrics": ["kid", "precision"], "reference": None, "rows": rows},
        **{"floor": {}, "features": {"network": "n", "weights": "w", "precision": "fp32"}},
    }
    assert write_plots([tmp_path / "plot.svg"], content) == []
    assert "precision" in (tmp_path / "plot.svg").read_text()
    assert "| ddim | 10 | uniform | – | 10 | -0.001 ± 0.010 | 0.5000 | 2 | 3 |" in table(content, "done")


@pytest.mark.parametrize(
    ("score", "text"),
    [
        ({"value": 7.4512, "spread": 3.648}, "7.5 ± 3.6"),
        ({"value": 1775.19, "spread": 73.4}, "1775 ± 73"),
        ({"value": 0.000212, "spread": 0.00005}, "0.000212 ± 0.000050"),
        ({"value": 0.95}, "0.9500"),
        ({"value": 0.0, "spread": 0.0}, "0.000 ± 0.000"),
    ],
)
def test_scores_are_shown_with_their_spread(score: dict[str, float], text: str) -> None:
    assert shown(score) == text


def test_ticks_are_apart() -> None:
    assert _spaced([10, 19, 20, 20, 39, 50, 50, 10]) == [10, 20, 39, 50]


def test_floor_is_near_zero_for_one_distribution() -> None:
    """The reference against itself is far nearer than another distribution, and nearer with more images."""
    settings = EvaluateSettings(reference="r", metrics=("fid", "precision"), resamplings=0)
    features = torch.rand(400, 64, generator=torch.Generator().manual_seed(0))
    reference = Described("r", 400, {"pool": curves.Moments.of(features)}, {"pool": features})

    class Network:
        device, name, widths, is_inception, precision, notes = DEVICE, "n", {"pool": 64}, True, "fp32", ()

    judge = Judge(settings, Network(), reference)  # type: ignore[arg-type]
    few, many = curves.floor_of(judge, 100), curves.floor_of(judge, 10_000)
    other = Described("o", 400, {"pool": curves.Moments.of(features + 0.5)}, {"pool": features + 0.5})
    assert 0 < many["fid"]["value"] < few["fid"]["value"] < judge.score(other).scores["fid"].value / 4
    assert 0 < many["fid"]["spread"] < many["fid"]["value"]
    assert 0 < many["precision"]["value"] <= 1
    reference.features = {}
    assert curves.floor_of(judge, 100) == {}


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "10,x"], r"--steps.*x"),
        (["--solvers", "ddim,dpm"], r"solvers must be among .*dpm"),
        (["--solvers", "ddim,heun", "--steps", "1,2", "--eta", "2"], r"eta"),
        (["--spacing", "logsnr,none", "--steps", "3"], r"spacing.*none"),
        (["--guidance", "1,-1"], r"guidance.*0"),
        (["--steps", "2,3", "--out_dir", "here"], r"--out_dir is for the images of one solver"),
        (["--solver", "ddim", "--steps", "2,1000"], r"--steps 1000"),
    ],
)
def test_refused(argv: list[str], words: list[str], sentence: str) -> None:
    assert re.search(sentence, refusal(evaluate.main, [*argv, *words]))


def test_damaged_rows(tmp_path: Path, argv: list[str]) -> None:
    words = [*argv, "--solver", "ddim", "--steps", "2,3"]
    evaluate.main(words)
    (path,) = files(tmp_path, ".json")
    for damaged in ("[]", '{"rows": [1], "floor": {}}', "{"):
        path.write_text(damaged)
        assert path.name in refusal(evaluate.main, words)


def test_one_variant_writes_no_curves(tmp_path: Path, argv: list[str]) -> None:
    assert len(EvaluateDrawSettings(steps=(0,), spacing=("uniform", "logsnr")).variants()) == 1
    assert current().is_main
    evaluate.main([*argv, "--solver", "ddim", "--steps", "2"])
    assert not files(tmp_path, ".json")


# --- files of others, and other commands ---


def test_commands_at_once_keep_each_other_s_rows(tmp_path: Path, argv: list[str]) -> None:
    """A command that begins while another writes its rows adds to them."""

    def meanwhile(self: Any, *given: Any) -> Any:
        monkeypatch.undo()
        evaluate.main([*argv, "--solvers", "dpmpp_2m,unipc", "--steps", "2"])
        return add(self, *given)

    add, monkeypatch = curves.Curves.add, pytest.MonkeyPatch()
    monkeypatch.setattr(curves.Curves, "add", meanwhile)
    evaluate.main([*argv, "--solvers", "ddim", "--steps", "2,3"])
    assert sorted(row[:2] for row in rows_of(tmp_path)) == [("ddim", 2), ("ddim", 3), ("dpmpp_2m", 2), ("unipc", 2)]
    (strip,) = files(tmp_path, "-strip.png")
    assert len(read_strip(strip)) == 4


@pytest.mark.slow
def test_other_chains_and_cascades_have_files_of_their_own(tmp_path: Path, argv: list[str]) -> None:
    enlarging = save(super_res(class_cond=True, num_classes=3), tmp_path / "large.pt", ["a", "b", "c"])
    argv = [*argv, "--resize", "16", "--sr_model_path", str(enlarging), "--solvers", "ddim,ddpm", "--steps"]
    evaluate.main([*argv, "2", "--sr_steps", "3"])
    evaluate.main([*argv, "2", "--sr_steps", "2"])
    evaluate.main([*argv, "0", "--sr_steps", "2", "--timestep_respacing", "4"])
    assert [len(json.loads(path.read_text())["rows"]) for path in files(tmp_path, ".json")] == [2, 2, 2]


def test_a_name_that_looks_like_a_formula(tmp_path: Path, argv: list[str]) -> None:
    model, network = tmp_path / "m$^$_{.pt", tmp_path / "q$^$.pt"
    Path(argv[1]).rename(model)
    Path(argv[3]).rename(network)
    evaluate.main(["--model_path", str(model), "--features", str(network), *argv[4:], "--steps", "2,3"])
    (plot,) = files(tmp_path, ".svg")
    assert "fd[classifier q$^$]" in plot.read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["rows"][0].pop("scores"),
        lambda content: content["rows"][0].update(evaluations="x"),
        lambda content: content["rows"].append(None),
        lambda content: content.update(floor={"fid": 3}),
    ],
)
def test_rows_with_damaged_entries(tmp_path: Path, argv: list[str], change: Any) -> None:
    argv = [*argv, "--solvers", "ddim", "--steps", "2,3"]
    evaluate.main(argv)
    (path,) = files(tmp_path, ".json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert "holds no rows of a comparison" in refusal(evaluate.main, argv)


def test_strips_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"solver": "ddim", "steps": 2, "spacing": "uniform", "guidance": 1}
    path, images = tmp_path / "strip.png", np.zeros((2, 8, 8, 3), dtype=np.uint8)
    write_strip(path, [row], {"ddim 2 uniform": images})
    assert list(read_strip(path)) == ["ddim 2 uniform"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_strip(path) == {}
    monkeypatch.undo()
    about = PngInfo()
    about.add_text("rows", json.dumps({"names": ["ddim 2 uniform"], "shape": [2, 0, 8, 3]}))
    Image.new("RGB", (400, 60)).save(path, pnginfo=about)
    assert read_strip(path) == {}
