"""Lines for people, on a screen, pipe or file that may be gone: no run ends because nobody reads what it says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def that_may_be_gone(stream: TextIO) -> Iterator[None]:
    """What is written to the stream in here is lost, and no more, where that is closed, or its disk full."""
    try:
        yield
    except BrokenPipeError:  # for good: later lines, and Python's own flush at the end, go nowhere
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    except OSError:
        pass


def show(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on stderr unless told otherwise."""
    stream = stream or sys.stderr
    with that_may_be_gone(stream):
        print(line, file=stream, flush=True)


def flush() -> None:
    """Before a process ends without Python's own clean-up."""
    for stream in (sys.stdout, sys.stderr):
        with that_may_be_gone(stream):
            stream.flush()
