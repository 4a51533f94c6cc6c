"""The command line that the preparation scripts share: flags, and errors as one sentence with exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError

from fastdiff.config.aliases import advice
from fastdiff.errors import DONE, INTERRUPTED, USER_ERROR, StopWith, UserError
from fastdiff.runtime.paths import expand_path
from fastdiff.settings import Size


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage above them."""

    def parse_args(self) -> argparse.Namespace:  # type: ignore[override]
        args, unknown = self.parse_known_args()
        if unknown:
            options = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            self.error(f"{name} is not a flag of this script{advice(name, options, lambda known: f'--{known}')}")
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser(description: str | None) -> Parser:
    """A parser with the flag that every script has: --workers."""
    result = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--workers",
        type=positive,
        default=_usable_cores(),
        metavar="N",
        help="processes that decode, resize and write (default: one per usable core, here %(default)s)",
    )
    return result


def add_size(to: Parser, default: int) -> None:
    to.add_argument(
        "--size",
        type=_size,
        default=(default, default),
        metavar="S",
        help=f"pixels per side of the square to make, or height x width as in 64x96 (default: {default})",
    )


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError becomes one line on stderr and exit code 2, Ctrl-C one and exit code 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except (KeyboardInterrupt, StopWith) as stop:
        reason = str(stop) or "stopped by Ctrl-C; what is done is kept, and the same command goes on from there"
        print(f"{script}: {reason}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(DONE)


def given_path(text: str) -> Path:
    """A path as a user writes it, with ~ and environment variables."""
    try:
        return Path(expand_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, not {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    try:
        return TypeAdapter(Size).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64 or 64x96 ({reason})") from None


def _usable_cores() -> int:
    # A batch system or a container grants fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
