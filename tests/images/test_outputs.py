"""What runs and sampling jobs wrote below a folder of images is no data."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.preparation_scripts import succeed
from helpers.tiny import flags, pictures, refusal, save, super_res, unet

from fastdiff import nll, sample, super_res_sample, train
from fastdiff.errors import UserError
from fastdiff.images.cache.build import pack
from fastdiff.images.labels import index_images
from fastdiff.images.listing import list_images
from fastdiff.images.outputs import kind_of_output


def start_run(data: Path, folder: Path, steps: int = 2) -> None:
    settings = {
        "batch_size": 4,
        "max_steps": steps,
        "sample_interval": 2,
        "sample_count": 2,
        "sample_respacing": "2",
        "loader": "pillow",
    }
    train.main(flags({**tiny.MODEL, **tiny.DIFFUSION, **settings, "data_dir": data, "run_dir": folder}))


def draw(folder: Path, save_as: str = "npz,png") -> None:
    model = save(unet(), folder.parent / "model000001.pt")
    given = {"model_path": model, "num_samples": 3, "steps": 2, "trajectory": 1, "save_as": save_as}
    sample.main(flags({**given, "out_dir": folder}))
    model.unlink()


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set into whose folder a run and two jobs have written."""
    root = tmp_path_factory.mktemp("made")
    pictures(root / "data", ["cat/1", "cat/2", "dog/1"])
    start_run(root / "data", root / "data" / "runs" / "first")
    draw(root / "data" / "runs" / "samples" / "ddpm")
    draw(root / "data" / "dog" / "drawn", "npz")
    return root


