"""The benchmark of Inception's features runs at a small size, and its variants compute the same statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.inception import write_random_weights
from helpers.tiny import refusal
from PIL import Image

from benchmarks import bench_evaluate
from benchmarks.bench_evaluate import VARIANTS, Case, Statistics, computes, error_of, make_pictures
from fastdiff.errors import UserError
from fastdiff.runtime.processes import current

SMALL = ["--images", "6", "--size", "16", "--rounds", "2", "--batch_size", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("inception") / "random.pth")


def test_results(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--feature_weights", str(weights), "--json", str(tmp_path / "out.json")]
    bench_evaluate.main([*argv, "--variants", "ours,clean-fid,torch-fidelity"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ratios: ours ")
    assert last.endswith(" x torch-fidelity")
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert set(rows) == {"ours", "torch-fidelity"}
    for row in rows.values():
        assert len(row["seconds"]) == 2
        low, middle, high = row["images_per_second"]
        assert 0 < low <= middle <= high
        assert row["computes"] == "fp32"
    assert rows["torch-fidelity"]["ratio"] == [1.0, 1.0, 1.0]
    assert rows["ours"]["error"] < 1e-3, "the same function, in float32"
    (left_out,) = content["left_out"]
    assert left_out["variant"] == "clean-fid"
    assert "clean-fid is not installed" in left_out["reason"] or "--clean_fid_weights" in left_out["reason"]
    assert (content["images"], content["size"], content["weights"]) == (6, "16x16x3", "released")
    assert {"device", "threads", "torch", "versions", "commit", "date", "command", "load"} <= content.keys()


class Means(torch.nn.Module):
    """Mean pixels as features, with the interface of clean-fid's TorchScript module."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return x.mean(dim=(2, 3)) if return_features else x


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.[a-z]+. is deprecated:DeprecationWarning")
def test_clean_fid(tmp_path: Path) -> None:
    """Its loop passes every pixel of every file to the network once."""
    pytest.importorskip("cleanfid")
    folder = make_pictures(tmp_path / "pictures", 5, 16)
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    case = Case(folder, tmp_path / "unused", tmp_path / "means.pt", 4, current())
    found = VARIANTS["clean-fid"](case)(folder)
    pixels = np.stack([np.asarray(Image.open(file), dtype=float) for file in sorted(folder.iterdir())])
    assert found is not None
    assert found.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), rel=1e-5)
    assert found.covariance == pytest.approx(np.cov(pixels.mean(axis=(1, 2)), rowvar=False), rel=1e-3)
    assert VARIANTS["clean-fid resize"](case)(folder) is None
    with pytest.raises(UserError, match="does not exist"):
        VARIANTS["clean-fid"](case._replace(clean_fid_weights=tmp_path / "none.pt"))


def test_pictures_are_pngs_of_one_size(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "made", 3, 24)
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".png"] * 3
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert all(each.shape == (24, 24, 3) for each in pixels)
    assert not np.array_equal(pixels[0], pixels[1])


def test_error_and_arithmetic() -> None:
    exact = Statistics(np.array([1.0, 2.0]), np.diag([9.0, 16.0]))
    assert error_of(exact, exact) == 0
    assert error_of(Statistics(np.array([1.3, 2.4]), exact.covariance), exact) == pytest.approx(0.5 / 5)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [computes(name, gpu) for name in ("ours", "ours bf16", "torch-fidelity")] == ["fp32", "bf16", "tf32"]
    assert computes("torch-fidelity", cpu) == "fp32"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--variants", "ous"], "--variants: 'ous' is not one of"),
        (["--images", "1"], "--images must be at least 2"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--data_dir", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_bad_input(argv: list[str], sentence: str, weights: Path) -> None:
    assert sentence in refusal(bench_evaluate.main, ["--feature_weights", weights, *argv])
