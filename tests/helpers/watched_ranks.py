"""Runs two ranks per case under the watchdog; they die, hang or exit as the case requires. Prints the results as JSON.

    python watched_ranks.py CASE CASE ...

All ranks are forked from one process that has imported torch and run at the same time, which saves most of the time.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastdiff.errors import StopWith, UserError
from fastdiff.runtime.processes import current, join
from fastdiff.runtime.script import StopSignals, run_script
from fastdiff.runtime.watchdog import Timing, Watchdog

TIMING = Timing(interval=0.4, silence=8.0, grace=3.0, linger=3.0)
STALL = 8.0
STEP = 50
"""The step at which a case's event happens."""


def work(case: str) -> None:
    """Run a loop like that of training, in which one collective operation per step also decides whether to stop."""
    me = int(os.environ["RANK"])
    with StopSignals() as signals, Watchdog(current(), STALL, TIMING) as watchdog:
        watchdog.progress("joining", allowed=30)
        if case == "early error" and me == 1:
            raise UserError("no such folder")
        if case == "same error":
            raise UserError("bad flag")
        join(timeout=timedelta(minutes=5))
        for step in range(80):
            watchdog.progress(f"step {step}")
            if step == STEP:
                happen(case, me, watchdog)
            stop = torch.tensor(float(signals.requested is not None))
            dist.all_reduce(stop)
            if stop:
                signals.finish()
                why = "a signal" if signals.requested else "a signal to another rank"
                raise StopWith(75, f"saved after step {step}, by {why}")
            time.sleep(0.02)


def happen(case: str, me: int, watchdog: Watchdog) -> None:
    pid = os.getpid()
    while watchdog.heartbeat and not watchdog.heartbeat.peers:  # on a busy machine the first heartbeat is late
        time.sleep(0.05)
    if case == "same late error":
        raise UserError("disk full")
    if case == "killed host" and me == 0:
        os.kill(pid, signal.SIGKILL)
    if case == "slow" and me == 0:
        watchdog.progress("drawing", allowed=30)
        time.sleep(1.4 * STALL)
    if me == 0:
        return
    if case == "killed":
        os.kill(pid, signal.SIGKILL)
    if case == "stopped":
        os.kill(pid, signal.SIGSTOP)
    if case == "bug":
        raise ValueError("no such key")
    if case == "error":
        raise UserError("bad file")
    if case == "stuck":
        time.sleep(60)
    if case == "asked to stop":
        os.kill(pid, signal.SIGUSR1)
    if case == "asked twice":
        assert watchdog.heartbeat
        for _ in range(2):  # rank 0 waits in a collective, where Python runs no handlers
            os.kill(watchdog.heartbeat.peers[0].process.pid, signal.SIGTERM)
            time.sleep(1.7)


def start(case: str, rank: int, port: int, folder: Path) -> int:
    """Fork a rank, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    with (folder / f"{case}-{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    run_script(lambda: work(case), "train.py")
    os._exit(0)


def own_words(file: Path) -> str:
    """Return the output of a rank, without torch's warnings about host names that it can't resolve."""
    lines = file.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"(\[rank\d\]:)?\[W\d{4} ", line))


def free_ports(count: int) -> list[int]:
    """Find free ports below the ephemeral range, from which the system gives ports to other processes."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main(cases: list[str], limit: float = 120.0) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), dict(zip(cases, free_ports(len(cases)), strict=True))
        running = {start(case, rank, ports[case], folder): (case, rank) for case in cases for rank in (0, 1)}
        codes: dict[str, list[int]] = {case: [0, 0] for case in cases}
        until = time.monotonic() + limit
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                case, rank = running.pop(pid)
                codes[case][rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() < until and set(running.values()) != {("stopped", 1)}:
                time.sleep(0.05)
            else:  # a launcher does this too
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
        words = {case: [own_words(folder / f"{case}-{rank}") for rank in (0, 1)] for case in cases}
    print(json.dumps({case: {"codes": codes[case], "words": words[case]} for case in cases}))


if __name__ == "__main__":
    main(sys.argv[1:])
