"""What a case is, and where it runs: one damaged file, set of settings or command line, and what must come of it."""

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
    """One input. run() returns READ, or REFUSED with a message, or raises UserError; all else is wrong."""

    name: str
    """What was done, in few words: counted by its first word."""
    run: Callable[[], tuple[str, str]]
    names: tuple[str, ...] = ()
    """A refusal must hold one of these: the file, flag or field."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    result: str
    """READ or REFUSED."""
    message: str = ""
    wrong: str = ""
    """Why it counts as a failure; empty where all is well."""


Kind = Callable[[Path, int, int, int], Iterator[Case]]
"""Cases number start to stop - 1 of a seed, with a folder for their files: kind(folder, seed, start, stop)."""


def generator(seed: int, kind: str, index: int) -> random.Random:
    """Random numbers of one case: any case can be made again by its number."""
    return random.Random(f"{seed} {kind} {index}")


def attempt(case: Case) -> Outcome:
    """Run a case and judge what came of it."""
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
