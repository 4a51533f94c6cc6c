"""A case: one damaged file, set of settings or command line, and how its result is checked."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastdiff.errors import UserError

READ, REFUSED = "read", "refused"
MARKER = "code_was_run"
"""Name of the file that hostile pickles would create in the working folder."""


@dataclass(frozen=True)
class Case:
    """One input. run() must return READ, return REFUSED with a message, or raise UserError."""

    name: str
    """A short description. Reports count cases by its first word."""
    run: Callable[[], tuple[str, str]]
    names: tuple[str, ...] = ()
    """A refusal's message must contain one of these: the file, flag or field."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    result: str
    """READ or REFUSED."""
    message: str = ""
    wrong: str = ""
    """The reason why it counts as a failure, or empty."""


Kind = Callable[[Path, int, int, int], Iterator[Case]]
"""kind(folder, seed, start, stop) yields cases start to stop - 1 of a seed, with their files in the folder."""


def generator(seed: int, kind: str, index: int) -> random.Random:
    """A random generator for one case, so that each case can be repeated by its number."""
    return random.Random(f"{seed} {kind} {index}")


def attempt(case: Case) -> Outcome:
    """Run a case and check its result."""
    try:
        result, message = case.run()
    except UserError as error:
        result, message = REFUSED, str(error)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        lines = traceback.format_exception(error)
        return Outcome(REFUSED, repr(error)[:300], "raised " + "".join(lines)[-1500:])
    if result == REFUSED:
        if "\n" in message or not message.strip() or len(message) > 4000:
            return Outcome(result, message, "the message is not one line")
        if case.names and not any(name in message for name in case.names):
            return Outcome(result, message, f"the message names none of {', '.join(case.names)}")
    return Outcome(result, message)
