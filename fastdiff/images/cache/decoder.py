"""Processes that decode images for `build`: the parent's side (`Decoder`) and the process itself (`main`).

A request is a line of JSON, the images' names. The answer is a line of JSON, [position, reason] of each image that
can't be read, and then the pixels of all. The process imports no PyTorch, which would take seconds and 200 MB.
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


class Decoder:
    """A process that decodes images below `root` to uint8 [H, W, C]."""

    def __init__(self, root: Path, size_hw: tuple[int, int], channels: int) -> None:
        self._shape = (*size_hw, channels)
        paths = [str(Path(fastdiff.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.images.cache.decoder", str(root), *map(str, self._shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def decode(self, names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Decode images to uint8 [n, H, W, C]; also returns the reason at each position that can't be read.

        EOFError, OSError or ValueError if the process has died.
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
            except OSError:  # it has died, with a request on its way
                continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(root: str, height: str, width: str, channels: str) -> None:
    """Answer requests on stdin until it ends."""
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
