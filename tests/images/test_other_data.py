"""What is given as a folder of images and is none is named, with what to do."""

from __future__ import annotations

import io
import sqlite3
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.images.listing import list_images


def picture(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (9, 99, 199)).save(file, format)
    return file.getvalue()


def zipped(name: str = "a/1.png") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, picture("PNG"))
    return file.getvalue()


def tarred(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a/1.png")
        info.size = len(picture("PNG"))
        archive.addfile(info, io.BytesIO(picture("PNG")))
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros((2, 4, 4, 3), np.uint8))
    return file.getvalue()


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "faces.zip": (zipped(), ("a zip archive; unpack it (unzip", "faces.zip -d FOLDER)")),
    "no ending": (zipped(), ("a zip archive", "no ending' -d FOLDER")),
    "shard-0000.tar": (tarred("w"), ("a tar archive; unpack it", "-C FOLDER")),
    "set.tar.gz": (tarred("w:gz"), ("compressed by gzip", "tar -xf")),
    "set.tar.xz": (tarred("w:xz"), ("compressed by xz", "tar -xf")),
    "ILSVRC2012_img_train.tar": (tarred("w"), ("a tar archive", "datasets/imagenet64.py --source")),
    "cifar-10-python.tar.gz": (tarred("w:gz"), ("datasets/cifar10.py --archive",)),
    "cut.zip": (zipped()[:40], ("a zip archive",)),
    "samples_4x8x8x3.npz": (arrays(), ("an .npz of arrays", "--save_as png")),
    "x.npy": (b"\x93NUMPY\x01\0v\0", ("an array of NumPy's",)),
    "cat.jpg": (picture("JPEG"), ("a single picture; give the folder that holds it",)),
    "cat": (picture("WEBP"), ("a single picture",)),
    "cat.gif": (picture("GIF"), ("a single picture",)),
    "scan.tif": (picture("TIFF"), ("the format TIFF",)),
    "clip.mp4": (b"\0\0\0\x20ftypisom", ("the format video",)),
    "train.parquet": (b"PAR1\0\0", ("a Parquet table", "PNG")),
    "renamed": (b"PAR1\0\0", ("a Parquet table",)),
    "data.arrow": (b"\xff\xff\xff\xff", ("an Arrow table",)),
    "train-00000-of-00009.tfrecord": (b"\x9a\x01\0\0", ("a TFRecord file",)),
    "celeba.h5": (b"\x89HDF\r\n\x1a\n", ("an HDF5 file",)),
    "data.mdb": (b"\0\0\0\0", ("LMDB", "datasets/lsun.py --lmdb")),
    "svhn.mat": (b"\0\1", ("MATLAB",)),
    "names.txt": (b"a.jpg\nb.jpg\n", ("a text file", "give the folder")),
    "labels.csv": (b"file,class\na.jpg,cat\n", ("a file of labels", "--labels", "labels.csv")),
    "dataset.json": (b'{"labels": []}', ("a file of labels", "--labels")),
    "lfs.zip": (b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    "odd.xyz": (b"\0\xff\0", ("a file; give the folder that holds the images",)),
    "empty.zip": (b"", ("a zip archive",)),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a folder of images but ") as found:
        list_images(tmp_path / name)
    assert all(word in str(found.value) for word in words), found.value


def test_the_advice_for_archives_works(tmp_path: Path) -> None:
    for name, content in (("a b.zip", zipped()), ("it's.tar", tarred("w")), ("c.tar.gz", tarred("w:gz"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as found:
            list_images(tmp_path / name)
        command = str(found.value).rpartition("unpack it (")[2].rpartition(") and")[0].rpartition(", or ")[2]
        command = command.replace("FOLDER", f"from_{name[0]}")
        if command.startswith("unzip"):
            command = f"python3 -m zipfile -e '{tmp_path / name}' from_a"  # unzip is not installed everywhere
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert len(list_images(tmp_path / f"from_{name[0]}")) == 1


FOLDERS: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "LSUN": ({"data.mdb": b"\0", "lock.mdb": b"\0"}, ("an LMDB", "datasets/lsun.py --lmdb")),
    "LSUN inside": ({"bedroom_train_lmdb/data.mdb": b"\0"}, ("datasets/lsun.py --lmdb", "bedroom_train_lmdb")),
    "CIFAR": ({"cifar-10-batches-py/data_batch_1": b"\0"}, ("datasets/cifar10.py",)),
    "parquet": ({"README.md": b"x", "data/train-00000.parquet": b"PAR1"}, ("train-00000.parquet, a Parquet table",)),
    "TFRecord": ({"a.tfrecord": b"\0"}, ("a.tfrecord, a TFRecord file",)),
    "HDF5": ({"a.h5": b"\0"}, ("a.h5, an HDF5 file",)),
    "archives": ({"1.zip": zipped(), "2.zip": zipped()}, ("1.zip, a zip archive", "unzip", "-d FOLDER")),
    "shards": ({"s-0.tar": b"", "s-1.tar": b""}, ("s-0.tar, a tar archive", "tar -xf")),
    "arrays": ({"batch.npz": arrays()}, ("batch.npz, an .npz of arrays",)),
    "TIFF": ({"a.tif": b"", "b.tif": b""}, ("a.tif", "tif) that is not read", "mogrify -format png", "*.tif")),
    "photos": ({"IMG_1.HEIC": b""}, ("IMG_1.HEIC", "*.HEIC")),
    "bare": ({"1": picture("JPEG"), "2": picture("JPEG")}, ("pictures without an ending, such as 1",)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path) -> None:
    files, words = FOLDERS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="holds no images but ") as found:
        list_images(tmp_path)
    assert all(word in str(found.value) for word in words), found.value


def test_a_database(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "images.db").execute("create table t (a)").connection.close()
    with pytest.raises(UserError, match="an SQLite database"):
        list_images(tmp_path / "images.db")
