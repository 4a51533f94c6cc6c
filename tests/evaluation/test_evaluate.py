"""evaluate.py from its flags to its files: numbers, statistics, drawing, processes, and bad input."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny import pictures, refusal, save, unet
from PIL import Image

from fastdiff import evaluate, sample
from fastdiff.evaluation.features import open_features
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.evaluation.statistics import read_statistics

METRICS = "fid,is,precision,recall,kid"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go to runs/evaluations by default."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def main(*flags: Any) -> None:
    evaluate.main([str(flag) for flag in flags])


def refused(*flags: Any) -> str:
    """The sentence with which evaluate.py refuses flags."""
    return refusal(evaluate.main, [str(flag) for flag in flags])


def npz(path: Path, count: int, seed: int = 0, size: int = 8, low: int = 0, **more: Any) -> Path:
    """An npz of smooth random images in three colours."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(low, 256, (count, 2, 2, 3), dtype=np.uint8)
    images = colours.repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    np.savez(path, images ^ generator.integers(0, 32, images.shape, dtype=np.uint8), **more)
    return path


def run(folder: Path, *flags: Any) -> dict[str, Any]:
    """Run evaluate.py; returns the content of the newest JSON file in the results folder."""
    main(*flags, "--results_dir", folder)
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(files[-1].read_text()) if files else {}


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name.partition("[")[0]: score["value"] for name, score in result["scores"].items()}


class Tensors(torch.utils.data.Dataset):
    """The images of an npz as torch-fidelity takes them."""

    def __init__(self, path: Path) -> None:
        self.images = np.load(path)["arr_0"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1)


# --- numbers ---


