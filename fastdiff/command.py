"""The command `fastdiff`, which runs the scripts of this package by name; `python -m fastdiff` is the same.

    fastdiff train --config cifar10_uncond --data_dir DIR
    torchrun --nproc_per_node 8 -m fastdiff train --config cifar10_uncond --data_dir DIR
    deepspeed --module fastdiff train --config cifar10_uncond --data_dir DIR

A script's module is imported when its command is given: help and mistyped names don't wait for PyTorch.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import fastdiff
from fastdiff.command_table import FASTDIFF, PREPARE, SHELLS, Command, Group
from fastdiff.errors import DONE, USER_ERROR, UserError, did_you_mean, leave_quietly_on_ctrl_c
from fastdiff.runtime.program import COMMAND, start_as


def main() -> NoReturn:
    """Run the command line in sys.argv and end the process with an exit code of `fastdiff.errors`."""
    # DeepSpeed's launcher and torch.distributed.launch put this flag before all others.
    launcher = [word for word in sys.argv[1:2] if word.startswith(("--local_rank=", "--local-rank="))]
    words = sys.argv[1 + len(launcher) :]
    program, chosen = COMMAND, FASTDIFF
    while True:
        if not words or words[0] in ("-h", "--help"):
            _print(_help(program, chosen))
            sys.exit(DONE)
        name, *words = words
        try:
            if name.startswith("-"):
                _print_about(name, words, program)
            found = _find(name, program, chosen)
        except UserError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            sys.exit(USER_ERROR)
        program = f"{program} {name}"
        if isinstance(found, Command):
            _run(found, program, [*launcher, *words], chosen is PREPARE)
        chosen = found


def _run(command: Command, program: str, words: list[str], prepares: bool) -> NoReturn:
    """Run a script under the name `program`, with which its usage line and messages begin."""
    start_as(program, words)
    leave_quietly_on_ctrl_c()  # before the slow imports
    script = command.main()
    if prepares:
        from fastdiff.datasets.preparation_cli import run

        run(script)
    from fastdiff.runtime.script import run_script

    run_script(script, program)
    sys.exit(DONE)


def _find(name: str, program: str, group: Group) -> Command | Group:
    if name not in group.commands:
        near = did_you_mean(name.replace("_", "-").removesuffix(".py"), group.commands)
        raise UserError(f"{name or 'an empty word'} is not a command{near or f'; {program} --help lists them'}")
    return group.commands[name]


def _print_about(flag: str, values: list[str], program: str) -> NoReturn:
    """Carry out --version or --completion SHELL and end the process. Raises UserError for any other flag."""
    if flag == "--version":
        _print(f"{COMMAND} {fastdiff.__version__}")
    elif flag == "--completion":
        if values not in ([shell] for shell in SHELLS):
            raise UserError(f"--completion takes one of {', '.join(SHELLS)}, not {' '.join(values) or 'nothing'}")
        from fastdiff.completion import completion

        _print(completion(values[0], FASTDIFF))
    else:
        raise UserError(f"{flag} is no flag of fastdiff itself; give it after a command, as in fastdiff train {flag}")
    sys.exit(DONE)


def _print(text: str) -> None:
    """Print a text; that its reader has gone, as after `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # redirect the descriptor, so that Python's own flush at exit succeeds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help(program: str, group: Group) -> str:
    width = max(map(len, group.commands))
    usage = [f"usage: {program} COMMAND ..."]
    if group is FASTDIFF:
        usage += [f"       {program} --version", f"       {program} --completion {'|'.join(SHELLS)}"]
    names = [f"  {name:{width}}  {command.summary}" for name, command in group.commands.items()]
    about = f"{group.summary[0].upper()}{group.summary[1:]}."
    more = f"{program} COMMAND --help describes a command and its flags."
    return "\n".join([*usage, "", about, "", *names, "", more])
