"""Exit codes of the scripts, and the exceptions that carry a sentence for the user."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

DONE = 0
USER_ERROR = 2
"""Something the user gave is wrong; the same command will fail again."""
PREEMPTED = 75
"""Stopped by SIGTERM or SIGUSR1 after everything was saved; the same command resumes."""
PEER_LOST = 76
"""Another rank died or hangs; the same command resumes from the last checkpoint."""
DIVERGED = 77
"""Losses or gradients stayed non-finite; a diagnosis was printed."""
INTERRUPTED = 130
"""Ctrl-C, after everything was saved; or a second signal, without that. The same command resumes."""

_WORD = re.compile(r"\S{600,}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_QUOTES = reprlib.Repr()
_QUOTES.maxlevel, _QUOTES.maxstring, _QUOTES.maxother, _QUOTES.maxlong = 4, 100, 100, 60


class UserError(Exception):
    """An error in what the user gave. The message is one sentence that says what is wrong and what would be right.

    Scripts print it without a traceback and exit with code 2. Line breaks and control characters in it are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_WORD.sub(lambda found: shortened(found[0]), one_line(message)))


class StopWith(Exception):
    """Ends a script with an exit code (fastdiff.errors) and one sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def leave_quietly_on_ctrl_c() -> None:
    """Let Ctrl-C end the process with one line and its exit code where nothing catches it, as in slow imports."""
    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, trace)
        print(
            f"{Path(sys.argv[0]).name}: stopped by Ctrl-C; the same command starts again", file=sys.stderr, flush=True
        )
        os._exit(INTERRUPTED)

    sys.excepthook = report


def one_line(text: str) -> str:
    """Escape the characters of a text that would break its line or move the cursor."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message, at most 300 characters of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def quoted(value: Any) -> str:
    """The repr of a value for a message, shortened in the middle where it is long."""
    try:
        return _QUOTES.repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a number of thousands of digits"


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """'; did you mean X?' for the known name that is spelled like `name`, as `show` writes it, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {show(close[0])}?" if close else ""


def shortened(text: str, length: int = 500) -> str:
    """Cut the middle out of a text that is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 100]} ... {text[-95:]}"


@contextmanager
def blaming(flag: str) -> Iterator[None]:
    """Put the flag that named a file before the message of a UserError raised in the block: "--model_path: ...".

    A message that names a flag already is left alone.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith("--"):
            raise
        raise UserError(f"{flag}: {error}") from error
