"""Says what is given as a folder of images and is none: an archive, a single picture, arrays, a database, a list.

Only names and first bytes are looked at, and the names in a zip.
"""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path

from fastdiff.images.image_files import FORMATS, other_kind
from fastdiff.runtime.file_kinds import HEAD, signature
from fastdiff.runtime.files import files_in

_WRITE = "write its images as PNG files into a folder and give that"
_ARRAYS = f"{_WRITE} (of samples: sample.py --save_as png makes them)"
_IMAGENET = "datasets/imagenet64.py --source {} makes a folder of images of it"
_CIFAR = "datasets/cifar10.py --archive {} makes a folder of images of it"
# Kind by `file_kinds.signature` → what the file is, and what to do; {} is its path, quoted for a shell.
_FILES = {
    "zip": ("a zip archive", "unpack it (unzip {} -d FOLDER) and give that folder"),
    "npz": ("an .npz of arrays", _ARRAYS),
    "npy": ("an array of NumPy's", _ARRAYS),
    "tar": ("a tar archive", "unpack it (mkdir FOLDER && tar -xf {} -C FOLDER) and give that folder"),
    "gzip": (
        "compressed by gzip",
        "unpack it (gunzip {}, or mkdir FOLDER && tar -xf {} -C FOLDER) and give the folder",
    ),
    "bzip2": ("compressed by bzip2", "unpack it (mkdir FOLDER && tar -xf {} -C FOLDER) and give the folder"),
    "xz": ("compressed by xz", "unpack it (mkdir FOLDER && tar -xf {} -C FOLDER) and give the folder"),
    "zstd": ("compressed by zstd", "unpack it (mkdir FOLDER && tar -xf {} -C FOLDER) and give the folder"),
    "7z": ("a 7z archive", "unpack it (7z x {} -oFOLDER) and give that folder"),
    "rar": ("a rar archive", "unpack it and give that folder"),
    "HDF5": ("an HDF5 file", _WRITE),
    "picture": ("a single picture", "give the folder that holds it"),
    "Git LFS": ("a pointer of Git LFS to the file", "fetch the file itself: git lfs pull"),
    "parquet": ("a Parquet table", _WRITE),
    "arrow": ("an Arrow table", _WRITE),
    "sqlite": ("an SQLite database", _WRITE),
    "tfrecord": ("a TFRecord file", _WRITE),
    "mdb": ("the file of an LMDB", "datasets/lsun.py --lmdb ITS_FOLDER makes a folder of images of it"),
    "mat": ("a file of MATLAB's", _WRITE),
    "pickle": ("a pickle", _WRITE),
    "labels": ("a file of labels", "give the folder of its images, and this file as --labels {}"),
    "text": ("a text file", "give the folder of the images that it lists; a part of them can be linked into a new one"),
}
_SUFFIXES = {
    "parquet": ("parquet",),
    "arrow": ("arrow", "feather"),
    "tfrecord": ("tfrecord", "tfrecords", "array_record"),
    "HDF5": ("h5", "hdf5"),
    "mdb": ("mdb",),
    "mat": ("mat",),
    "npz": ("npz",),
    "npy": ("npy",),
    "pickle": ("pkl", "pickle"),
    "zip": ("zip",),
    "tar": ("tar",),
    "gzip": ("tgz", "gz"),
    "sqlite": ("sqlite", "db"),
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
_UNREAD = ("tif", "tiff", "bmp", "heic", "heif", "avif", "jxl", "jp2", "jfif", "ppm", "pgm", "tga", "psd", "svg")
"""Endings of pictures that are not read."""
CIFAR_BATCH = "data_batch_1"


def describe_file(path: Path) -> str:
    """What a file is that isn't a folder of images, and what to do; 'a file; ...' where that is unknown."""
    kind = kind_of_file(path)
    name = path.name.lower()
    if kind in ("tar", "gzip") and name.startswith("ilsvrc2012"):
        what, advice = _FILES[kind][0], _IMAGENET
    elif kind in ("tar", "gzip") and name.startswith("cifar-10-"):
        what, advice = _FILES[kind][0], _CIFAR
    else:
        what, advice = _FILES.get(kind, (kind or "a file", "give the folder that holds the images"))
    return f"{what}; {advice.format(*[shlex.quote(str(path))] * advice.count('{}'))}"


def kind_of_file(path: Path) -> str:
    """A key of _FILES, the description of a picture's format that is not read, or "" for an unknown file."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            kind = signature(head)
            if kind == "zip" and zipfile.is_zipfile(file):
                names = zipfile.ZipFile(file).namelist()
                return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # ValueError: names that are no UTF-8
        return ""
    ending = _ending(path.name)
    if kind in ("", "text") and ending in ("csv", "json", "jsonl", "tsv"):
        return "labels"
    if kind:
        return kind
    if head[:4] == b"PAR1":
        return "parquet"
    if unread := other_kind(head):
        return f"a file of the format {unread} ({', '.join(FORMATS)} are read)"
    return _KIND_OF_SUFFIX.get(ending, "")


def describe_folder(folder: Path) -> str:
    """What a folder without images holds, as 'a.tif, which is ...; what to do'; empty where that is unknown."""
    for place in (folder, *(folder / name for name in sorted(files_in(folder))[:100])):
        if place.is_dir() and (found := _describe(place, sorted(files_in(place)))):
            return found
    return ""


def _describe(folder: Path, names: list[str]) -> str:
    quoted = shlex.quote(str(folder))
    if "data.mdb" in names:
        return f"an LMDB ({folder / 'data.mdb'}); datasets/lsun.py --lmdb {quoted} makes a folder of images of it"
    if CIFAR_BATCH in names:
        return f"CIFAR-10's batches; {_CIFAR.format(quoted)}"
    if unread := _ending_with(names, _UNREAD):
        ending = _ending(unread)
        advice = f"convert them, for instance by: mogrify -format png {quoted}/*.{unread.rpartition('.')[2]}"
        return f"pictures such as {unread}, a format ({ending}) that is not read; {advice}"
    if packed := _ending_with(names, _KIND_OF_SUFFIX):
        kind = _KIND_OF_SUFFIX[_ending(packed)]
        what, advice = _FILES[kind]
        return f"{packed}, {what}; {advice.format(*[shlex.quote(str(folder / packed))] * advice.count('{}'))}"
    bare = next((name for name in names[:100] if "." not in name and (folder / name).is_file()), "")
    if bare and kind_of_file(folder / bare) == "picture":
        return f"pictures without an ending, such as {bare}; rename them to {bare}.jpg and so on"
    return ""


def _ending(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _ending_with(names: list[str], endings: Iterable[str]) -> str:
    """The first name with one of the endings; empty where none has."""
    wanted = set(endings)
    return next((name for name in names if _ending(name) in wanted), "")
