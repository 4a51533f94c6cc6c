"""The best batch size is found and cached, and a job is compiled if it is long enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import flags, save, unet

from fastdiff import sample
from fastdiff.config.checkpoint import Network, open_checkpoint, open_network
from fastdiff.diffusion import DiffusionSettings
from fastdiff.sampling import sampler
from fastdiff.sampling.batch_size import best_batch_size
from fastdiff.sampling.settings import SampleSettings

CPU = torch.device("cpu")


def machine(fixed: float, each: float, room: int = 10**9) -> Any:
    """Return the seconds of a network call as a function of the size, with a fixed overhead, and the sizes tried."""
    tried: list[int] = []

    def seconds(size: int) -> float:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError
        return fixed + each * size

    return seconds, tried


@pytest.mark.parametrize(
    ("fixed", "each", "room", "most", "want"),
    [
        (0.0, 1.0, 10**9, 64, 1),  # a larger batch is no faster
        (1.0, 1.0, 10**9, 10**6, 32),  # the overhead is within 3%
        (100.0, 1e-3, 10**9, 48, 32),  # a larger batch is always faster
        (1.0, 1.0, 8, 64, 8),  # the memory holds 8
    ],
)
def test_best(fixed: float, each: float, room: int, most: int, want: int, tmp_path: Path) -> None:
    seconds, tried = machine(fixed, each, room)
    size, how = best_batch_size(seconds, most, {"a": 1}, tmp_path / "deep" / "cache.json")
    assert size == want
    assert f"{want}: " in how
    count = len(tried)
    again, how = best_batch_size(seconds, most, {"a": 1}, tmp_path / "deep" / "cache.json")
    assert again == want
    assert "before" in how
    assert len(tried) == count
    best_batch_size(seconds, most, {"a": 2}, tmp_path / "deep" / "cache.json")
    assert len(tried) == 2 * count


def test_not_even_one_fits(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        best_batch_size(machine(1, 1, 0)[0], 8, {}, tmp_path / "cache.json")


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', "\0"])
def test_a_damaged_cache_is_rewritten(content: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(content)
    best_batch_size(machine(1, 1)[0], 8, {}, cache)
    assert list(json.loads(cache.read_text()).values()) == [8]


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert best_batch_size(machine(1, 1)[0], 8, {}, tmp_path / "file" / "cache.json")[0] == 8


def test_auto_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"model_path": save(unet(), tmp_path / "model.pt"), "batch_size": "auto", "num_samples": 6}
    for name in ("first", "second"):
        sample.main(flags({**given, "out_dir": tmp_path / name}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch_size auto: ")]
    assert len(lines) == 2
    assert "evaluations per second" in lines[0]
    assert "as found before" in lines[1]


def open_tiny(folder: Path, **settings: Any) -> Network:
    model = unet(**settings)
    path = save(model, folder / "model.pt")
    return open_network(model.settings, DiffusionSettings(diffusion_steps=50), open_checkpoint(str(path)), "fp32", CPU)


def test_long_jobs_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = open_tiny(tmp_path)
    monkeypatch.setattr(sampler, "missing_compiler", lambda device: "")
    flops = sampler.Sampler(network, SampleSettings(), CPU).flops
    enough = int(sampler.WORTHWHILE_FLOPS["cpu"] / flops) + 1
    for count, settings, want in [
        (1, {}, False),
        (enough, {}, True),
        (enough, {"compile": False}, False),
        (1, {"compile": True}, True),
        (enough // 2, {}, False),
    ]:
        assert sampler.Sampler(network, SampleSettings(**settings), CPU, count=count).compiled is want
    monkeypatch.setattr(sampler, "missing_compiler", lambda device: "no compiler")
    assert not sampler.Sampler(network, SampleSettings(), CPU, count=enough).compiled
