"""Measures, by launcher, how soon all ranks end after one is killed or frozen, and which reason the others give.

    python tests/stress/deaths.py --times 3

Two processes on this machine train a tiny network. A frozen rank can't end itself: it goes when its launcher kills it.
The exit code is 0 only if all ranks ended in time with a reason, every time.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from training.test_launchers import LAUNCHERS, pid_of, start  # noqa: E402

from fastdiff.runtime.files import ProcessId  # noqa: E402

CASES = (
    ("kill -9 of rank 1", signal.SIGKILL, 1, 60.0),
    ("kill -9 of rank 0", signal.SIGKILL, 0, 60.0),
    ("rank 1 frozen", signal.SIGSTOP, 1, 120.0),
)
"""(description, signal, rank, seconds until all ranks must have ended)."""


def measure(launcher: str, number: signal.Signals, rank: int, limit: float) -> tuple[float, float, str]:
    """Return the seconds until the other rank ended, those until all ended, and the script's own last line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(launcher, folder, 100_000)
        victim, other = (pid_of(r, process, folder, 5) for r in (rank, 1 - rank))
        watched = ProcessId.of(other)
        os.kill(victim, number)
        since = time.monotonic()
        while not watched.is_gone() and time.monotonic() < since + limit:
            time.sleep(0.02)
        first = time.monotonic() - since
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
        return first, time.monotonic() - since, lines[-1] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="repetitions of each case (default: 3)")
    times, wrong = parser.parse_args().times, 0
    for launcher in LAUNCHERS:
        for what, number, rank, limit in CASES:
            for _ in range(times):
                others, everyone, line = measure(launcher, number, rank, limit)
                wrong += everyone > limit or not line
                print(f"{launcher}: {what}: the other after {others:.1f} s, all after {everyone:.1f} s", flush=True)
                print(f"    {line or 'NO REASON GIVEN'}", flush=True)
    print(f"verdict: {'every rank ended, with a reason' if not wrong else f'{wrong} times not'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
