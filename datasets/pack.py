"""Decodes a folder of images into one array of pixels, which the trainer reads at memory speed.

    python datasets/pack.py --data_dir data/imagenet64_train --size 64
    deepspeed fastdiff/train.py --data_dir data/imagenet64_train.packed_64x64x3 --image_size 64

The result is the folder that the trainer's --cache disk makes at its first start. It can be trained on without the
images: it holds pixels.npy (uint8 [N, H, W, C], for np.load with mmap_mode="r"), labels.npy, names.json and
packed.json, which names its source. After an interruption the same command continues.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.datasets.preparation_cli import add_size, given_path, parser, run

from fastdiff.errors import UserError, blaming
from fastdiff.images.cache.format import is_packed
from fastdiff.images.cache.sharing import default_place, open_or_pack
from fastdiff.images.labels import describe_classes, index_images
from fastdiff.images.listing import Listing
from fastdiff.images.pixels import MODES
from fastdiff.runtime.program import trainer


def labelled(data_dir: Path, rule: str) -> tuple[Listing, str]:
    """The images with their classes, and the line that says which. What auto can't decide is packed without classes."""
    try:
        listing = index_images(data_dir, rule)
    except UserError as error:
        if rule != "auto":
            raise
        return index_images(data_dir, "none"), f"labels: none: {error}"
    return listing, describe_classes(listing)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--data_dir", type=given_path, required=True, help="folder with images (jpg, jpeg, png, gif, webp)"
    )
    flags.add_argument(
        "--out",
        type=given_path,
        help="folder to make (default: beside the images, where --cache disk looks, as NAME.packed_HxWxC)",
    )
    flags.add_argument(
        "--channels", type=int, choices=sorted(MODES), default=3, help="1 gray, 3 RGB, 4 RGBA (default: 3)"
    )
    add_size(flags, 64)
    flags.add_argument(
        "--labels",
        default="auto",
        metavar="auto|prefix|folder|none|FILE",
        help="class of an image, as the trainer's --labels finds it (default: auto)",
    )
    args = flags.parse_args()

    if is_packed(args.data_dir):
        raise UserError(f"--data_dir: {args.data_dir} is packed already; give the folder of images that it came from")
    listing, note = labelled(args.data_dir, args.labels)
    target = args.out or default_place(args.data_dir, args.size, args.channels)
    with blaming("--out"):
        if target.exists() and not is_packed(target) and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} is there already and no packed folder; choose another or an empty one")
        packed = open_or_pack(listing, args.size, args.channels, target, workers=args.workers)

    height, width = args.size
    command = f"--data_dir {shlex.quote(str(target))} --image_size {height if height == width else f'{height}x{width}'}"
    command += f" --in_channels {args.channels}" if args.channels != 3 else ""
    if len(listing.class_names) > 1:
        command += f" --class_cond True --num_classes {len(listing.class_names)}"
    bad = len(packed.unreadable)
    notes = f" ({bad:,} unreadable, each replaced by the next one)" if bad else ""
    print(note)
    print(
        f"{len(listing.names):,} images in {target}, {packed.pixels.nbytes / 1e9:.3g} GB{notes}; "
        f"to train on them: {trainer()} {command}"
    )


if __name__ == "__main__":
    run(main)
