"""Cases that fail on purpose, to test the harness itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz.cases import MARKER, READ, REFUSED, Case


def cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """A case that succeeds, and one of each kind of failure."""

    def read(work: Callable[[], object]) -> Callable[[], tuple[str, str]]:
        return lambda: (work(), (READ, ""))[1]

    made = [
        Case("good", read(lambda: None)),
        Case("hang", read(lambda: time.sleep(60))),
        Case("crash", read(lambda: os._exit(9))),
        Case("code", read(lambda: Path(MARKER).touch())),
        Case("exception", read(lambda: 1 // 0)),
        Case("nameless", lambda: (REFUSED, "something is wrong"), ("file.pt",)),
        Case("memory", read(lambda: len(b"x" * 800_000_000))),
    ]
    yield from made[start:stop]
