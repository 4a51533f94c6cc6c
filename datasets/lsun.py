"""Converts an LSUN category's LMDB into a folder of images, with names such as bedroom_0000000.png.

    python datasets/lsun.py --lmdb bedroom_train_lmdb --out data/lsun_bedroom --size 256

The number in a name is the picture's position in the database, whose order is that of its keys. After an interruption
the same command continues; so does one with a larger --limit.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.datasets.image_preparation import Target, Task, prefix_of, prepare
from fastdiff.datasets.preparation_cli import add_size, given_path, parser, positive, run

from fastdiff.errors import UserError

if TYPE_CHECKING:
    import lmdb


@contextmanager
def reading(folder: Path) -> Iterator[lmdb.Transaction]:
    """A read-only view of an LMDB whose values are views into its file."""
    try:
        import lmdb
    except ImportError:
        raise UserError("reading LSUN needs the package lmdb; install it with: pip install lmdb") from None
    file = folder / "data.mdb"
    if not file.is_file():
        remedy = "unzip it and give the folder" if folder.suffix == ".zip" else "give the folder that holds data.mdb"
        raise UserError(f"{folder} is not an LMDB folder; {remedy}")
    try:
        # There is no lock file: it could not be written in a read-only folder, and no process writes to the data set.
        with lmdb.open(str(folder), readonly=True, create=False, lock=False, readahead=False) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < needed:  # reading past the end of a mapped file kills the process
                raise UserError(f"{file} is truncated: {file.stat().st_size:,} of {needed:,} bytes; unzip it again")
            with environment.begin(buffers=True) as transaction:
                yield transaction
    except lmdb.Error as error:
        raise UserError(f"can't read {folder}: {error}") from None


def tasks(transaction: lmdb.Transaction, name: str, limit: int) -> Iterator[Task]:
    with transaction.cursor() as cursor:
        for number, (key, value) in enumerate(itertools.islice(cursor, limit)):
            origin = f"image {number} (key {bytes(key).decode('ascii', 'backslashreplace')})"
            yield Task(f"{name}_{number:07d}.png", value, origin)


def default_name(folder: Path) -> str:
    """bedroom_train_lmdb → bedroom."""
    return re.sub(r"(_(train|val|test))?(_lmdb)?$", "", folder.resolve().name)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--lmdb", type=given_path, required=True, help="folder with the category's data.mdb")
    flags.add_argument("--out", type=given_path, required=True, help="folder to write the images to")
    flags.add_argument("--name", help="class that names begin with (default: from the LMDB's name, e.g. bedroom)")
    flags.add_argument("--limit", type=positive, metavar="N", help="stop after the first N images (default: all)")
    add_size(flags, 256)
    args = flags.parse_args()

    name = prefix_of(args.name or default_name(args.lmdb))
    if "/" in name or name.startswith("."):
        raise UserError(f"--name {name} can't begin a file name")
    with reading(args.lmdb) as transaction:
        entries = transaction.stat()["entries"]
        total = min(entries, args.limit or entries)
        target = Target(args.out, args.size)
        target.claim(total, "lsun.py", name=name, number_of_images=entries)
        summary = prepare(tasks(transaction, name, total), total, target, args.workers)
    summary.check()
    print(summary.with_training())


if __name__ == "__main__":
    run(main)
