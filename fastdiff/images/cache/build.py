"""Makes a packed folder (packed.py): every image of a listing decoded once, in parallel.

Rows are written in order into a hidden folder beside the target, which is renamed when all is done. There a file says
now and then how many rows are safe: a build that was interrupted goes on from there. It also shows others that the
builder is alive.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import fastdiff
from fastdiff.errors import UserError
from fastdiff.images.cache.format import LABELS, NAMES, PIXELS, RECORD, describe, finish_record, replacements
from fastdiff.images.listing import Listing, label_images
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.reader import Reader, what_is_wrong

logger = logging.getLogger(__name__)
STATE = "state.json"
FEW = 1000
"""Images that are not worth starting a process for, which takes half a second."""
SAVE_SECONDS = 5.0
"""Between two notes of how far the build is."""


def partial_of(target: Path) -> Path:
    """The folder in which `target` is being made."""
    return target.with_name(f".{target.name}.partial")


def read_state(partial: Path) -> dict[str, Any] | None:
    """How far a build is: {made_of, rows, unreadable, host, saved}; None where nothing is known."""
    try:
        state = json.loads((partial / STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def pack(listing: Listing, size_hw: tuple[int, int], channels: int, target: Path, *, workers: int, flag: str) -> None:
    """Decode the listing's images into the packed folder `target`, which must not exist or be empty.

    One process at a time may do that. UserError, which names the flag that chose the target, where there is no room
    or writing fails, and where too many images can't be read.
    """
    try:
        _Build(listing, size_hw, channels, target, flag).run(workers)
    except OSError as error:
        raise UserError(f"{flag}: can't write {target}: {error.strerror or error}") from error


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Build:
    def __init__(self, listing: Listing, size_hw: tuple[int, int], channels: int, target: Path, flag: str) -> None:
        self.listing, self.target, self.flag = listing, target, flag
        self.reader = Reader(listing, size_hw, channels)
        self.shape = (len(listing.names), *size_hw, channels)
        self.row_bytes = size_hw[0] * size_hw[1] * channels
        self.partial = partial_of(target)
        self.described = describe(listing, size_hw, channels)
        self.rows = self.saves = 0
        self.own = threading.local()  # each worker thread's process
        self.decoders: list[Decoder] = []

    def run(self, workers: int) -> None:
        unreadable = self._resume()
        self._check_room()
        with open(self.partial / PIXELS, "r+b" if self.rows else "w+b") as file:
            self.data_starts = _write_header(file, self.shape)
            self._decode_again(file, unreadable)
            file.truncate(self.data_starts + self.rows * self.row_bytes)
            file.seek(0, os.SEEK_END)
            self._save(file)
            try:
                self._decode_all(file, workers)
            finally:
                self._save(file)
            self._replace_unreadable(file)
            file.flush()
            os.fsync(file.fileno())
        self._finish()

    def _resume(self) -> list[int]:
        """Set self.rows to what an earlier build left, and return the unreadable images among those."""
        self.partial.mkdir(parents=True, exist_ok=True)
        state = read_state(self.partial)
        if state is not None and state.get("made_of") == self.described and (self.partial / PIXELS).is_file():
            self.rows = int(state["rows"])
            return [int(index) for index in state["unreadable"]]
        for entry in self.partial.iterdir():  # of other images, or of none
            entry.unlink()
        return []

    def _check_room(self) -> None:
        needed = (self.shape[0] - self.rows) * self.row_bytes + 200 * self.shape[0]  # names and labels too
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise UserError(
                f"{self.flag}: the decoded images need {needed / 1e9:.3g} GB, but {self.target.parent} has "
                f"{free / 1e9:.3g} GB left; make room there, or name a folder on a larger disk"
            )

    def _decode_all(self, file: BinaryIO, workers: int) -> None:
        """Append the rows that are missing. Each thread lets a process of its own do the work, if there is much."""
        processes = min(workers, (self.shape[0] - self.rows) // FEW)
        self.in_processes = processes > 1
        workers = processes if self.in_processes else workers
        size = max(1, min(64, (8 << 20) // self.row_bytes))
        blocks = (range(i, min(i + size, self.shape[0])) for i in range(self.rows, self.shape[0], size))
        pending: deque[Future[np.ndarray]] = deque()
        saved = time.monotonic()
        interval = 0.1 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
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
        """[rows, H, W, C] uint8; zeros where an image can't be read."""
        if self.in_processes:
            try:
                block, bad = self._decoder().decode([self.listing.names[row] for row in rows])
            except (OSError, EOFError, ValueError):
                logger.warning("a process that decodes images has ended (for want of memory?); going on without it")
                self.in_processes = False
            else:
                for position, reason in bad.items():
                    self.reader.reject(rows[position], reason)
                return block
        block = np.zeros((len(rows), *self.shape[1:]), dtype=np.uint8)
        for pixels, index in zip(block, rows, strict=True):
            found = self.reader.attempt(index, self.reader.reference)
            if found is not None:
                pixels[:] = found
        return block

    def _decoder(self) -> Decoder:
        """This thread's process."""
        if not hasattr(self.own, "decoder"):
            self.own.decoder = Decoder(self.listing.root, self.reader.size_hw, self.reader.channels)
            self.decoders.append(self.own.decoder)
        return self.own.decoder

    def _decode_again(self, file: BinaryIO, unreadable: list[int]) -> None:
        """What an earlier build could not read may have been put right since."""
        for index in unreadable:
            found = self.reader.attempt(index, self.reader.reference)
            if found is not None:
                self._put(file, index, found)
        self.reader.stop_if_too_many()

    def _replace_unreadable(self, file: BinaryIO) -> None:
        """Give every unreadable image another chance, for a disk may have failed it, and then its replacement."""
        for index in self.reader.reasons:
            found = self.reader.retry(index, self.reader.reference)
            if found is not None:
                self._put(file, index, found)
        bad = list(self.reader.reasons)
        for index, other in zip(bad, replacements(self.shape[0], bad)[bad], strict=True):
            file.seek(self.data_starts + int(other) * self.row_bytes)
            self._put(file, index, np.frombuffer(file.read(self.row_bytes), dtype=np.uint8))

    def _put(self, file: BinaryIO, index: int, pixels: np.ndarray) -> None:
        file.seek(self.data_starts + index * self.row_bytes)
        file.write(np.ascontiguousarray(pixels).data)

    def _save(self, file: BinaryIO) -> None:
        """Make the rows written so far safe, and say how many they are."""
        file.flush()
        os.fsync(file.fileno())
        self.saves += 1
        state = {
            "made_of": self.described,
            "rows": self.rows,
            "unreadable": [index for index in self.reader.reasons if index < self.rows],
            "host": platform.node(),
            "saved": [os.getpid(), self.saves],
        }
        _write(self.partial / STATE, json.dumps(state))

    def _finish(self) -> None:
        """Write the small files, and give the folder its name."""
        names, reasons = self.listing.names, self.reader.reasons
        labels, class_names = label_images([self.listing.path(i) for i in range(len(names))], self.listing.root)
        shown = labels[replacements(len(names), reasons)]
        np.save(self.partial / LABELS, shown)
        _write(self.partial / NAMES, json.dumps(names))
        unreadable = [{"index": i, "name": names[i], "reason": reasons[i]} for i in sorted(reasons)]
        _write(self.partial / RECORD, finish_record(self.described, class_names, unreadable))
        self.partial.rename(self.target)
        (self.target / STATE).unlink()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Write the head of an .npy file of uint8; returns where the pixels begin."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