@pytest.mark.slow
def test_equals_torch_fidelity(tmp_path: Path, inception_weights: Path) -> None:
    """FID, Inception score, KID, precision and recall are those of torch-fidelity's own loop, to rounding."""
    a, b = npz(tmp_path / "a.npz", 23, 0, low=60), npz(tmp_path / "b.npz", 19, 1)
    flags = ["--samples", a, "--reference", b, "--feature_weights", inception_weights, "--kid_subset_size", 15]
    found = run(tmp_path / "out", *flags, "--metrics", METRICS, "--resamplings", 0, "--feature_batch_size", 8)
    calculate = torch_fidelity_module("metrics").calculate_metrics
    theirs = calculate(
        input1=Tensors(a),
        input2=Tensors(b),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        kid_subset_size=15,
        save_cpu_ram=True,
        verbose=False,
    )
    known = {
        "fid": theirs["frechet_inception_distance"],
        "is": theirs["inception_score_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
        "kid": theirs["kernel_inception_distance_mean"],
    }
    assert values(found) == pytest.approx(known, rel=1e-4)
    assert found["scores"]["kid"]["spread"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    assert found["scores"]["is"]["over_splits"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert "rank 22 for the samples and 18 for the reference (fewer images than features)" in "".join(found["notes"])


def test_everything_a_number_needs(tmp_path: Path, quarters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = npz(tmp_path / "a.npz", 40, 0), npz(tmp_path / "b.npz", 50, 1)
    flags = ["--samples", a, "--reference", b, "--features", quarters, "--kid_subset_size", 20]
    found = run(tmp_path / "out", *flags, "--metrics", METRICS)
    assert list(found["scores"]) == [f"{name}[quarters.pt]" for name in ("fd", "is", "precision", "recall", "kd")]
    assert all(score["spread"] > 0 for score in found["scores"].values())
    assert found["samples"].items() >= {"path": str(a), "count": 40, "size": "8x8x3"}.items()
    assert found["reference"]["count"] == 50
    assert found["samples"]["pixels"] != found["reference"]["pixels"]
    assert found["features"]["network"] == "quarters.pt"
    assert found["features"]["precision"] == "fp32"
    assert found["protocol"]["metric_seed"] == 2020
    assert found["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert "(40 samples against 50 reference images)" in said
    assert "note: only 40 samples" in said
    assert "note: only 50 reference images" in said
    # The same numbers again give the same file, and another row.
    again = run(tmp_path / "out", *flags, "--metrics", METRICS)
    assert values(again) == values(found)
    assert len(list((tmp_path / "out").glob("*.json"))) == 1
    run(tmp_path / "out", *flags, "--metrics", "is", "--splits", 3)
    with (tmp_path / "out" / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[0]["fd[quarters.pt]"]) == pytest.approx(values(found)["fd"])
    assert rows[2]["fd[quarters.pt]"] == ""
    assert {row["num_samples"] for row in rows} == {"40"}
    assert "only 40 samples" in rows[0]["notes"]
    assert (tmp_path / "out" / rows[2]["file"]).is_file()


def test_identical_sets(tmp_path: Path, quarters: Path) -> None:
    a = npz(tmp_path / "a.npz", 30)
    flags = ["--samples", a, "--reference", a, "--features", quarters, "--kid_subset_size", 30]
    found = values(run(tmp_path / "out", *flags, "--metrics", METRICS))
    assert found["fd"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_pictures_and_arrays_give_one_number(tmp_path: Path, quarters: Path) -> None:
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 20, 1)
    (tmp_path / "png").mkdir()
    (tmp_path / "jpg").mkdir()
    for i, image in enumerate(np.load(a)["arr_0"]):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:03d}.png")
        Image.fromarray(image).save(tmp_path / "jpg" / f"{i:03d}.jpg")
    first, second, lossy = (
        run(tmp_path / name, "--samples", source, "--reference", b, "--features", quarters)
        for name, source in (("1", a), ("2", tmp_path / "png"), ("3", tmp_path / "jpg"))
    )
    assert values(first) == values(second)
    assert first["samples"]["pixels"] == second["samples"]["pixels"]
    assert values(lossy) != values(first)
    assert lossy["samples"]["lossy"] == "JPEG"
    assert any("the files of the samples are JPEG" in note for note in lossy["notes"])


def test_resized_pictures(tmp_path: Path, quarters: Path) -> None:
    a, b = npz(tmp_path / "a.npz", 10, 0, size=8), npz(tmp_path / "b.npz", 10, 1, size=16)
    flags = ["--samples", a, "--reference", b, "--features", quarters]
    said = refused(*flags)
    assert "the samples are images of 8x8x3, those of --reference of 16x16x3" in said
    assert "--resize 8x8" in said
    found = run(tmp_path / "out", *flags, "--resize", 8)
    assert found["reference"]["size"] == "8x8x3"
    assert "resized to 8x8 pixels" in found["reference"]["resized"]


@pytest.mark.slow
def test_bf16_states_its_error(tmp_path: Path, inception_weights: Path) -> None:
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 12, 1)
    flags = ["--samples", a, "--reference", b, "--feature_weights", inception_weights]
    flags += ["--metrics", "kid", "--kid_subset_size", 12]
    exact = run(tmp_path / "exact", *flags)
    rounded = run(tmp_path / "rounded", *flags, "--feature_precision", "bf16")
    error = rounded["scores"]["kid"]["error_of_rounding"]
    assert "error_of_rounding" not in exact["scores"]["kid"]
    assert error == pytest.approx(abs(values(rounded)["kid"] - values(exact)["kid"]), rel=1e-6)
    assert error > 0
    # Exact statistics in the place of the reference leave the error of the samples.
    main(*flags[2:], "--reference_out", tmp_path / "exact.npz")
    flags[3] = tmp_path / "exact.npz"
    mixed = run(tmp_path / "mixed", *flags, "--feature_precision", "bf16")
    error = mixed["scores"]["kid"]["error_of_rounding"]
    assert error == pytest.approx(abs(values(mixed)["kid"] - values(exact)["kid"]), rel=1e-6)
    assert rounded["features"]["precision"] == "bf16"


# --- statistics ---


def test_statistics_take_the_place_of_images(
    tmp_path: Path, quarters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = npz(tmp_path / "a.npz", 30, 0), npz(tmp_path / "b.npz", 40, 1)
    common = ["--metrics", METRICS, "--features", quarters, "--kid_subset_size", 20]
    file = tmp_path / "statistics.npz"
    main("--reference", b, "--reference_out", file, *common, "--results_dir", tmp_path / "out")
    assert f"statistics of 40 images in {file}" in capsys.readouterr().out
    direct = run(tmp_path / "1", "--samples", a, "--reference", b, *common)
    read = run(tmp_path / "2", "--samples", a, "--reference", file, *common)
    assert values(read) == values(direct)
    assert read["reference"]["count"] == 40
    assert read["reference"]["pixels"] == direct["reference"]["pixels"]
    assert read["reference"]["statistics"] is True
    said = refused("--samples", a, "--reference", file, "--features", "dinov2-vit-x")
    assert said.startswith("--features")


def test_features_of_a_large_reference(tmp_path: Path, quarters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision, recall and KID see at most KEPT reference images, evenly chosen, whether from images or statistics."""
    monkeypatch.setattr("fastdiff.evaluation.collect.KEPT", 7)
    b, file = npz(tmp_path / "b.npz", 20, 1), tmp_path / "statistics.npz"
    common = ["--features", quarters, "--metrics", "fid,precision,recall", "--feature_batch_size", 6]
    main("--reference", b, "--reference_out", file, *common)
    monkeypatch.setattr("fastdiff.evaluation.collect.KEPT", 100)
    main("--reference", b, "--reference_out", tmp_path / "all.npz", *common)
    few, everything = (np.load(path)["features"] for path in (file, tmp_path / "all.npz"))
    assert np.array_equal(few, everything[[0, 2, 5, 8, 11, 14, 17]])
    assert np.array_equal(np.load(file)["mu"], np.load(tmp_path / "all.npz")["mu"])


def test_statistics_of_other_features(tmp_path: Path, quarters: Path, broken: Path) -> None:
    b, file = npz(tmp_path / "b.npz", 40, 1, low=50), tmp_path / "statistics.npz"
    main("--reference", b, "--reference_out", file, "--features", quarters)
    said = refused("--samples", b, "--reference", file, "--features", broken)
    assert "--reference: " in said
    assert "its network is 'quarters.pt', now it is 'broken.pt'" in said
    said = refused("--samples", b, "--reference", file, "--features", quarters, "--metrics", "recall")
    assert "holds mean and covariance only, and precision, recall and kid need features of images" in said


@pytest.mark.slow
def test_statistics_of_other_programs(tmp_path: Path, inception_weights: Path) -> None:
    """mu and sigma as clean-fid and EDM write them, and OpenAI's reference batches: images and the moments of sFID."""
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 10, 1)
    common = ["--feature_weights", inception_weights, "--resamplings", 0]
    ours, sfid = tmp_path / "ours.npz", tmp_path / "sfid.npz"
    main("--reference", b, "--reference_out", ours, "--metrics", "fid,sfid", *common)
    main("--reference", b, "--reference_out", sfid, "--metrics", "sfid", *common)
    arrays = dict(np.load(ours))
    edm = tmp_path / "cifar10_clean_train_32.npz"
    np.savez(edm, mu=arrays["mu"], sigma=arrays["sigma"])
    openai = tmp_path / "VIRTUAL.npz"
    batch = {name: arrays[name].astype(np.float32) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(openai, arr_0=np.load(b)["arr_0"], **batch)
    network = open_features("inception-v3-compat", str(inception_weights), "fp32", torch.device("cpu"))
    for file, outputs in ((ours, ("pool", "spatial")), (sfid, ("spatial",)), (edm, ("pool",)), (openai, ("pool",))):
        found = read_statistics(file, outputs, network)
        for output, (mean, covariance) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
            if output in outputs:
                moments = found.moments[output]
                np.testing.assert_allclose(moments.mean, arrays[mean], rtol=1e-6)
                np.testing.assert_allclose(moments.covariance, arrays[covariance], rtol=1e-6, atol=1e-12)
        assert any("doesn't say which network made it" in note for note in found.notes) == (file in (edm, openai))
        assert any("clean-fid's mode clean" in note for note in found.notes) == (file == edm)
    metrics = ["--metrics", "precision,recall"]
    direct = run(tmp_path / "1", "--samples", a, "--reference", b, *metrics, *common)
    assert values(run(tmp_path / "2", "--samples", a, "--reference", openai, *metrics, *common)) == values(direct)
    said = refused("--samples", a, "--reference", edm, "--metrics", "sfid", *common)
    assert "has no mu_s, which sFID needs" in said


def test_damaged_statistics(tmp_path: Path, quarters: Path) -> None:
    a = npz(tmp_path / "a.npz", 12)
    eye, file = np.eye(12), tmp_path / "statistics.npz"
    common = ["--samples", a, "--reference", file, "--features", quarters]
    for arrays, what in (
        ({"mu": np.zeros(12)}, "has no sigma"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu of .* is float64 \[5\], and the network has 12 features"),
        ({"mu": np.zeros(12), "sigma": eye[:5]}, r"sigma of .* is \[5, 12\], not \[12, 12\]"),
        ({"mu": np.zeros(12), "sigma": eye * np.nan}, "sigma of .* has values that are not finite"),
        ({"mu": np.zeros(12), "sigma": -eye}, "it has the eigenvalue -1"),
        ({"mu": np.zeros(12, dtype=object), "sigma": eye}, "mu holds Python objects"),
        ({"mu": np.zeros(12), "sigma": eye, "about": np.array("[")}, "is no file of statistics, or is damaged"),
    ):
        np.savez(file, **arrays)
        said = refused(*common)
        assert said.startswith("--reference"), said
        assert re.search(what, said), said
    np.savez(file, mu=np.zeros(12), sigma=eye)
    file.write_bytes(file.read_bytes()[:-40])
    assert "--reference: " in refused(*common)


@pytest.mark.slow
def test_processes_change_no_bit(tmp_path: Path, inception_weights: Path) -> None:
    """One, two and three processes write the same statistics, bit for bit."""
    b = npz(tmp_path / "b.npz", 10, 1)
    files = {count: tmp_path / f"statistics_{count}.npz" for count in (1, 2, 3)}
    flags = ["--reference", b, "--metrics", "fid,sfid,kid", "--kid_subset_size", 5, "--feature_batch_size", 4]
    flags += ["--feature_weights", inception_weights, "--results_dir", tmp_path / "out", "--reference_out"]
    main(*flags, files[1])
    for count in (2, 3):
        run_ranks(["-m", "fastdiff.evaluate", *map(str, [*flags, files[count]])], world_size=count)
    first, *others = (np.load(files[count]) for count in (1, 2, 3))
    assert set(first) == {"mu", "sigma", "mu_s", "sigma_s", "features", "count", "about"}
    for other in others:
        for name in first:
            assert np.array_equal(first[name], other[name]), name


# --- drawing ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(unet(), tmp_path / "model.pt")


def test_drawn_images_are_the_jobs(tmp_path: Path, quarters: Path, checkpoint: Path) -> None:
    """Images that are drawn and judged batch by batch are those of a sampling job, and leave nothing on disk."""
    b = npz(tmp_path / "b.npz", 30, 1)
    drawing = ["--model_path", checkpoint, "--num_samples", 10, "--batch_size", 4, "--seed", 3]
    judging = ["--reference", b, "--features", quarters]
    direct = run(tmp_path / "1", *drawing, *judging)
    assert {path.suffix for path in (tmp_path / "1").iterdir()} == {".json", ".csv"}
    assert direct["samples"]["drawing"]["seed"] == 3
    assert direct["samples"]["count"] == 10
    sample.main([str(word) for word in (*drawing, "--out_dir", tmp_path / "job")])
    assert values(run(tmp_path / "2", "--samples", tmp_path / "job", *judging)) == values(direct)
    kept = run(tmp_path / "3", *drawing, *judging, "--out_dir", tmp_path / "kept")
    assert values(kept) == values(direct)
    assert kept["samples"]["pixels"] == direct["samples"]["pixels"]
    assert (tmp_path / "kept" / "samples_10x8x8x3.npz").is_file()


@pytest.mark.slow
def test_two_processes_draw(tmp_path: Path, quarters: Path, checkpoint: Path) -> None:
    b = npz(tmp_path / "b.npz", 30, 1)
    flags = ["--model_path", checkpoint, "--num_samples", 10, "--batch_size", 3, "--reference", b]
    flags += ["--features", quarters, "--metrics", "fid,precision,is"]
    alone = run(tmp_path / "1", *flags)
    said = run_ranks(["-m", "fastdiff.evaluate", *map(str, [*flags, "--results_dir", tmp_path / "2"])])
    (file,) = (tmp_path / "2").glob("*.json")
    assert values(json.loads(file.read_text())) == values(alone)
    assert said.count("result in") == 1


@pytest.mark.slow
def test_one_process_says_what_is_not_used(tmp_path: Path, quarters: Path) -> None:
    a = npz(tmp_path / "a.npz", 12)
    flags = ["--samples", a, "--reference", a, "--features", quarters, "--results_dir", tmp_path / "out", "--seed", 3]
    assert run_ranks(["-m", "fastdiff.evaluate", *map(str, flags)]).count("not used, because") == 1


@pytest.mark.slow
def test_trained_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--train_features trains a classifier of the reference's classes once, and later commands use it."""
    images = np.load(npz(tmp_path / "a.npz", 24))["arr_0"]
    folder = tmp_path / "pictures"
    for i, image in enumerate(images):
        name = ("dark", "bright")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image // 4 + 150 * (i % 2)).save(folder / name / f"{i}.png")
    flags = ["--samples", tmp_path / "a.npz", "--reference", folder, "--train_features", tmp_path / "net" / "own.pt"]
    found = run(tmp_path / "out", *flags, "--metrics", "fid,is", "--splits", 2)
    assert list(found["scores"]) == ["fd[classifier own]", "is[classifier own]"]
    assert "training a classifier on 24 images" in capsys.readouterr().out
    run(tmp_path / "out", *flags)
    assert "training a classifier" not in capsys.readouterr().out


# --- bad input ---


def test_bad_input(tmp_path: Path, quarters: Path, broken: Path, checkpoint: Path) -> None:
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 12, 1, low=40)
    both = ["--samples", a, "--reference", b]
    for flags, what in (
        ([], "--samples is missing"),
        (["--samples", a], "--reference is missing, which fid needs"),
        ([*both, "--model_path", checkpoint], "--samples contradicts --model_path"),
        (["--samples", a, "--metrics", "is", "--reference_out", "s.npz"], "--reference_out needs the images of --ref"),
        ([*both, "--metrics", "fid,recal"], "'recal'; did you mean recall?"),
        ([*both, "--metrics", "FID"], "'FID'; did you mean fid?"),
        ([*both, "--metrics", ""], "--metrics: is empty"),
        ([*both, "--metrics", "kid"], "kid takes subsets of --kid_subset_size 1000, and so at least 1000 images"),
        ([*both, "--metrics", "is", "--splits", 13], "is takes --splits 13, and so at least 13 images"),
        ([*both, "--num_samples", 3, "--metrics", "recall"], "recall needs 3 neighbours of each image"),
        ([*both, "--num_samples", 1], "fid needs a covariance, and so at least 2 images"),
        ([*both, "--features", quarters, "--metrics", "sfid"], "sfid needs the spatial features of Inception"),
        ([*both, "--features", broken, "--metrics", "is"], "is needs logits, which broken.pt doesn't have"),
        ([*both, "--train_features", tmp_path / "c.pt"], "--reference: "),
        ([*both, "--train_features", tmp_path / "c.pt", "--features", quarters], "train_features contradicts features"),
        (["--samples", tmp_path / "none.npz", "--reference", b], "--samples: "),
        ([*both[:2], "--reference", tmp_path / "none"], "--reference: "),
        ([*both, "--resize", "0x5"], "--resize"),
        ([*both, "--resamplings", 1], "--resamplings: must be 0 or at least 2"),
        ([*both, "--results_dir", a], "--results_dir: "),
    ):
        given = [] if {"--features", "--train_features"} & set(map(str, flags)) else ["--features", quarters]
        said = refused(*given, *flags)
        assert what in said, (flags, said)
    np.savez(tmp_path / "black.npz", np.zeros((5, 8, 8, 3), np.uint8))
    said = refused("--samples", tmp_path / "black.npz", "--reference", b, "--features", broken)
    assert "the network's features of samples are not finite" in said


def test_flags_of_drawing_beside_given_images(
    tmp_path: Path, quarters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = npz(tmp_path / "a.npz", 12)
    run(tmp_path / "out", "--samples", a, "--reference", a, "--features", quarters, "--solver", "ddim", "--steps", 5)
    assert "not used, because the images are given: solver, steps" in capsys.readouterr().out


# --- files that are given and made ---


@pytest.mark.parametrize("metrics", ["precision,recall", "kid"])
def test_statistics_without_the_mean_of_fid(tmp_path: Path, quarters: Path, metrics: str) -> None:
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 14, 1)
    flags = ["--features", quarters]
    flags += ["--metrics", metrics, "--kid_subset_size", 10, "--results_dir", tmp_path / "out"]
    main("--reference", b, "--reference_out", tmp_path / "b_statistics.npz", *flags)
    direct = run(tmp_path / "out", "--samples", a, "--reference", b, *flags)
    again = run(tmp_path / "out", "--samples", a, "--reference", tmp_path / "b_statistics.npz", *flags)
    assert values(again) == values(direct)


def test_statistics_replace_nothing_that_is_compared(tmp_path: Path, quarters: Path) -> None:
    a, b = npz(tmp_path / "a.npz", 12, 0), npz(tmp_path / "b.npz", 14, 1)
    before = a.read_bytes(), b.read_bytes()
    flags = ["--samples", a, "--reference", b, "--features", quarters, "--reference_out"]
    assert refused(*flags, a).startswith("--reference_out names the file of --samples")
    assert refused(*flags, tmp_path / "." / "b.npz").startswith("--reference_out names the file of --reference")
    assert (a.read_bytes(), b.read_bytes()) == before
    assert refused(*flags, tmp_path) == f"--reference_out: {tmp_path} is a folder; name a file in it"
    assert refused(*flags, a / "b.npz").startswith(f"--reference_out: {a} can't be written to")
    assert "is needs no reference" in refused(*flags, tmp_path / "new.npz", "--metrics", "is")


def test_references_that_are_no_files_of_statistics(tmp_path: Path, quarters: Path) -> None:
    a = npz(tmp_path / "a.npz", 12, 0)
    os.mkfifo(tmp_path / "pipe")
    with zipfile.ZipFile(tmp_path / "names.zip", "w") as archive:
        archive.writestr("é.png", b"")
    (tmp_path / "names.zip").write_bytes((tmp_path / "names.zip").read_bytes().replace("é".encode(), b"\xff\xfe"))
    np.savez(tmp_path / "count.npz", mu=np.zeros(12), sigma=np.eye(12), count=-5)
    said = {
        name: refused("--samples", a, "--features", quarters, "--reference", tmp_path / name)
        for name in ("pipe", "names.zip", "count.npz")
    }
    assert all(sentence.startswith("--reference: ") for sentence in said.values())
    assert "neither a file nor a folder" in said["pipe"]
    assert "names.zip" in said["names.zip"]
    assert "(count is -5)" in said["count.npz"]


def test_odd_names(tmp_path: Path, quarters: Path) -> None:
    """Folders of pictures that are called like arrays, by names that are no UTF-8, or as long as names can be."""
    for name in ("x.npz", os.fsdecode(b"b\xff"), "n" * 250):
        pictures(tmp_path / name, [str(i) for i in range(6)])
        for _ in range(2):
            run(tmp_path / "out", "--samples", tmp_path / name, "--reference", tmp_path / name, "--features", quarters)
    assert len((tmp_path / "out" / "evaluations.csv").read_bytes().splitlines()) == 7


def test_full_disk(tmp_path: Path, quarters: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The scores are on the screen, and one sentence names the folder."""

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastdiff.evaluation.report.write_json", full)
    a = npz(tmp_path / "a.npz", 12, 0)
    flags = ["--samples", a, "--reference", a, "--features", quarters, "--results_dir", tmp_path / "out"]
    assert refused(*flags) == f"--results_dir: {tmp_path / 'out'} can't be written to (No space left on device)"
    assert "fd[quarters.pt] " in capfd.readouterr().out


def test_what_is_missing_is_said_first(tmp_path: Path, quarters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = npz(tmp_path / "a.npz", 12, 0)
    flags = ["--samples", a, "--reference", a]
    said = refused(*flags, "--train_features", tmp_path / "new.pt", "--feature_weights", "w.pth")
    assert "contradicts" in said
    assert (
        refused(*flags, "--train_features", tmp_path) == f"--train_features: {tmp_path} is a folder; name a file in it"
    )
    monkeypatch.setattr("fastdiff.evaluation.run.collect", None)  # no image is seen
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "need torch-fidelity" in refused(*flags, "--features", quarters, "--metrics", "kid", "--kid_subset_size", 5)
