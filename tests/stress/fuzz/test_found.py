"""Bugs that fuzzing found, each with a minimal input."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdiff.datasets import array_pickle
from helpers.tiny import info_for, pictures, unet
from pydantic import ValidationError

from fastdiff.config.checkpoint import open_checkpoint
from fastdiff.config.load import describe
from fastdiff.errors import UserError
from fastdiff.images.cache.build import pack
from fastdiff.images.cache.format import open_packed
from fastdiff.images.labels import index_images
from fastdiff.models import UNetSettings, weights
from fastdiff.runtime.files import read_json
from fastdiff.sampling.job.chunks import DamagedFile, Store
from fastdiff.sampling.job.manifest import Manifest
from fastdiff.training.checkpoints.manifest import find_damage
from fastdiff.training.reporting import Reporter
from fastdiff.training.settings import TrainSettings
from fuzz.arrays import npy, zipped
from fuzz.checkpoints import Calls, Sets, saved


def refused(data: bytes, folder: Path) -> str:
    file = folder / "model000001.pt"
    file.write_bytes(data)
    with pytest.raises(UserError, match="model000001.pt") as caught:
        weights.read_state_dict(file)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 60 + "1" + "}" * 60, '{"a": 1' + "0" * 5000 + "}", '{"a": 1, "a": 2}', '{"a": 1e999}'],
)
def test_json_that_readers_choke_on(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json"):
        read_json(tmp_path / "a.json")


def test_a_message_stays_on_one_short_line() -> None:
    message = str(UserError(f"a\nb\x1b[2J {'x' * 5000}"))
    assert message.startswith("a\\nb\\x1b[2J xxx")
    assert len(message) < 700


def test_flipped_bits_of_weights(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.zeros(1000)}))
    data[data.index(bytes(3000)) + 1500] ^= 4
    assert "checksum" in refused(bytes(data), tmp_path)


def test_compressed_parts(tmp_path: Path) -> None:
    source = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(9)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in refused(buffer.getvalue(), tmp_path)


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    assert "more bytes than the file has" in refused(saved({"a": torch.ones(1).expand(10**12)}), tmp_path)


def test_storages_said_to_be_longer_than_they_are(tmp_path: Path) -> None:
    """torch.load alone would read past the end of the memory that holds them."""
    source = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(200)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):  # K: a number of one byte, J: of four
                assert data.count(b"K\xc8") == 2
                data = data.replace(b"K\xc8", b"J" + (2**24).to_bytes(4, "little"))
            target.writestr(name, data)
    refused(buffer.getvalue(), tmp_path)


def test_loops_and_hidden_methods(tmp_path: Path) -> None:
    looped: list = []
    looped.append(looped)
    assert "nested" in refused(saved({"a": looped}), tmp_path)
    shadow = Sets(a=torch.ones(2))
    shadow.attributes = {"values": 1, "items": 2}
    (tmp_path / "model000002.pt").write_bytes(saved(shadow))
    assert list(weights.read_state_dict(tmp_path / "model000002.pt").items())[0][0] == "a"


def test_settings_of_a_file_that_no_machine_could_hold(tmp_path: Path) -> None:
    model = unet()
    for changes in (
        {"num_channels": 32 * 10**6},
        {"num_res_blocks": 10**9},
        {"class_cond": True, "num_classes": 10**12},
    ):
        settings = UNetSettings(**{**info_for(model)["model"], **changes})
        with pytest.raises(UserError, match="does not fit"):
            weights.check_fits(settings, model.state_dict(), tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["null", "[]", "{}", "[" * 5000, '{"kind": "unet", "model": 1, "diffusion": {}}', 7])
def test_settings_that_are_none(text: object, tmp_path: Path) -> None:
    carrier = OrderedDict(a=torch.ones(1))
    carrier._metadata = {"fastdiff": text}  # type: ignore[attr-defined]
    assert "settings in" in refused(saved(carrier), tmp_path)


def test_contradicting_settings_name_their_file(tmp_path: Path) -> None:
    info = info_for(unet())
    info["model"]["num_heads"] = 3
    (tmp_path / "model000003.pt").write_bytes(saved(weights.with_info(unet().state_dict(), info)))
    with pytest.raises(UserError, match="model000003.pt: num_heads 3"):
        describe(open_checkpoint(str(tmp_path / "model000003.pt")))


def test_nan_weights(tmp_path: Path) -> None:
    model = unet()
    state = {**model.state_dict(), "out.2.bias": torch.full((3,), float("nan"))}
    with pytest.raises(UserError, match="out.2.bias .* not finite"):
        weights.load_into(model, state, tmp_path / "a.pt")


def test_names_too_long_for_the_system() -> None:
    with pytest.raises(UserError, match="can't be opened"):
        weights.find("x" * 5000)


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_that_become_memory(legacy: bool, tmp_path: Path) -> None:
    """torch.load would allocate 2 GB and raise no error."""
    data = saved({"a": torch.ones(1), "b": Calls(bytearray, 2_000_000_000)}, _use_new_zipfile_serialization=not legacy)
    assert "bytearray" in refused(data, tmp_path)


def test_all_kinds_of_tensors_pass(tmp_path: Path) -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.uint16, torch.bool]
    content = {str(kind): torch.ones(2, dtype=kind) for kind in kinds}
    content |= {"p": torch.nn.Parameter(torch.ones(2)), "size": torch.Size([1]), "kind": torch.float16, "text": "a"}
    (tmp_path / "a.pt").write_bytes(saved(content))
    assert list(weights.read(tmp_path / "a.pt")) == list(content)


DEEP = "[" * 100_000


def test_files_of_a_run_that_are_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "manifest.json").write_text(DEEP)
    assert "it is no manifest" in find_damage(tmp_path / "step_000001")
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(UserError, match="config.json: is nested too deeply"):
        read_json(tmp_path / "config.json")


def test_tables_that_are_none(tmp_path: Path) -> None:
    table = tmp_path / "progress.csv"
    table.write_text("step,loss\n1," + "9" * 200_000 + "\n")
    with pytest.raises(UserError, match="progress.csv is no table of a run"):
        Reporter(tmp_path, 3, 1)
    table.write_text("step,loss\n" + "1" * 5000 + ",2\n")  # left out
    with Reporter(tmp_path, 3, 1) as reporter:
        reporter.write(2, 3, {"loss": 1.0}, 0.0)
    assert table.read_text().split() == ["step,loss", "2,1"]


@pytest.mark.parametrize("text", ["a\0b", "a\ud800"])
def test_text_of_which_no_name_can_be_made(text: str) -> None:
    with pytest.raises(ValidationError, match="must be text without NUL"):
        TrainSettings(run_dir=text)


JOB: Manifest = {"identity": {}, "shape": [8, 8, 3], "labelled": False, "seed": 0, "part_size": 5}


def test_a_part_that_unpacks_to_more_than_its_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    file = tmp_path / "parts" / "000000000-000020000.npz"
    np.savez_compressed(file, images=np.zeros((20_000, 8, 8, 3), np.uint8), job=np.array("a"))
    with pytest.raises(DamagedFile, match="would unpack to"):
        list(Store(tmp_path, JOB, 20_000).images())


def test_a_part_whose_header_promises_terabytes(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    file = tmp_path / "parts" / "000000000-000000005.npz"
    file.write_bytes(zipped({"images": npy((10**12, 8, 8, 3)), "job": npy((), "<U1", b"a\0\0\0")}))
    with pytest.raises(DamagedFile, match="header"):
        list(Store(tmp_path, JOB, 5).images())


@pytest.mark.parametrize("damaged", [b"\x93NUMPY\x01\0\x10\0" + b"(" * 16, npy((0, 8, 8, 3))])
def test_packed_pixels_with_a_broken_header(damaged: bytes, tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a", "b"])
    pack(index_images(tmp_path / "images"), (8, 8), 3, tmp_path / "packed", workers=1)
    (tmp_path / "packed" / "pixels.npy").write_bytes(damaged)
    with pytest.raises(UserError, match="pixels.npy"):
        open_packed(tmp_path / "packed", (8, 8), 3)


def test_packed_names_that_are_none(tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a", "b"])
    pack(index_images(tmp_path / "images"), (8, 8), 3, tmp_path / "packed", workers=1)
    for text in ("5", "[5]", '["\\ud800"]', "{}"):
        (tmp_path / "packed" / "names.json").write_text(text)
        with pytest.raises(UserError, match="names.json"):
            open_packed(tmp_path / "packed", (8, 8), 3).listing()


def test_pickles_that_ask_for_memory() -> None:
    read = array_pickle.read
    with pytest.raises(UserError, match="batch_1"):
        read(b"\x80\x02]r\xff\xff\xff\x7f.", "batch_1")  # memo index 2 billion: 16 GB in the C unpickler
    with pytest.raises(UserError, match="batch_1"):
        read(b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".", "batch_1")  # 8 GB of zeros
    text, copy = b"X\x10\x27\0\0" + b"a" * 10_000, b"h\0h\1U\6latin1\x86Ra"
    with pytest.raises(UserError, match="more bytes than the file has"):
        read(b"\x80\x02c_codecs\nencode\nq\x000" + text + b"q\x010]" + copy * 99 + b".", "batch_1")
    whole = pickle.dumps({b"data": np.arange(9, dtype=np.uint8)}, 2)
    np.testing.assert_array_equal(read(whole, "batch_1")["data"], np.arange(9))