_START = """
import sys, types
package = types.ModuleType("fastdiff.images")  # the real one would import PyTorch: seconds, and 200 MB, for nothing
package.__path__ = [sys.argv[2]]
sys.modules["fastdiff.images"] = package
from fastdiff.images.decoding import main
main()
"""


class Decoder:
    """Such a process, from the parent's side."""

    def __init__(self, root: Path, size_hw: tuple[int, int], channels: int) -> None:
        self._shape = (*size_hw, channels)
        order = json.dumps({"root": str(root), "size": size_hw, "channels": channels})
        paths = [str(Path(fastdiff.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, order, str(Path(__file__).resolve().parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent
        )

    def decode(self, names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Pixels [names, H, W, C] uint8, and what is wrong at which positions. EOFError or OSError if it has died."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(names).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        block = np.empty((len(names), *self._shape), dtype=np.uint8)
        if not answer or process.stdout.readinto(block.data.cast("B")) != block.nbytes:  # type: ignore[attr-defined]
            raise EOFError("the process has ended")
        return block, dict(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # it has died, with a request on its way
                continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    order = json.loads(sys.argv[1])
    root, size, mode = Path(order["root"]), tuple(order["size"]), MODES[order["channels"]]
    for line in sys.stdin.buffer:
        names = json.loads(line)
        block = np.zeros((len(names), *size, order["channels"]), dtype=np.uint8)
        bad = []
        for position, name in enumerate(names):
            try:
                block[position] = load_image(root / name, size, mode)
            except Exception as error:  # Pillow's decoders raise many kinds
                bad.append([position, what_is_wrong(error)])
        sys.stdout.buffer.write(json.dumps(bad).encode() + b"\n" + block.data.cast("B"))
        sys.stdout.buffer.flush()