def test_they_are_left_out_and_named(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = made / "data"
    assert list(data.glob("runs/*/samples/*.png"))  # the run's previews
    with caplog.at_level(logging.WARNING):
        assert names(data) == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert "wrote is left out, 3 in all: dog/drawn, runs/first, runs/samples/ddpm" in caplog.text
    assert index_images(data, "folder").class_names == ["cat", "dog"]


def test_links_to_previews_are_left_out(made: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "data", ["cat/1", "samples/2"])
    (tmp_path / "data" / "drawn").symlink_to(made / "data" / "runs" / "first" / "samples")
    (tmp_path / "data" / "dog").symlink_to(made / "data" / "cat")
    assert names(tmp_path / "data") == ["cat/1.png", "dog/1.png", "dog/2.png", "samples/2.png"]


def test_only_one_rank_says_so(made: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        names(made / "data")
    assert not caplog.text


def test_a_run_goes_on_with_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "data", ["a", "b", "c"])
    start_run(tmp_path / "data", tmp_path / "data" / "run")
    start_run(tmp_path / "data", tmp_path / "data" / "run", steps=4)
    assert "3 images" in capsys.readouterr().out.rpartition("parameters")[2]
    assert "are not those that the run began with" not in (tmp_path / "data" / "run" / "log.txt").read_text()


@pytest.mark.parametrize("part", ["", "samples"])
def test_a_run_is_no_data(part: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made / "data" / "runs" / "first" / part
    with pytest.raises(UserError, match="of a training run, whose pictures are previews"):
        list_images(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="training run"):
        list_images(".")


@pytest.mark.parametrize("part", ["", "samples"])
def test_a_run_is_not_started_among_its_images(part: str, tmp_path: Path) -> None:
    pictures(tmp_path / "data" / part, ["a", "b"])
    given = {**tiny.MODEL, **tiny.DIFFUSION, "data_dir": tmp_path / "data" / part, "run_dir": tmp_path / "data"}
    assert "--run_dir: " in (message := refusal(train.main, flags(given)))
    assert "would mix the run's files with the images" in message


def test_a_job_is_data_where_it_is_named(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = made / "data" / "runs" / "samples" / "ddpm"
    assert {path.name for path in job.iterdir()} >= {"samples_3x8x8x3.png", "samples_3x8x8x3_steps.gif"}
    with caplog.at_level(logging.WARNING):
        assert [name.partition("/")[0] for name in names(job)] == ["images"] * 3
    assert "is the folder of a sampling job; its images are read as data: 3" in caplog.text
    assert "samples_3x8x8x3.png" in caplog.text
    assert len(list_images(job / "images")) == 3
    with pytest.raises(UserError, match="holds no images but samples_3x8x8x3.npz.*--save_as png"):
        list_images(made / "data" / "dog" / "drawn")


def test_a_job_drawn_into_a_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path / "all" / "cat", ["1", "2"])
    draw(tmp_path / "all" / "cat")
    assert names(tmp_path / "all" / "cat") == ["1.png", "2.png"]
    assert names(tmp_path / "all") == ["cat/1.png", "cat/2.png"]


@pytest.mark.parametrize("beside", ["samples_9x8x8x3.npz", "samples_9x8x8x3.zip", "samples_9x8x8x3-000000.tar"])
def test_a_grid_beside_its_samples(beside: str, tmp_path: Path) -> None:
    """Copied without job.json, or written by version 0.1."""
    pictures(tmp_path, ["1", "samples_9x8x8x3", "samples_8x8x8x3"])
    (tmp_path / beside).write_bytes(b"")
    assert names(tmp_path) == ["1.png", "samples_8x8x8x3.png"]


MARKS: dict[str, tuple[dict[str, object], str]] = {
    "run": ({"config.json": {"model": {}, "diffusion": {}, "train": {}}}, "run"),
    "without settings": ({"checkpoints": None, "status.json": {}}, "run"),
    "of 0.1": ({"checkpoints": None, "progress.csv": "step"}, "run"),
    "job": ({"job.json": {"identity": {}, "shape": [8, 8, 3]}}, "job"),
    "a network's settings": ({"config.json": {"model": "unet", "diffusion": 1}}, ""),
    "a list": ({"config.json": [], "job.json": [1]}, ""),
    "no JSON": ({"config.json": "{", "job.json": "job"}, ""),
    "another job": ({"job.json": {"name": "photos"}}, ""),
    "checkpoints alone": ({"checkpoints": None}, ""),
}


@pytest.mark.parametrize("way", MARKS)
def test_marks(way: str, tmp_path: Path) -> None:
    files, kind = MARKS[way]
    folder = tmp_path / "x"
    pictures(tmp_path, ["a", "x/samples/step_000001"])
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert kind_of_output(folder, list(files)) == kind
    assert len(list_images(tmp_path)) == (1 if kind else 2)


def by_packing(data: Path, out: Path) -> int:
    pack(index_images(data), (8, 8), 3, out, workers=1)
    return len(np.load(out / "pixels.npy"))


def by_scoring(data: Path, out: Path) -> int:
    model = save(unet(), out.parent / "model000001.pt")
    given = {"model_path": model, "data_dir": data, "out_dir": out, "num_samples": 99, "loader": "pillow"}
    with redirect_stdout(io.StringIO()) as text:
        nll.main(flags(given))
    return int(text.getvalue().rpartition(" images: ")[0].rpartition("\n")[2])


def by_enlarging(data: Path, out: Path) -> int:
    model = save(super_res(), out.parent / "model000001.pt")
    super_res_sample.main(flags({"model_path": model, "base_samples": data, "out_dir": out, "steps": 2}))
    return len(np.load(next(out.glob("*.npz")))["arr_0"])


def by_folder(data: Path, out: Path) -> int:
    succeed("folder.py", "--source", data, "--out", out, "--size", 8, "--labels", "folder")
    return len(list(out.glob("*.png")))


def by_imagenet64(data: Path, out: Path) -> int:
    succeed("imagenet64.py", "--source", data, "--out", out, "--size", 8)
    return len(list(out.glob("*.png")))


@pytest.mark.parametrize("read", [by_packing, by_scoring, by_enlarging, by_folder, by_imagenet64])
def test_every_reader_leaves_them_out(read: Callable[[Path, Path], int], made: Path, tmp_path: Path) -> None:
    assert read(made / "data", tmp_path / "out") == 3


def test_enlarging_into_the_same_folder_twice(tmp_path: Path) -> None:
    """The first job's files are no small images of the second."""
    pictures(tmp_path / "small", ["a", "b"])
    model = save(super_res(), tmp_path / "model000001.pt")
    given = {"model_path": model, "base_samples": tmp_path / "small", "out_dir": tmp_path / "small", "steps": 2}
    for _ in range(2):
        super_res_sample.main(flags({**given, "save_as": "npz,png"}))
    assert [file.name for file in (tmp_path / "small").glob("*.npz")] == ["samples_2x16x16x3.npz"]
