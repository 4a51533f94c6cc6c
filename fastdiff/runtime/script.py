"""A screen, pipe or file for what a script says that may be gone: no script ends because nobody reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _Lossy:
    """A text stream that loses what can't be written: nobody reads any more, or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # for good: Python's own flush at the end goes nowhere, too
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def that_may_be_gone() -> Iterator[None]:
    """In here nothing that is written to sys.stdout and sys.stderr raises: neither OSErrors nor names that aren't
    Unicode, whose bytes are shown as escapes.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        for name, stream in streams.items():
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lossy(stream))
        yield
    finally:
        for name, stream in streams.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
