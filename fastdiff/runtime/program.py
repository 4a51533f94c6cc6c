"""How the running script was started: as a file, or by the command `fastdiff` under a name such as "fastdiff train".

The name stands in sys.argv[0], where argparse and messages find it. This module imports no PyTorch.
"""

from __future__ import annotations

import shlex
import sys

COMMAND = "fastdiff"


def start_as(program: str, words: list[str]) -> None:
    """Make `program`, such as "fastdiff train", the name of the script that runs, and `words` its command line."""
    sys.argv[:] = [program, *words]


def started_by_command() -> bool:
    """Whether the command `fastdiff` started the script."""
    return sys.argv[0].startswith(f"{COMMAND} ")


def command_line() -> str:
    """The command line of the script, as a shell reads it."""
    program, *words = sys.argv
    return " ".join([program if started_by_command() else shlex.quote(program), *map(shlex.quote, words)])


def trainer() -> str:
    """How the user starts training on all GPUs, in the way in which this script was started."""
    return f"deepspeed --module {COMMAND} train" if started_by_command() else "deepspeed fastdiff/train.py"
