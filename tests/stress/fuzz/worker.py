"""The process in which cases run: python -m fuzz.worker KIND SEED START STOP FOLDER.

It prints a line of JSON before each case, with the case, and one after it, with the result. The parent kills it if a
case takes too long. The address space is limited, so that a case that allocates too much memory fails here and does not
affect the machine.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fuzz.cases import MARKER, Outcome, attempt
from fuzz.kinds import ALL

SPARE_BYTES = 8 << 30
_RUNNING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")
_run: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _RUNNING:
        _run.append(event)


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    getrusage's ru_maxrss is unsuitable: it starts with the value of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def main() -> None:
    kind, seed, start, stop = sys.argv[1], *map(int, sys.argv[2:5])
    folder = Path(sys.argv[5])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # hides the output of scripts
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    torch.set_num_threads(1)
    os.chdir(folder)
    cases = ALL[kind].cases(folder, seed, start, stop)
    begun = peak_bytes()
    for index in range(start, stop):
        case = next(cases)
        if index == start:  # what the kind imports and prepares is no case's doing
            begun = peak_bytes()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
            sys.addaudithook(_audit)
        print(json.dumps({"begin": index, "name": case.name}), file=answers)
        clock = time.perf_counter()
        outcome = attempt(case)
        seconds = time.perf_counter() - clock
        if Path(MARKER).exists() or _run:
            outcome = Outcome(outcome.result, outcome.message, f"it ran code {_run}")
            Path(MARKER).unlink(missing_ok=True)
            _run.clear()
        line = {
            "end": index,
            "name": case.name,
            "result": outcome.result,
            "message": outcome.message[:1000],
            "wrong": outcome.wrong,
            "seconds": seconds,
            "bytes": max(0, peak_bytes() - begun),
        }
        print(json.dumps(line), file=answers)


if __name__ == "__main__":
    main()
