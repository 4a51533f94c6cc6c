"""An exception in one variant costs only its own rows, and every row is in the file as soon as it is measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import DIFFUSION, MODEL

from benchmarks import bench_sampling, bench_train
from benchmarks.result_file import ResultFile
from fastdiff.errors import StopWith, UserError

LABEL = {"config": "small", "precision": "fp32", "batch": 2}


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    config = tmp_path / "small.json"
    config.write_text(json.dumps({"model": MODEL, "diffusion": {**DIFFUSION, "diffusion_steps": 40}}))
    words = ["--configs", str(config), "--batches", "2", "--precisions", "fp32", "--rounds", "2", "--seconds", "0.01"]
    return [*words, "--threads", "1", "--json", str(tmp_path / "results.json")]


def results(argv: list[str]) -> dict[str, Any]:
    return json.loads(Path(argv[-1]).read_text())


def fails_when_built(case: Any) -> Any:
    raise ZeroDivisionError("nothing to divide by\nmore about it")


def fails_in_time(case: Any) -> Callable[[], None]:
    """Return a step function that fails at its sixth call, while it is timed."""
    taken = []

    def step() -> None:
        taken.append(None)
        if len(taken) == 6:
            raise IndexError("no sixth step")

    return step


@pytest.mark.parametrize("script", [bench_train, bench_sampling])
def test_the_rest_is_measured(
    script: Any, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"diffusers": fails_when_built, "reference+compile": fails_in_time}
    monkeypatch.setattr(script, "VARIANTS", {**script.VARIANTS, **others})
    argv = ["--variants", "diffusers,reference,reference+compile,ours eager", *argv]
    with pytest.raises(StopWith, match="failed and left out: diffusers, reference.compile; the trace") as end:
        script.main(argv)
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert "  diffusers left out: ZeroDivisionError: nothing to divide by\n" in out
    assert "in fails_when_built" in err
    assert "in step" in err
    content = results(argv)
    assert [row["variant"] for row in content["rows"]] == ["reference", "ours eager"]
    reasons = {entry["variant"]: entry["reason"] for entry in content["left_out"]}
    assert reasons["diffusers"] == "ZeroDivisionError: nothing to divide by"
    assert reasons["reference+compile"] == "IndexError: no sixth step"
    script.main([*argv, "--resume"])
    assert results(argv) == content, "a failed variant is not tried again"


def test_a_failing_lever_costs_itself(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants before a failing lever and levers after it are measured."""

    def without(case: Any, lever: str) -> Any:
        if lever == "compile":
            raise RuntimeError("no compiler")
        return eager(case)

    eager = functools.partial(bench_train.ours, compile=False)
    monkeypatch.setattr(bench_train, "without", without)
    monkeypatch.setattr(bench_train, "ours", lambda case, **_: eager(case))
    argv = ["--variants", "ours eager", "--levers", "compile,transposed upsampling", *argv]
    with pytest.raises(StopWith, match="ours -compile"):
        bench_train.main(argv)
    assert [row["variant"] for row in results(argv)["rows"]] == ["ours eager", "ours -transposed upsampling"]
    assert [entry["variant"] for entry in results(argv)["left_out"]] == ["ours -compile"]


def test_a_failing_case_costs_itself(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "Case", fails_when_built)
    with pytest.raises(StopWith, match="the whole case"):
        bench_train.main(argv)
    assert results(argv)["rows"] == []


def test_a_variant_that_cannot_run_here_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A UserError prints one line without a traceback, and the exit code stays 0."""
    made = ResultFile(tmp_path / "new" / "results.json", {"device": "some"}, resume=False)
    with made.guard(LABEL, "diffusers"):
        raise UserError("diffusers is not installed")
    made.end()
    out, err = capsys.readouterr()
    assert out == "  diffusers left out: diffusers is not installed\n"
    assert err == ""
    wanted = {"device": "some", "rows": [], "left_out": [{**LABEL, "variant": "diffusers", "reason": out[22:-1]}]}
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == wanted


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """The file is valid JSON after every row, no other file is left, and a second run continues it."""
    path = tmp_path / "results.json"
    first = ResultFile(path, {"device": "some"}, resume=True)
    for variant in ("reference", "ours"):
        first.add({**LABEL, "variant": variant})
        assert json.loads(path.read_text())["rows"][-1]["variant"] == variant
    assert list(tmp_path.iterdir()) == [path]
    second = ResultFile(path, {"device": "other"}, resume=True)
    assert second.missing(LABEL, ["ours", "diffusers", "reference"]) == ["diffusers"]
    assert second.missing({**LABEL, "batch": 4}, ["ours"]) == ["ours"]
    second.forget(LABEL, ["ours"])
    assert [row["variant"] for row in second.rows] == ["reference"]
    assert ResultFile(path, {}, resume=False).rows == []
