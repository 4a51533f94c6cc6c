"""Converts CIFAR-10's python archive into DIR/cifar_train and DIR/cifar_test, with names such as airplane_00029.png.

    python datasets/cifar10.py --archive cifar-10-python.tar.gz --out data

Pixels are copied exactly. The number in a name is the picture's position in the archive. After an interruption the
same command continues. The archive's pickles are read without running code from them.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from fastdiff.datasets import array_pickle
from fastdiff.datasets.image_preparation import Target, Task, prefix_of, prepare
from fastdiff.datasets.preparation_cli import given_path, parser, run

from fastdiff.errors import UserError

SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
META = "batches.meta"
FOLDER = "cifar-10-batches-py"


class Batch(NamedTuple):
    pixels: np.ndarray
    """[N, 32, 32, 3] uint8."""
    labels: list[int]
    origin: str


def read_files(archive: Path) -> dict[str, bytes]:
    """Read the pickles, by name, from the archive or from the folder that it was extracted to."""
    wanted = [META, *(name for names in SPLITS.values() for name in names)]
    if archive.is_dir():
        folder = archive / FOLDER if (archive / FOLDER).is_dir() else archive
        try:
            files = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
        except OSError as error:
            raise UserError(f"can't read {folder}: {error.strerror}") from None
    else:
        files = _read_archive(archive, wanted)
    absent = [name for name in wanted if name not in files]
    if absent:
        raise UserError(f"{archive} lacks {', '.join(absent)}; the python version of CIFAR-10 is needed")
    return files


def _read_archive(archive: Path, wanted: list[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in wanted and member.isfile() else None
                if file is not None:
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"can't read {archive}: {error.strerror}") from None
        raise UserError(f"{archive} is no tar archive or a truncated one; download cifar-10-python.tar.gz") from None
    return files


def read_class_names(data: bytes) -> list[str]:
    names = array_pickle.read(data, META).get("label_names")
    if not isinstance(names, list) or not names:
        raise UserError(f"{META} holds no label_names; the python version of CIFAR-10 is needed")
    return [prefix_of(name.decode("ascii") if isinstance(name, bytes) else str(name)) for name in names]


def read_batch(data: bytes, origin: str, classes: int) -> Batch:
    content = array_pickle.read(data, origin)
    rows, labels = content.get("data"), content.get("labels")
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * 32 * 32:
        raise UserError(f"{origin} holds no data of 3072 bytes per image; the python version of CIFAR-10 is needed")
    if (
        not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(isinstance(label, int) and 0 <= label < classes for label in labels)
    ):
        raise UserError(f"{origin} does not hold one label below {classes} for each of its {len(rows)} images")
    return Batch(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, origin)


def tasks(batches: list[Batch], class_names: list[str]) -> Iterator[Task]:
    number = 0
    for batch in batches:
        for pixels, label in zip(batch.pixels, batch.labels, strict=True):
            name = f"{class_names[label]}_{number:05d}.png"
            yield Task(name, np.ascontiguousarray(pixels), f"image {number} ({batch.origin})")
            number += 1


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--archive", type=given_path, required=True, help="cifar-10-python.tar.gz, or its extracted folder"
    )
    flags.add_argument("--out", type=given_path, required=True, help="folder to make cifar_train and cifar_test in")
    args = flags.parse_args()

    files = read_files(args.archive)
    class_names = read_class_names(files[META])
    splits = {
        split: [read_batch(files[name], name, len(class_names)) for name in names] for split, names in SPLITS.items()
    }
    made = {}
    for split, batches in splits.items():
        digest = hashlib.sha256(b"".join(files[name] for name in [META, *SPLITS[split]])).hexdigest()
        target = Target(args.out / f"cifar_{split}", (32, 32))
        total = sum(len(batch.labels) for batch in batches)
        target.claim(total, "cifar10.py", archive=digest)
        made[split] = prepare(tasks(batches, class_names), total, target, args.workers)
    for summary in made.values():
        summary.check()
    print(made["test"])
    print(made["train"].with_training())


if __name__ == "__main__":
    run(main)
