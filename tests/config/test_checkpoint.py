"""A checkpoint is opened once per network, however many parts of a script read it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import flags, save, save_bare, super_res, unet

import fastdiff
from fastdiff import nll, sample, super_res_sample
from fastdiff.config.load import load
from fastdiff.config.sections import Config, SuperResConfig

OPENS = 3
"""How often Python opens a file that is read once: to check it, to load it, and to hash it."""
_watched: list[Counter[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and str(arguments[0]).endswith(".pt"):
        _watched[-1][Path(str(arguments[0])).name] += 1


sys.addaudithook(_audit)  # a hook can't be removed, so it counts only inside `opened_files`


@contextmanager
def opened_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Count how often each .pt file is opened in the block, and how often torch.load reads it."""
    opens: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    load = torch.load

    def counting(file: Any, *args: Any, **kwargs: Any) -> Any:
        loads[Path(file).name] += 1
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counting)
    _watched.append(opens)
    try:
        yield opens, loads
    finally:
        _watched.pop()
        monkeypatch.undo()


def check(opens: Counter[str], loads: Counter[str], *names: str) -> None:
    assert loads == dict.fromkeys(names, 1)
    assert opens == dict.fromkeys(names, OPENS)


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(unet(), tmp_path / "model.pt")
    with opened_files(monkeypatch) as counts:
        fastdiff.load(file, device="cpu")
    check(*counts, "model.pt")


def test_sample_with_three_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "model_path": save(unet(), tmp_path / "model.pt"),
        "guide_model_path": save(unet(), tmp_path / "guide.pt"),
        "sr_model_path": save(super_res(), tmp_path / "large.pt"),
        **{"guidance": 2, "num_samples": 2, "batch_size": 2, "sr_batch_size": 2, "out_dir": tmp_path / "out"},
    }
    with opened_files(monkeypatch) as counts:
        sample.main(flags(given))
    check(*counts, "model.pt", "guide.pt", "large.pt")


@pytest.mark.parametrize("script", [nll, super_res_sample])
def test_start(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is opened once before the script finds that another file is missing."""
    name = "nll" if script is nll else "super_res_sample"
    file = save(unet() if script is nll else super_res(), tmp_path / f"{name}.pt")
    argv = flags({"model_path": file, **({"data_dir": tmp_path} if script is nll else {})})
    with opened_files(monkeypatch) as (opens, loads), pytest.raises(fastdiff.errors.UserError):
        script.main(argv)
    check(opens, loads, f"{name}.pt")


def test_settings_that_the_weights_were_not_trained_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Drawing and scoring warn of them, unless the weights don't depend on them."""
    file = save(unet(), tmp_path / "model.pt")
    large = save(super_res(), tmp_path / "large.pt")
    bare = save_bare(unet(), tmp_path / "bare.pt")
    other = {"num_heads": 2, "predict_xstart": True, "diffusion_steps": 60}
    free = {"timestep_respacing": 3, "sigma_small": True, "dropout": 0.5, "use_kl": True, "num_heads": 4}
    for section, kind, path in (
        ("sample", Config, file),
        ("nll", Config, file),
        ("sample", SuperResConfig, large),
        ("sample", Config, bare),
    ):
        sections = ("model", "diffusion", section)
        given: dict[str, Any] = {"description": "", "sections": sections, "kind": kind}
        given["checkpoint"] = (section, "model_path")
        for changed in (other, free):
            caplog.clear()
            load(flags({"model_path": path, **changed}), **given)
            said = [record.getMessage() for record in caplog.records if "was trained with" in record.getMessage()]
            warned = changed is other and path != bare
            assert len(said) == warned
            if warned:
                assert said[0].startswith(
                    f"{path} was trained with num_heads 4, diffusion_steps 6, predict_xstart False, not with "
                    "--num_heads 2, --diffusion_steps 60, --predict_xstart True; leave that out"
                )
