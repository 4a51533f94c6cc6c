"""A process that decodes pictures, for packing: of small ones most work is Python's, which threads can't share.

Its first argument is a JSON object with root, size and channels. Each line of its input is a JSON list of names below
root. It answers with a line, a JSON list of [position, reason] of the names that it can't read, and the pixels, uint8
[names, H, W, C]. It ends when its input does, so with its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import fastdiff
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.reader import what_is_wrong

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
