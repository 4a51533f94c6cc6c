"""Scripts and `fastdiff.load` forbid or allow TF32, and set cuDNN's search; the switches can be read without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import DIFFUSION, MODEL, flags, pictures, save, unet

import fastdiff
from fastdiff import nll, sample, train
from fastdiff.errors import UserError
from fastdiff.models import UNet
from fastdiff.runtime.machine import prepare_cudnn, tf32

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def state() -> tuple[bool, bool, bool]:
    """Return whether matrix products, convolutions and recurrent layers in float32 may use TF32."""
    return MATMUL.fp32_precision == "tf32", CUDNN.conv.fp32_precision == "tf32", CUDNN.rnn.fp32_precision == "tf32"


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Restore the switches as `conftest.py` set them."""
    yield
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = False
    CUDNN.benchmark, CUDNN.benchmark_limit = False, 10


@pytest.mark.parametrize("before", [(False, False), (False, True), (True, True)], ids=["none", "PyTorch's own", "all"])
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32(allowed: bool, before: tuple[bool, bool]) -> None:
    """Both libraries get the setting, and the previous one is restored, also after an exception."""
    MATMUL.allow_tf32, CUDNN.allow_tf32 = before
    found = state()
    with tf32(allowed):
        assert state() == (allowed, allowed, allowed)
        # Inductor reads these, and reading raises an error if the older and the newer switches disagree.
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert state() == found
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == before
    with pytest.raises(ZeroDivisionError), tf32(allowed):
        _ = 1 / 0
    assert state() == found


@pytest.mark.parametrize("ours", ["ieee", "tf32"])
def test_tf32_in_a_process_that_sets_the_newer_switches(ours: str) -> None:
    """After a newer switch was set, PyTorch refuses to read the older ones."""
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = ours
    for allowed in (True, False):
        with tf32(allowed):
            assert state() == (allowed, allowed, allowed)
            assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)
    assert state() == ((ours == "tf32"),) * 3


def test_benchmark_limit() -> None:
    assert "up to 10" in prepare_cudnn()
    assert (CUDNN.benchmark, CUDNN.benchmark_limit) == (True, 10)
    assert "all" in prepare_cudnn(benchmark_limit=0)
    assert (CUDNN.benchmark, CUDNN.benchmark_limit) == (True, 0)
    try:
        assert "deterministic" in prepare_cudnn(deterministic=True)
        assert not CUDNN.benchmark
    finally:
        prepare_cudnn()


# --- scripts and the library ---


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[tuple[bool, bool, bool]]:
    """The states of the switches in which a network was run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # so that batch_size auto has to try
    found: set[tuple[bool, bool, bool]] = set()
    body = UNet.body

    def watched(self: UNet, *args: Any) -> torch.Tensor:
        found.add(state())
        return body(self, *args)

    monkeypatch.setattr(UNet, "body", watched)
    return found


def _train(folder: Path, given: dict[str, Any]) -> None:
    pictures(folder / "pictures", [f"a_{i}" for i in range(4)])
    run = {"data_dir": folder / "pictures", "run_dir": folder / "run", "max_steps": 1, "batch_size": 2}
    run |= {"sample_interval": 1, "sample_respacing": "ddim2", "compile": False}  # the watching code can't be traced
    train.main(flags({**MODEL, **DIFFUSION, **run, **given}))


def _sample(folder: Path, given: dict[str, Any]) -> None:
    model = save(unet(), folder / "model.pt", predict_xstart=True)
    drawing = {"num_samples": 2, "trajectory": 1, "batch_size": "auto"}
    sample.main(flags({"model_path": model, "out_dir": folder / "out", **drawing, **given}))


def _nll(folder: Path, given: dict[str, Any]) -> None:
    model = save(unet(), folder / "model.pt", predict_xstart=True)
    pictures(folder / "pictures", ["a_0", "a_1"])
    nll.main(flags({"model_path": model, "data_dir": folder / "pictures", "out_dir": folder / "out", **given}))


def _load(folder: Path, given: dict[str, Any]) -> None:
    model = fastdiff.load(save(unet(), folder / "model.pt", predict_xstart=True), **given)
    with tf32(True):  # the caller's own setting
        model.sample(1, steps=2)
        model.encode(np.zeros((1, 8, 8, 3), np.uint8), steps=2)


@pytest.mark.parametrize("given", [{}, {"allow_tf32": True}], ids=["default", "allowed"])
@pytest.mark.parametrize("go", [_train, _sample, _nll, _load])
def test_where_it_is_allowed(
    go: Callable[[Path, dict[str, Any]], None], given: dict[str, Any], seen: set[Any], tmp_path: Path
) -> None:
    """The network always runs with the setting, which is exact by default, and the switches are restored."""
    CUDNN.allow_tf32 = True  # PyTorch's default
    before = state()
    go(tmp_path, given)
    assert seen == {(bool(given),) * 3}
    assert state() == before


def test_it_is_part_of_the_images(tmp_path: Path) -> None:
    """A job without the setting continues with its default; with TF32 it is another job."""
    model = save(unet(), tmp_path / "model.pt", predict_xstart=True)
    given = {"model_path": model, "num_samples": 2, "out_dir": tmp_path / "out"}
    sample.main(flags(given))
    sample.main(flags({**given, "allow_tf32": False, "cudnn_benchmark_limit": 0}))
    with pytest.raises(UserError, match="allow_tf32"):
        sample.main(flags({**given, "allow_tf32": True}))


def test_a_change_is_said_when_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log reports a change of the setting, but not of the time that cuDNN may search."""
    _train(tmp_path, {})
    assert "first step after " in capsys.readouterr().out
    _train(tmp_path, {"allow_tf32": True, "cudnn_benchmark_limit": 0, "max_steps": 2})
    out = capsys.readouterr().out
    assert "allow_tf32 is True from here on; it was False" in out
    assert "benchmark_limit is" not in out


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_what_a_process_has_set_comes_back(products: str) -> None:
    """PyTorch's three switches agree inside the block and after it; otherwise reading one of them would raise."""
    torch.set_float32_matmul_precision(products)
    try:
        for allowed in (False, True):
            with tf32(allowed):
                assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
                assert (torch.get_float32_matmul_precision() == "highest") == (not allowed)
            assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_general_switch_does_not_reach_inside() -> None:
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        with tf32(False):
            assert torch.backends.cudnn.conv.fp32_precision != "tf32"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
