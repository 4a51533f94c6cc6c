"""Builds a packed folder (see format.py): decodes every image of a listing once, in parallel.

`pack` writes the rows in order into a hidden folder beside the target, and renames it when all are done. Every few
seconds, state.json in it records how many rows are on disk: an interrupted build continues from there, and other
processes see that the builder is alive.

Large data sets are decoded by several processes. Each runs `main` of this file and is controlled by a `Decoder`: a
request is a line of JSON with names of images, the answer a line of JSON with the unreadable ones, then the pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import fastdiff
from fastdiff.errors import UserError
from fastdiff.images.cache.format import LABELS, NAMES, PIXELS, RECORD, describe, replacements, whole_record
from fastdiff.images.labels import label_images
from fastdiff.images.listing import Listing
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.reader import Reader
from fastdiff.images.unreadable import STEM, naming_all, what_is_wrong
from fastdiff.runtime.files import write_json

logger = logging.getLogger(__name__)
STATE = "state.json"
FEW = 1000
"""Fewest images per process, because starting one takes half a second."""
SAVE_SECONDS = 5.0
"""Time between two updates of state.json."""


def partial_of(target: Path) -> Path:
    """The folder in which `target` is being built."""
    return target.with_name(f".{target.name}.partial")


def read_state(partial: Path) -> dict[str, Any] | None:
    """The progress of a build: {made_of, rows, unreadable, host, saved}; None if it can't be read."""
    try:
        state = json.loads((partial / STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def pack(listing: Listing, size_hw: tuple[int, int], channels: int, target: Path, *, workers: int) -> None:
    """Decode the listing's images into the packed folder `target`, which must be absent or empty.

    Only one process at a time may do that. Raises UserError if the disk is too small, writing fails, or too many images
    can't be read, which are then listed in files beside the target.
    """
    build = _Build(listing, size_hw, channels, target)
    try:
        with naming_all(target.with_name(f"{target.name}.{STEM}"), alive=build.record_progress):
            build.run(workers)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror or error}") from error


class _Build:
    """One run of `pack`. `rows` is the number of rows written so far."""

    def __init__(self, listing: Listing, size_hw: tuple[int, int], channels: int, target: Path) -> None:
        self.listing, self.target, self.partial = listing, target, partial_of(target)
        self.reader = Reader(listing, size_hw, channels, whole=listing)
        self.shape = (len(listing.names), *size_hw, channels)
        self.row_bytes = math.prod(self.shape[1:])
        self.made_of = describe(listing, size_hw, channels)
        self.rows = 0
        self.own = threading.local()  # holds each worker thread's Decoder
        self.decoders: list[Decoder] = []

    def run(self, workers: int) -> None:
        unreadable = self._resume()
        self._check_room()
        with open(self.partial / PIXELS, "r+b" if self.rows else "w+b") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
            self.data_starts = file.tell()
            self._retry(file, unreadable)  # they may have been repaired since the earlier build
            self.reader.stop_if_too_many()
            file.truncate(self.data_starts + self.rows * self.row_bytes)
            file.seek(0, os.SEEK_END)
            self._save(file)
            try:
                self._decode_all(file, workers)
            finally:
                self._save(file)
            self._retry(file, self.reader.reasons)  # the error may have been temporary
            self._replace_unreadable(file)
            file.flush()
            os.fsync(file.fileno())
        self._finish()

    def _resume(self) -> list[int]:
        """Set self.rows to the rows left by an earlier build. Returns the indices that were unreadable among them."""
        self.partial.mkdir(parents=True, exist_ok=True)
        state = read_state(self.partial)
        resumes = state is not None and state.get("made_of") == self.made_of and (self.partial / PIXELS).is_file()
        for entry in self.partial.iterdir():
            if not resumes or entry.name not in (PIXELS, STATE):
                entry.unlink()
        if state is None or not resumes:
            return []
        self.rows = int(state["rows"])
        return [int(index) for index in state["unreadable"]]

    def _check_room(self) -> None:
        needed = (self.shape[0] - self.rows) * self.row_bytes + 200 * self.shape[0]  # names and labels too
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise UserError(
                f"the decoded images need {needed / 1e9:.3g} GB, but {self.target.parent} has {free / 1e9:.3g} GB "
                "left; make room there, or name a folder on a larger disk"
            )

    def _decode_all(self, file: BinaryIO, workers: int) -> None:
        """Append the missing rows. Threads decode them or, if they are many, each thread uses a process."""
        processes = min(workers, (self.shape[0] - self.rows) // FEW)
        self.in_processes = processes > 1
        workers = processes if self.in_processes else workers
        size = max(1, min(64, (8 << 20) // self.row_bytes))
        blocks = (range(i, min(i + size, self.shape[0])) for i in range(self.rows, self.shape[0], size))
        pending: deque[Future[np.ndarray]] = deque()
        saved = time.monotonic()
        interval = 0.1 if sys.stderr.isatty() else 30.0  # in a log file every update is a line
        pool = ThreadPoolExecutor(workers, thread_name_prefix="packing")
        name = f"packing {self.shape[1]}x{self.shape[2]}"
        with tqdm(total=self.shape[0], initial=self.rows, unit="img", desc=name, mininterval=interval) as bar:
            try:
                pending.extend(pool.submit(self._decode, rows) for rows in itertools.islice(blocks, 4 * workers))
                while pending:
                    block = pending.popleft().result()
                    pending.extend(pool.submit(self._decode, rows) for rows in itertools.islice(blocks, 1))
                    self.reader.stop_if_too_many()
                    file.write(block.data)
                    self.rows += len(block)
                    bar.update(len(block))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save(file)
                        saved = time.monotonic()
            finally:
                pool.shutdown(cancel_futures=True)
                for decoder in self.decoders:
                    decoder.close()

    def _decode(self, rows: range) -> np.ndarray:
        """Decode some images to uint8 [n, H, W, C], with zeros where one can't be read."""
        if self.in_processes:
            try:
                block, unreadable = self._decoder().decode([self.listing.names[row] for row in rows])
            except (OSError, EOFError, ValueError):
                logger.warning("a process that decodes images has ended (out of memory?); continuing without it")
                self.in_processes = False
            else:
                for position, reason in unreadable.items():
                    self.reader.reject(rows[position], reason)
                return block
        block = np.zeros((len(rows), *self.shape[1:]), dtype=np.uint8)
        for pixels, index in zip(block, rows, strict=True):
            found = self.reader.attempt(index, self.reader.reference)
            if found is not None:
                pixels[:] = found
        return block

    def _decoder(self) -> Decoder:
        """The decoding process of this thread."""
        if not hasattr(self.own, "decoder"):
            self.own.decoder = Decoder(self.listing.root, self.reader.size_hw, self.reader.channels)
            self.decoders.append(self.own.decoder)
        return self.own.decoder

    def _retry(self, file: BinaryIO, unreadable: Iterable[int]) -> None:
        """Read unreadable images again, and write the rows of those that can be read now."""
        for index in unreadable:
            found = self.reader.attempt(index, self.reader.reference)
            if found is not None:
                self.reader.accept(index)
                self._write_row(file, index, found)

    def _replace_unreadable(self, file: BinaryIO) -> None:
        """Give each unreadable image the pixels of its replacement."""
        unreadable = list(self.reader.reasons)
        for index, other in zip(unreadable, replacements(self.shape[0], unreadable)[unreadable], strict=True):
            file.seek(self.data_starts + int(other) * self.row_bytes)
            self._write_row(file, index, np.frombuffer(file.read(self.row_bytes), dtype=np.uint8))

    def _write_row(self, file: BinaryIO, index: int, pixels: np.ndarray) -> None:
        file.seek(self.data_starts + index * self.row_bytes)
        file.write(np.ascontiguousarray(pixels).data)

    def _save(self, file: BinaryIO) -> None:
        """Flush the rows written so far to the disk, and record their number in state.json."""
        file.flush()
        os.fsync(file.fileno())
        self.record_progress()

    def record_progress(self) -> None:
        """Write state.json, by which other processes see that this one is alive."""
        state = {
            "made_of": self.made_of,
            "rows": self.rows,
            "unreadable": [index for index in self.reader.reasons if index < self.rows],
            "host": platform.node(),
            "saved": time.time(),
        }
        write_json(self.partial / STATE, state)

    def _finish(self) -> None:
        """Write the small files, and rename the folder to the target."""
        names, reasons = self.listing.names, self.reader.reasons
        listing = self._labelled()
        if listing.labels_from:
            np.save(self.partial / LABELS, listing.labels[replacements(len(names), reasons)])
        write_json(self.partial / NAMES, names)
        unreadable = [{"index": i, "name": names[i], "reason": reasons[i]} for i in sorted(reasons)]
        write_json(self.partial / RECORD, whole_record(self.made_of, listing, unreadable))
        self.partial.rename(self.target)
        (self.target / STATE).unlink()

    def _labelled(self) -> Listing:
        """The listing with its classes; a run that needs none packs those that the rule auto finds."""
        if self.listing.labels_from:
            return self.listing
        try:
            found = label_images(self.listing.names, self.listing.root)
        except UserError:
            return self.listing
        return dataclasses.replace(
            self.listing, labels=found.labels, class_names=found.names, labels_from=found.found_in
        )


class Decoder:
    """A process that runs `main` and decodes images below `root` to uint8 [H, W, C]."""

    def __init__(self, root: Path, size_hw: tuple[int, int], channels: int) -> None:
        self._shape = (*size_hw, channels)
        paths = [str(Path(fastdiff.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.images.cache.build", str(root), *map(str, self._shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def decode(self, names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Decode images to uint8 [n, H, W, C]. Also returns {position: reason} of the unreadable ones.

        Raises EOFError, OSError or ValueError if the process has died.
        """
        self._requests.write(json.dumps(names).encode() + b"\n")
        self._requests.flush()
        unreadable = self._answers.readline()
        block = np.empty((len(names), *self._shape), dtype=np.uint8)
        if not unreadable or self._answers.readinto(block.data.cast("B")) != block.nbytes:  # type: ignore[attr-defined]
            raise EOFError("the process has ended")
        return block, dict(json.loads(unreadable))

    def close(self) -> None:
        """End the process."""
        for pipe in (self._requests, self._answers):
            try:
                pipe.close()
            except OSError:  # it died before it read a request
                continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(root: str, height: str, width: str, channels: str) -> None:
    """Answer the requests of a `Decoder` on standard input until it is closed."""
    shape = int(height), int(width), int(channels)
    for line in sys.stdin.buffer:
        names = json.loads(line)
        block = np.zeros((len(names), *shape), dtype=np.uint8)
        unreadable = []
        for position, name in enumerate(names):
            try:
                block[position] = load_image(Path(root, name), shape[:2], MODES[shape[2]])
            except Exception as error:  # Pillow's decoders raise many kinds
                unreadable.append([position, what_is_wrong(error)])
        sys.stdout.buffer.write(json.dumps(unreadable).encode() + b"\n" + block.data.cast("B"))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
