"""Converts a folder of images, at any depth, into one folder of small ones, with names such as CLASS_00000000.png.

    python datasets/folder.py --source photos --out data/photos_64 --size 64

Large pictures are decoded and resized once here instead of in every epoch. Classes are found as the trainer finds them
and become the names' prefixes, with - for the characters _ and /; where nothing distinguishes classes, all names begin
with image. The number in a name is the picture's position in the source. After an interruption the same command
continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.datasets.image_preparation import SAVE_OPTIONS, Target, Task, check_prefixes, prefix_of, prepare
from fastdiff.datasets.preparation_cli import add_size, given_path, parser, run

from fastdiff.errors import UserError
from fastdiff.images.labels import NoClasses, describe_classes, index_images
from fastdiff.images.listing import Listing

UNLABELLED = "image"


def list_source(source: Path, rule: str) -> Listing:
    """The images of the source with their classes; without any where nothing distinguishes classes."""
    try:
        return index_images(source, rule)
    except NoClasses:
        if rule != "auto":
            raise
        return index_images(source, "none")


def class_prefixes(listing: Listing) -> list[str]:
    """The prefix of the names of each class, in the order of listing.class_names."""
    if not listing.class_names:
        return [UNLABELLED]
    # Images that lie in no folder below the source are of class ".", which would begin a hidden file's name.
    names = [listing.root.resolve().name if name == "." else name for name in listing.class_names]
    check_prefixes(names)
    return [prefix_of(name) for name in names]


def tasks(listing: Listing, prefixes: list[str], suffix: str) -> Iterator[Task]:
    for number, label in enumerate(listing.labels):
        path = listing.path(number)
        yield Task(f"{prefixes[label]}_{number:08d}.{suffix}", path, str(path))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--source", type=given_path, required=True, help="folder with images (jpg, jpeg, png, gif, webp)"
    )
    flags.add_argument(
        "--out", type=given_path, required=True, help="folder to write the images to, outside the source"
    )
    flags.add_argument(
        "--format",
        choices=sorted(SAVE_OPTIONS),
        default="png",
        help="png keeps the resized pixels exactly; jpg (quality 95) takes less space (default: png)",
    )
    flags.add_argument(
        "--labels",
        default="auto",
        metavar="auto|prefix|folder|none|FILE",
        help="class of an image, as the trainer's --labels finds it (default: auto)",
    )
    add_size(flags, 64)
    args = flags.parse_args()

    if args.out.resolve().is_relative_to(args.source.resolve()):
        raise UserError(f"{args.out} lies in {args.source}, where its images would be taken for new ones")
    listing = list_source(args.source, args.labels)
    prefixes = class_prefixes(listing)
    target = Target(args.out, args.size, args.format)
    target.claim(len(listing.names), "folder.py", labels=args.labels, listing=listing.fingerprint)
    print(describe_classes(listing), flush=True)
    summary = prepare(tasks(listing, prefixes, args.format), len(listing.names), target, args.workers)
    summary.check()
    print(summary.with_training())


if __name__ == "__main__":
    run(main)
