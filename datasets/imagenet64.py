"""Converts ImageNet (ILSVRC2012) into a folder of small images, with names such as n01440764_00000000.png.

    python datasets/imagenet64.py --source ILSVRC2012_img_train.tar --out data/imagenet64_train
    python datasets/imagenet64.py --source ILSVRC2012_img_val.tar --val_labels labels.txt --out data/imagenet64_val
    python datasets/imagenet64.py --source folder_of_class_folders --out data/imagenet64_train

Archives are read in place; nothing is extracted. The number in a name counts the class's pictures in the order of
their file names. After an interruption the same command continues.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.datasets.image_preparation import Slice, Target, Task, check_prefixes, prefix_of, prepare
from fastdiff.datasets.preparation_cli import add_size, given_path, parser, run
from tqdm import tqdm

from fastdiff.errors import UserError
from fastdiff.images.listing import is_data, is_image, list_images

Listing = dict[str, list[tuple[str, Path | Slice]]]
"""Class → its pictures' names, sorted, and where each one lies."""


def list_source(source: Path, val_labels: Path | None) -> Listing:
    if source.is_dir():
        if val_labels is not None:
            raise UserError(f"--val_labels belongs to the tar of validation images, and {source} is a folder")
        return _list_folder(source)
    try:
        with tarfile.open(source, "r:") as tar:  # compressed archives can't be read in place
            members = _files(tar)
            class_tars = [member for member in members if member.name.endswith(".tar") and _is_data(member.name)]
            if not class_tars:
                return _list_validation(source, members, val_labels)
            if val_labels is not None:
                raise UserError(f"{source} says itself which class its images are of; leave out --val_labels")
            return _list_classes(source, tar, class_tars)
    except (tarfile.TarError, EOFError):
        raise UserError(f"{source} is not an uncompressed tar archive, or a truncated or damaged one") from None
    except OSError as error:
        raise UserError(f"can't read {source}: {error.strerror or error}") from None


def _list_folder(source: Path) -> Listing:
    listing: Listing = {}
    for path in list_images(source):
        label, *rest = path.relative_to(source).parts
        if not rest:
            raise UserError(f"{path} lies in no class folder; for other folders than ImageNet's there is folder.py")
        listing.setdefault(label, []).append(("/".join(rest), path))
    return {label: sorted(pictures) for label, pictures in sorted(listing.items())}


def _files(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    return sorted((member for member in tar if member.isreg()), key=lambda member: member.name)


def _list_classes(source: Path, tar: tarfile.TarFile, class_tars: list[tarfile.TarInfo]) -> Listing:
    listing: Listing = {}
    for outer in tqdm(class_tars, unit="class", desc="listing", delay=2):
        with tarfile.open(fileobj=tar.extractfile(outer), mode="r:") as class_tar:
            listing[PurePosixPath(outer.name).stem] = [
                (member.name, Slice(source, outer.offset_data + member.offset_data, member.size))
                for member in _files(class_tar)
                if _is_image(member.name)
            ]
    return listing


def _list_validation(source: Path, members: list[tarfile.TarInfo], val_labels: Path | None) -> Listing:
    images = [member for member in members if _is_image(member.name)]
    if not images:
        raise UserError(f"{source} holds neither class archives nor images")
    if val_labels is None:
        raise UserError(f"{source} holds images without their classes; give --val_labels as well")
    try:
        labels = val_labels.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {val_labels}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    labels = [label.strip() for label in labels]
    while labels and not labels[-1]:
        labels.pop()
    if len(labels) != len(images) or not all(labels) or any("/" in label for label in labels):
        raise UserError(f"{val_labels} needs one class name per line, {len(images):,} in all; it has {len(labels):,}")
    listing: Listing = {label: [] for label in sorted(set(labels))}
    for label, member in zip(labels, images, strict=True):
        listing[label].append((member.name, Slice(source, member.offset_data, member.size)))
    return listing


def _is_data(name: str) -> bool:
    return all(map(is_data, PurePosixPath(name).parts))


def _is_image(name: str) -> bool:
    return _is_data(name) and is_image(PurePosixPath(name).name)


def tasks(listing: Listing) -> Iterator[Task]:
    for label, pictures in listing.items():
        for number, (name, place) in enumerate(pictures):
            origin = str(place) if isinstance(place, Path) else f"{name} in {place.path}"
            yield Task(f"{prefix_of(label)}_{number:08d}.png", place, origin)


def digest(listing: Listing) -> str:
    result = hashlib.sha256()
    for label, pictures in listing.items():
        for name, _ in pictures:
            result.update(os.fsencode(f"{label}/{name}\n"))
    return result.hexdigest()[:16]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--source",
        type=given_path,
        required=True,
        help="the tar of training or validation images, or a folder of class folders",
    )
    flags.add_argument("--out", type=given_path, required=True, help="folder to write the images to")
    flags.add_argument(
        "--val_labels",
        type=given_path,
        metavar="FILE",
        help="for the validation images: a text file with one class name (n01440764) per line, in the order of the "
        "sorted file names",
    )
    add_size(flags, 64)
    args = flags.parse_args()

    listing = list_source(args.source, args.val_labels)
    check_prefixes(listing)
    target = Target(args.out, args.size)
    total = sum(len(pictures) for pictures in listing.values())
    target.claim(total, "imagenet64.py", listing=digest(listing))
    summary = prepare(tasks(listing), total, target, args.workers)
    summary.check()
    print(summary.with_training())


if __name__ == "__main__":
    run(main)
