"""info.py says what a file or folder is, suggests a command that works, and refuses what it doesn't know.

The file has a test for each kind of file and folder, hence its length.
"""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastdiff.datasets import pack
from helpers import ROOT, tiny
from helpers.pictures_folder import make_pictures
from PIL import Image
from safetensors.torch import save_file

from fastdiff import convert, info, sample, super_res_sample, train
from fastdiff.errors import UserError
from fastdiff.evaluation.classifier import Classifier, write_classifier
from fastdiff.evaluation.report import write_result
from fastdiff.inspection.find import find
from fastdiff.inspection.networks import KINDS
from fastdiff.models import UNetSettings
from fastdiff.training.checkpoints.resume import write_status

Make = Callable[[Path], Path]


def described(path: Path | str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What --json prints, and an assertion that the text holds the same."""
    info.main([str(path)])
    text = " ".join(capsys.readouterr().out.split())
    info.main(["--json", str(path)])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert f"kind {content['kind']} " in text + " "
    assert content.get("next", "") in text
    for note in content.get("notes", []):
        assert f"note {' '.join(note.split())}" in text
    return content


def words_of(content: dict[str, Any], **fill: object) -> list[str]:
    """The flags of the suggested command, with words in capitals replaced."""
    program, _, *words = shlex.split(content["next"])
    assert program == "fastdiff"
    return [str(fill.get(word, word)) for word in words]


def unet_file(folder: Path, **settings: Any) -> Path:
    model = tiny.unet(**settings)
    return tiny.save(model, folder / "ema_0.9999_000012.pt", ["ape", "bee"])


# --- networks ---


def test_every_kind_of_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = unet_file(tmp_path, class_cond=True, num_classes=2)
    with tiny.nothing_written(tmp_path):
        found = described(file, capsys)
    count = sum(parameter.numel() for parameter in tiny.unet(class_cond=True, num_classes=2).parameters())
    expected = {"kind": "checkpoint of a UNet", "weights": "average of rate 0.9999", "step": 12, "parameters": count}
    expected |= {"dtype": ["float32"], "images": "8x8x3", "classes": 2, "class_names": ["ape", "bee"]}
    assert {name: found[name] for name in expected} == expected
    assert found["bytes"] == file.stat().st_size
    assert found["settings"]["model"] == UNetSettings(**tiny.MODEL, class_cond=True, num_classes=2).model_dump(
        mode="json"
    )
    assert set(found["differing"]["model"]) == {*tiny.MODEL, "class_cond", "num_classes"}
    assert found["differing"]["diffusion"] == list(tiny.DIFFUSION)
    sample.main([*words_of(found), "--num_samples", "1", "--steps", "2", "--out_dir", str(tmp_path / "out")])


def test_super_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.super_res()
    file = tiny.save(model, tmp_path / "model000003.pt")
    found = described(file, capsys)
    assert (found["kind"], found["weights"]) == ("checkpoint of a super-resolution UNet", "model")
    assert (found["images"], found["enlarged_from"]) == ("16x16x3", 8)
    small = make_pictures(tmp_path / "small", 2)
    super_res_sample.main([*words_of(found, SMALL_IMAGES=small), "--out_dir", str(tmp_path / "out")])


def test_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.classifier()
    file = tiny.save(model, tmp_path / "model000003.pt")
    bare = tmp_path / "bare.pt"
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, bare)
    for place, origin in ((file, "the file"), (bare, "the shapes of the weights")):
        found = described(place, capsys)
        assert (found["kind"], found["settings_from"]) == ("checkpoint of a classifier", origin)
        assert found["classes"] == tiny.CLASSIFIER["num_classes"]
        assert found["settings"]["model"]["classifier_width"] == 64
    words = words_of(described(file, capsys), MODEL=unet_file(tmp_path / "other"))
    sample.main([*words, "--num_samples", "1", "--steps", "2", "--out_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["cifar10_uncond_50M_500K.pt", "other.pt", "other.safetensors"])
def test_files_without_settings(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {} if name.startswith("other") else {"num_res_blocks": 3}
    model = tiny.unet(image_size=32, channel_mult="1,2,2,2", attention_resolutions="16,8", **settings)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    file = tmp_path / name
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    if not name.startswith("other"):  # the preset by its name has other shapes
        with pytest.raises(UserError, match="does not fit the model"):
            find(str(file))
        return
    found = described(file, capsys)
    assert found["settings_from"] == "the shapes of the weights"
    assert "carries no settings; taken at their defaults" in found["notes"][0]
    assert found["settings"]["model"]["num_channels"] == 32


def test_not_finite(tmp_path: Path) -> None:
    model = tiny.unet()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    found = find(str(tiny.save(model, tmp_path / "model000001.pt")))
    assert "not finite" in found.notes[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("a run")
    flags = tiny.flags({**tiny.MODEL, **tiny.DIFFUSION, "class_cond": True, "num_classes": 3, "lr": 1e-3})
    more = tiny.flags({"batch_size": 4, "loader": "pillow", "compile": False, "save_interval": 2, "max_steps": 4})
    data = make_pictures(folder / "data")
    train.main([*flags, *more, "--data_dir", str(data), "--run_dir", str(folder / "run")])
    return folder / "run"


@pytest.mark.parametrize("inside", ["", "checkpoints", "config.json", "status.json", "progress.csv", "log.txt"])
def test_run(inside: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny.nothing_written(run):
        found = described(run / inside, capsys)
    expected = {"path": str(run), "kind": "run of a UNet", "state": "done", "step": 4, "checkpoints": [2, 4]}
    expected |= {"class_names": ["class0", "class1", "class2"], "images": "8x8x3"}
    assert {name: found[name] for name in expected} == expected
    assert found["differing"]["train"] == [
        "run_dir",
        "max_steps",
        "batch_size",
        "microbatch",
        *found["differing"]["train"][4:],
    ]
    assert words_of(found)[:2] == ["--model_path", str(run)]


@pytest.mark.parametrize("state", ["interrupted", "preempted", "failed"])
def test_stopped_run_resumes_by_the_suggested_command(
    state: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = (run / "status.json").read_text()
    write_status(run, state, 4, 130, "a reason")
    found = described(run, capsys)
    assert (found["state"], found["reason"]) == (state, "a reason")
    train.main(words_of(found))
    assert f"resuming from {run / 'checkpoints' / 'step_000004'} at step 4" in capsys.readouterr().out
    (run / "status.json").write_text(status)


def test_running(run: Path) -> None:
    status = (run / "status.json").read_text()
    write_status(run, "running", 4)
    found = find(str(run))
    (run / "status.json").write_text(status)
    assert found.facts["process"].startswith("process ")
    assert "resumes it" in found.notes[-1]


def test_step_and_folder_of_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(run / "checkpoints" / "step_000002", capsys)
    assert (found["kind"], found["step"]) == ("checkpoint folder of a UNet", 2)
    assert found["files"] == ["ema_0.9999_000002.pt", "model000002.pt", "opt000002.pt", "state.pt"]
    found = described(run.parent, capsys)
    assert (found["kind"], found["runs"]) == ("folder of runs", {"run": {"state": "done", "step": 4}})
    assert words_of(found) == [str(run)]


def test_damaged_step(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run / "checkpoints" / "step_000002" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    found = described(state.parent, capsys)
    state.write_bytes(whole)
    assert found["notes"] == [f"the folder is damaged: state.pt has {len(whole) - 1} bytes, not {len(whole)}"]


@pytest.mark.parametrize("name", ["opt000004.pt", "state.pt"])
def test_states_of_training(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(run / "checkpoints" / "step_000004" / name, capsys)
    assert found["kind"] == "not a network of fastdiff"
    assert "give the model or ema .pt file beside it" in found["about"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.json"))])
def test_configurations_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find(name)
    kind = KINDS["super_res" if "upsample" in name else "classifier" if "classifier" in name else "unet"]
    assert found.kind == f"configuration of a {kind.name}"
    assert type(found.settings["model"]) is kind.config.model_fields["model"].annotation
    if name != "demo":
        assert found.next == f"fastdiff {kind.train} --config {name} --data_dir IMAGES"


def test_configuration_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"family": "guided", "model": {"image_size": 32}}')
    found = described(tmp_path / "mine.json", capsys)
    assert found["differing"]["diffusion"] == ["rescale_timesteps", "rescale_learned_sigmas"]
    assert {"image_size", "scale_stem"} == set(found["differing"]["model"])
    assert words_of(found) == ["--config", str(tmp_path / "mine.json"), "--data_dir", "IMAGES"]
    (tmp_path / "classifier.json").write_text('{"model": {"classifier_depth": 1}}')  # of guided-diffusion anyway
    of_classifier = described(tmp_path / "classifier.json", capsys)
    assert of_classifier["differing"]["diffusion"] == found["differing"]["diffusion"]


def test_names_of_released_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A released file's name gives its settings to a network of its kind, which must fit, and to no other network."""
    unet = tiny.save_bare(tiny.unet(), tmp_path / "64x64_classifier.pt")
    assert described(unet, capsys)["settings_from"] == "the shapes of the weights"
    small = tiny.save_bare(tiny.classifier(), tmp_path / "256x256_classifier.pt")
    assert "does not fit the model: it was trained with --classifier_width 64" in tiny.refusal(info.main, [small])


# Keys of other programs' networks, and the words that name these.
FOREIGN = {
    "down_blocks.0.resnets.0.conv1.weight": "a network of diffusers",
    "model.map_layer0.weight": "a network of EDM",
    "first_stage_model.encoder.weight": "a latent diffusion model, such as Stable Diffusion",
}


@pytest.mark.parametrize(("key", "name"), FOREIGN.items())
def test_other_programs_files(key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({key: torch.zeros(4)}, tmp_path / "file.pt")
    found = described(tmp_path / "file.pt", capsys)
    assert found["kind"] == "not a network of fastdiff"
    assert found["about"].startswith(f"holds {name}; ")


def test_other_programs_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture beside the weights makes no folder of images of it."""
    (tmp_path / "model_index.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    found = described(tmp_path, capsys)
    assert found["about"].startswith("a folder of diffusers")
    assert words_of(found) == ["--model_path", str(tmp_path), "--to", "pt", "--out", "FILE.pt"]


def test_converted_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    convert.main(["--model_path", str(unet_file(tmp_path)), "--to", "safetensors", str(out)])
    capsys.readouterr()
    for place in (out, out / "model.safetensors"):
        found = described(place, capsys)
        assert (found["settings_from"], found["class_names"]) == ("the file", ["ape", "bee"])
        assert words_of(found)[:2] == ["--model_path", str(place)]
    assert described(out, capsys)["converted_from"] == "ema_0.9999_000012.pt"


def test_folder_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet_file(tmp_path).rename(tmp_path / "mine.pt")
    found = described(tmp_path, capsys)
    assert (found["kind"], found["files"]) == ("folder of weights", ["mine.pt"])
    assert words_of(found) == [str(tmp_path / "mine.pt")]


# --- images ---


def test_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_pictures(tmp_path / "some images", 120)
    with tiny.nothing_written(tmp_path):
        found = described(folder, capsys)
    expected = {"kind": "folder of images", "count": 120, "classes": 3, "images": "8x8x3", "labels_from": "prefixes"}
    assert {name: found[name] for name in expected} == expected
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert abs(found["bytes"] / sum(sizes) - 1) < 0.05
    train.main([*words_of(found), "--num_channels", "32", "--batch_size", "2", "--dry_run", "--loader", "pillow"])


@pytest.mark.parametrize(("size", "wanted"), [(64, "train"), (28, "train"), (100, "prepare")])
def test_command_for_images(size: int, wanted: str, tmp_path: Path) -> None:
    found = find(str(make_pictures(tmp_path / "gray", 4, size, mode="L")))
    assert found.facts["images"] == f"{size}x{size}x1"
    assert shlex.split(found.next)[1] == wanted
    assert ("--in_channels" in found.next) == (wanted == "train")


def test_images_of_several_sizes(tmp_path: Path) -> None:
    make_pictures(tmp_path / "all" / "a", 2, 100)
    make_pictures(tmp_path / "all" / "b", 2, 32)
    found = find(str(tmp_path / "all"))
    assert found.facts["images"] == "32x32 to 100x100, of several sizes"
    assert found.next == f"fastdiff prepare folder --source {tmp_path}/all --out {tmp_path}/all_64 --size 64"


def test_packed_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_pictures(tmp_path / "data", 5)
    argv = ["pack.py", "--data_dir", str(data), "--size", "8", "--out", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr("sys.argv", argv)
    pack.main()
    capsys.readouterr()
    for place in (tmp_path / "out", tmp_path / "out" / "packed.json"):
        found = described(place, capsys)
        expected = {
            "kind": "packed images",
            "count": 5,
            "images": "8x8x3",
            "class_names": ["class0", "class1", "class2"],
        }
        assert {name: found[name] for name in expected} == expected
        assert words_of(found)[:4] == ["--data_dir", str(tmp_path / "out"), "--image_size", "8"]


def test_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = unet_file(tmp_path)
    out = tmp_path / "job"
    sample.main(["--model_path", str(model), "--num_samples", "3", "--batch_size", "2", "--out_dir", str(out)])
    capsys.readouterr()
    with tiny.nothing_written(out):
        found = described(out, capsys)
    expected = {"kind": "sampling job", "state": "done", "drawn": 3, "images": "8x8x3", "seed": 0}
    assert {name: found[name] for name in expected} == expected
    assert found["drawn_with"]["solver"] == "ddpm"
    assert found["settings"]["model"] == UNetSettings(**tiny.MODEL).model_dump(mode="json")
    samples = described(out / "samples_3x8x8x3.npz", capsys)
    expected = {"kind": "samples", "count": 3, "images": "8x8x3", "seed": 0}
    assert {name: samples[name] for name in expected} == expected
    assert words_of(samples) == ["--samples", str(out / "samples_3x8x8x3.npz"), "--reference", "REFERENCE"]
    (out / "samples_3x8x8x3.npz").unlink()
    unfinished = described(out, capsys)
    assert (unfinished["state"], unfinished.get("next")) == ("unfinished", None)


def test_samples_with_classes(tmp_path: Path) -> None:
    names = np.array(["ape", "bee", "cat"])
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((2, 4, 6, 3), np.uint8), arr_1=np.array([2, 0]), class_names=names)
    facts = find(str(tmp_path / "s.npz")).facts
    assert (facts["count"], facts["images"], facts["class_names"]) == (2, "4x6x3", ["ape", "cat"])


def test_zip_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = sorted(make_pictures(tmp_path / "data", 4).iterdir())
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in pictures:
            archive.write(path, path.name)
    found = described(tmp_path / "data.zip", capsys)
    assert (found["kind"], found["count"], found["images"]) == ("zip of images", 4, "8x8x3")
    assert described(pictures[0], capsys)["images"] == "8x8x3"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("lmdb/data.mdb", "prepare lsun --lmdb {}"),
        ("cifar/data_batch_1", "prepare cifar10 --archive {}"),
        ("cifar-10-python.tar.gz", "prepare cifar10 --archive {}"),
        ("ILSVRC2012_img_train.tar", "prepare imagenet64 --source {}"),
    ],
)
def test_data_sets_to_prepare(name: str, command: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\x1f\x8b" + bytes(600) if "." in file.name[-4:] else bytes(600))
    place = file if file.parent == tmp_path else file.parent
    assert find(str(place)).next == f"fastdiff {command.format(place)} --out FOLDER"


# --- scores ---


def a_result() -> dict[str, Any]:
    return {
        "scores": {"fid": {"value": 3.25, "spread": 0.125}},
        "notes": ["few samples"],
        "samples": {"path": "drawn", "count": 100},
        "reference": {"path": "real.npz", "count": 200},
        "features": {"network": "inception-v3-compat", "precision": "fp32"},
        "protocol": {},
        "command": "fastdiff/evaluate.py --samples drawn --reference 'real images.npz'",
        "time": "2026-01-01T00:00:00",
    }


def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_result(tmp_path, a_result())
    found = described(file, capsys)
    expected = {"kind": "result of an evaluation", "scores": {"fid": "3.25 ± 0.12"}, "samples": "drawn"}
    assert {name: found[name] for name in expected} == expected
    assert words_of(found) == ["--samples", "drawn", "--reference", "real images.npz"]
    folder = described(tmp_path, capsys)
    assert (folder["kind"], folder["results"]) == ("folder of evaluations", {file.name: {"fid": "3.25 ± 0.12"}})
    file.write_text(json.dumps({**a_result(), "scores": {"fid": 1}}))
    with pytest.raises(UserError, match="is damaged: it lacks an entry"):
        find(str(file))


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"solver": "ddim", "steps": 5, "spacing": "uniform", "guidance": 1, "scores": a_result()["scores"]}
    result = a_result()
    more = {"model": "net.pt", "metrics": ["fid"], "num_samples": 100, "rows": [row]}
    content = {name: result[name] for name in ("reference", "features", "protocol")} | more
    (tmp_path / "curves.json").write_text(json.dumps(content))
    found = described(tmp_path / "curves.json", capsys)
    assert (found["kind"], found["rows"]) == ("curves of an evaluation", {"ddim 5 uniform": {"fid": "3.25 ± 0.12"}})
    (tmp_path / "curves.json").write_text(json.dumps({**content, "rows": [{}]}))
    with pytest.raises(UserError, match="is damaged: it lacks an entry of curves"):
        find(str(tmp_path / "curves.json"))


def test_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.dumps({"network": "inception-v3-compat", "size": "8x8x3", "made_of": "real"})
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "ours.npz", **moments, count=np.array(7), about=np.array(about))
    found = described(tmp_path / "ours.npz", capsys)
    expected = {"kind": "statistics of images", "count": 7, "images": "8x8x3", "network": "inception-v3-compat"}
    assert {name: found[name] for name in expected} == expected
    assert found["arrays"] == {"mu": "4", "sigma": "4x4"}
    np.savez(tmp_path / "batch.npz", **moments, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    found = described(tmp_path / "batch.npz", capsys)
    assert (found["kind"], found["images"]) == ("statistics of images, and images", "4x4x3")


def test_network_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(Classifier(1, (16, 24), 10), tmp_path / "net.pt")
    found = described(tmp_path / "net.pt", capsys)
    assert (found["kind"], found["images"], found["classes"]) == ("network of features", "16x24x1", 10)
    assert words_of(found)[-2:] == ["--features", str(tmp_path / "net.pt")]


def test_terms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "vb_terms.npz", np.array([1.0, 0.5]))
    for place in (tmp_path, tmp_path / "vb_terms.npz"):
        found = described(place, capsys)
        assert (found["kind"], found["timesteps"], found["sum"]) == ("terms per timestep of a score", 2, "1.5")


# --- wrong input ---


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def texts(folder: Path) -> Path:
    (folder / "notes.txt").write_text("a note")
    return folder


def cut(folder: Path) -> Path:
    file = unet_file(folder)
    file.write_bytes(file.read_bytes()[:5000])
    return file


def unknown_network(folder: Path) -> Path:
    torch.save({"layer.weight": torch.zeros(3)}, folder / "x.pt")
    return folder / "x.pt"


def code(folder: Path) -> Path:
    torch.save({"a": tiny.RunsCode(folder / "ran")}, folder / "x.pt")
    return folder / "x.pt"


def file_of(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def objects(folder: Path) -> Path:
    np.savez(folder / "x.npz", arr_0=np.array([{}], dtype=object))
    return folder / "x.npz"


def numbers(folder: Path) -> Path:
    np.savez(folder / "x.npz", a=np.zeros(3), b=np.zeros(2))
    return folder / "x.npz"


def damaged_job(folder: Path) -> Path:
    fake = folder / "job"
    fake.mkdir()
    (fake / "job.json").write_text('{"identity": {}, "shape": [4, 4, 3], "part_size": 0}')
    return fake


def damaged_run(folder: Path) -> Path:
    (folder / "config.json").write_text('{"kind": "other", "model": {}, "diffusion": {}, "train": {}}')
    return folder


WRONG: dict[str, tuple[Make, str]] = {
    "missing": (lambda folder: folder / "nothing", "does not exist"),
    "empty folder": (empty, "is an empty folder"),
    "text files": (texts, "is none of fastdiff's folders .*, and the image folder .* holds no images"),
    "text": (file_of("notes.txt", b"a note"), "is a text file, and nothing that fastdiff knows"),
    "empty file": (file_of("x.pt", b""), "is not a checkpoint, or is damaged: it is empty"),
    "noise": (file_of("x.pt", bytes(range(128, 256)) * 9), "is not a checkpoint, or is damaged"),
    "truncated": (cut, "the zip is incomplete; copy or download it again"),
    "unknown network": (unknown_network, "can't be used: it has no input_blocks"),
    "code": (code, "holds Python objects .* that would run code"),
    "objects": (objects, "arr_0 holds Python objects"),
    "numbers": (numbers, "is an .npz of arrays \\(a, b\\), but holds neither images nor statistics"),
    "picture": (file_of("x.png", b"\x89PNG\r\n\x1a\n" + bytes(99)), "is a picture that can't be read"),
    "truncated npz": (file_of("x.npz", b"PK\x03\x04 and no more"), "is no .npz of arrays, or is damaged"),
    "other JSON": (file_of("x.json", b'{"a": 1}'), "is a JSON file, but neither a configuration nor the result"),
    "wrong JSON": (file_of("x.json", b"{"), "is not JSON"),
    "wrong setting": (file_of("x.json", b'{"model": {"image_size": "x"}}'), "x.json: model.image_size: a size is"),
    "section that is none": (file_of("x.json", b'{"model": 3}'), "section model must be a JSON object, not 3"),
    "endless network": (
        file_of("x.json", b'{"model": {"num_res_blocks": 99999999999}}'),
        "no network has 99999999999 residual blocks per level",
    ),
    "vast network": (
        file_of("x.json", b'{"model": {"num_channels": 3200000000000}}'),
        "no network of its settings can be built",
    ),
    "damaged job": (damaged_job, "job.json is damaged: it has no part_size"),
    "damaged run": (
        damaged_run,
        "config.json is of the kind 'other', which info doesn't know; it knows unet, super_res",
    ),
    "archive": (file_of("x.tar.gz", b"\x1f\x8b" + bytes(99)), "is compressed by gzip; unpack it"),
}


@pytest.mark.parametrize(("make", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input(make: Make, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = make(tmp_path)
    with tiny.nothing_written(tmp_path), pytest.raises(UserError, match=sentence):
        info.main(["--json", str(place)])
    assert capsys.readouterr().out == ""


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="can't be read \\(Permission denied\\)"):
        find(str(tmp_path))


def test_the_others_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = unet_file(tmp_path)
    with pytest.raises(UserError, match="no_2 does not exist"):
        info.main(["no_1", str(file), "no_2"])
    printed = capsys.readouterr()
    assert "checkpoint of a UNet" in printed.out
    assert "no_1 does not exist" in printed.err


def test_no_path() -> None:
    with pytest.raises(UserError, match="name a file or a folder"):
        info.main([])
    with pytest.raises(UserError, match="unrecognized arguments: --jsn"):
        info.main(["--jsn", "x"])


def test_all_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = unet_file(tmp_path)
    info.main([str(file)])
    assert "num_heads 4" not in capsys.readouterr().out
    info.main(["--all", str(file)])
    text = " ".join(capsys.readouterr().out.split())
    changed, rest = text.split("at their defaults: ", 1)
    assert "num_channels 32" in changed
    assert "num_heads 4" in rest
