"""cifar10.py extracts the official archive, continues where it stopped, and refuses damaged or malicious files."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.preparation_scripts import call_script, fail, images, last_line, only_line, pixels, run_script, succeed

from fastdiff.images.labels import index_images
from fastdiff.runtime.files import ProcessId

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PER_BATCH = 20


class Python2Pickler(pickle._Pickler):
    """Writes like Python 2's cPickle: text and bytes both as byte strings, numpy under its old module name."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def save_byte_string(self, value: str | bytes) -> None:
        data = value.encode("ascii") if isinstance(value, str) else value
        short = len(data) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) if short else b"T" + len(data).to_bytes(4, "little"))
        self.write(data)

    def save_global(self, value: object, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{value.__qualname__}\n".encode())

    dispatch[str] = dispatch[bytes] = save_byte_string
    dispatch[type] = dispatch[type(len)] = dispatch[type(lambda: 0)] = save_global


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(value)
    return file.getvalue()


def batch_arrays(position: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(position)
    data = generator.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
    return data, generator.integers(0, 10, PER_BATCH).tolist()


def archive_files(pickled=python2_pickle) -> dict[str, bytes]:
    meta = {"num_cases_per_batch": PER_BATCH, "label_names": NAMES, "num_vis": 3072}
    files = {"batches.meta": pickled(meta)}
    for position, name in enumerate(BATCHES):
        data, labels = batch_arrays(position)
        filenames = [f"{i}.png" for i in range(PER_BATCH)]
        files[name] = pickled({"batch_label": name, "labels": labels, "data": data, "filenames": filenames})
    return files


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("cifar") / "cifar-10-python.tar.gz", archive_files())


def assert_whole(out: Path) -> None:
    for split, positions in {"train": range(5), "test": [5]}.items():
        folder = out / f"cifar_{split}"
        data, labels = zip(*map(batch_arrays, positions), strict=True)
        expected = np.concatenate(data).reshape(-1, 3, 32, 32)
        names = {f"{NAMES[label]}_{number:05d}.png": number for number, label in enumerate(sum(labels, []))}
        assert images(folder) == sorted(names)
        for name, number in names.items():
            np.testing.assert_array_equal(pixels(folder / name).transpose(2, 0, 1), expected[number])


def test_fake_archive_has_the_official_form():
    files = archive_files()
    data, labels = batch_arrays(0)
    loaded = pickle.loads(files["data_batch_1"], encoding="bytes")
    np.testing.assert_array_equal(loaded[b"data"], data)
    assert loaded[b"labels"] == labels
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in files["data_batch_1"]
    assert files["data_batch_1"].startswith(b"\x80\x02}")


def test_archive(archive: Path, tmp_path: Path):
    last = last_line(run_script("cifar10.py", "--archive", archive, "--out", tmp_path, "--workers", 2))
    assert_whole(tmp_path)
    assert last == (
        f"100 images of 10 classes in {tmp_path}/cifar_train; to train on them: deepspeed fastdiff/train.py "
        f"--data_dir {tmp_path}/cifar_train --image_size 32 --class_cond True --num_classes 10"
    )
    assert index_images(tmp_path / "cifar_train", "auto").class_names == NAMES


def test_extracted_folder_and_python3_pickles(tmp_path: Path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in archive_files(lambda value: pickle.dumps(value, protocol=2)).items():
        (folder / name).write_bytes(data)
    succeed("cifar10.py", "--archive", tmp_path, "--out", tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_restart_keeps_whole_files_and_makes_the_missing_ones(archive: Path, tmp_path: Path):
    succeed("cifar10.py", "--archive", archive, "--out", tmp_path)
    folder = tmp_path / "cifar_train"
    kept, deleted, emptied, *_ = images(folder)
    before = (folder / kept).stat().st_mtime_ns
    (folder / deleted).unlink()
    left = folder / f".{deleted}.{ProcessId.own()._replace(started=1).tag}.partial"  # of an ended process
    left.write_bytes(b"half a fi")
    (folder / emptied).write_bytes(b"")
    last = succeed("cifar10.py", "--archive", archive, "--out", tmp_path)
    assert "(98 were there already)" in last
    assert not left.exists()
    assert_whole(tmp_path)
    assert (folder / kept).stat().st_mtime_ns == before


def test_another_archive_is_refused(archive: Path, tmp_path: Path):
    succeed("cifar10.py", "--archive", archive, "--out", tmp_path)
    files = archive_files()
    files["data_batch_1"] = files["data_batch_2"]
    other = write_archive(tmp_path / "other.tar.gz", files)
    assert "was begun with another archive" in fail("cifar10.py", "--archive", other, "--out", tmp_path)


class Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_1", "test_batch"])
def test_malicious_pickle_is_refused_and_not_run(file: str, tmp_path: Path):
    witness = tmp_path / "witness"
    files = archive_files() | {file: pickle.dumps({b"data": Command(f"touch {witness}")}, protocol=2)}
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", files)
    line = only_line(run_script("cifar10.py", "--archive", archive, "--out", tmp_path / "out"))
    assert "not safe to read" in line
    assert file in line
    assert "posix.system" in line
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


DAMAGED = {
    "no labels": (python2_pickle({"data": batch_arrays(0)[0]}), "one label"),
    "label too large": (python2_pickle({"data": batch_arrays(0)[0], "labels": [10] * PER_BATCH}), "one label"),
    "wrong width": (python2_pickle({"data": np.zeros((2, 100), np.uint8), "labels": [0, 0]}), "3072 bytes"),
    "wrong type": (python2_pickle({"data": np.zeros((1, 3072), np.float32), "labels": [0]}), "damaged"),
    "cut": (archive_files()["data_batch_1"][:5000], "damaged"),
    "not a pickle": (b"\x00\x01\x02", "damaged"),
    "empty": (b"", "damaged"),
    "not a dictionary": (python2_pickle([1, 2]), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_batch(case: str, tmp_path: Path):
    data, expected = DAMAGED[case]
    for name, content in (archive_files() | {"data_batch_1": data}).items():
        (tmp_path / name).write_bytes(content)
    line = fail("cifar10.py", "--archive", tmp_path, "--out", tmp_path / "out")
    assert "data_batch_1" in line
    assert expected in line


def test_bad_archives(archive: Path, tmp_path: Path):
    out = ["--out", tmp_path / "out"]
    assert "No such file" in fail("cifar10.py", "--archive", tmp_path / "absent.tar.gz", *out)

    text = tmp_path / "text.tar.gz"
    text.write_text("not an archive")
    assert "no tar archive" in fail("cifar10.py", "--archive", text, *out)

    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert "truncated" in fail("cifar10.py", "--archive", cut, *out)

    binary = write_archive(tmp_path / "binary.tar.gz", {"data_batch_1.bin": b"1"})
    assert "lacks batches.meta" in fail("cifar10.py", "--archive", binary, *out)


def test_unwritable_or_foreign_out(archive: Path, tmp_path: Path):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    assert "can't write to" in fail("cifar10.py", "--archive", archive, "--out", blocked)
    (tmp_path / "cifar_train").mkdir()
    (tmp_path / "cifar_train" / "mine.png").write_text("")
    assert "is not empty" in fail("cifar10.py", "--archive", archive, "--out", tmp_path)


def test_flags():
    assert "--archive" in fail("cifar10.py", "--out", "x")
    done = run_script("cifar10.py", "--archive", "x", "--out", "x", "--workers", 0)
    assert "at least 1" in only_line(done)
    help_text = call_script("cifar10.py", "--help")
    assert help_text.returncode == 0
    assert "--archive" in help_text.stdout
    assert "--workers" in help_text.stdout
