"""Scripts by which bash, zsh and fish complete the command `fastdiff`: its commands, their flags, choices and files.

shtab writes them from parsers. They are text, so that pressing the key for completion starts no Python.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import shtab

from fastdiff.command_table import SHELLS, Group
from fastdiff.config.presets import PRESETS, configs
from fastdiff.runtime.program import COMMAND

_PLACEHOLDER = re.compile(r"[A-Z]+|A,B,\.\.|HxW")
"""What stands for any value in the name of a flag's value, among the values themselves, as in auto|N."""


def completion(shell: str, commands: Group) -> str:
    """The script for a shell of shtab's, which completes these commands."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=commands.summary)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--completion", choices=SHELLS, help="print a script for completion and exit")
    _add_commands(parser, commands)
    return shtab.complete(parser, shell)


def _add_commands(parser: argparse.ArgumentParser, group: Group) -> None:
    subparsers = parser.add_subparsers()
    for name, command in group.commands.items():
        if isinstance(command, Group):
            _add_commands(subparsers.add_parser(name, help=command.summary), command)
            continue
        try:
            flags = [_parser_of(command.main())]
        except ImportError:  # of a package that isn't installed: the command is completed without flags
            flags = []
        added = subparsers.add_parser(name, help=command.summary, parents=flags, add_help=not flags)
        for action in added._actions:
            _complete_value(action)


def _complete_value(action: argparse.Action) -> None:
    """Let shtab complete a flag's value: by its choices, which may be the names in its metavar, or by files."""
    if action.nargs == 0 or action.choices:
        return
    names = str(action.metavar or "").split("|")
    if action.dest == "config":
        action.complete = _names_or_files([file.stem for file in sorted(configs().glob("*.json"))])  # type: ignore[attr-defined]
    elif action.dest.split(".")[-1] in ("preset", "sr_preset"):
        action.choices = list(PRESETS)
    elif choices := [name for name in names if name and not _PLACEHOLDER.fullmatch(name)]:
        action.choices = choices
    else:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _names_or_files(names: list[str]) -> dict[str, Any]:
    """How each shell completes a value that is one of these names or a file, as shtab takes it."""
    words = " ".join(names)
    function = "_fastdiff_names_or_files"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"{words} {shtab.FILE['fish']}",
        "preamble": {
            "bash": f'{function}() {{ compgen -W \'{words}\' -- "$1"; {shtab.FILE["bash"]} "$1"; }}',
            "zsh": f"{function}() {{ compadd -- {words}; {shtab.FILE['zsh']}; }}",
        },
    }


class _Caught(Exception):
    """Carries the parser that a script was about to use."""


def _parser_of(main: Callable[[], None]) -> argparse.ArgumentParser:
    """The parser of a script whose main function builds one and reads the command line with it, before all else."""

    def catch(parser: argparse.ArgumentParser, *words: Any, **more: Any) -> Any:
        if not parser.add_help:  # it looks for one flag beforehand
            return original(parser, *words, **more)
        raise _Caught(parser)

    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = catch  # type: ignore[method-assign, assignment]
    try:
        main()
    except _Caught as caught:
        parser: argparse.ArgumentParser = caught.args[0]
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
    raise AssertionError(f"{main.__module__} has no parser")
