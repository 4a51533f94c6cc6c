"""SIGTERM and SIGUSR1 are recorded, count once if they come together, and the old handlers are restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastdiff.runtime.script import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # within a second: the same one
        assert signals.requested == number.name
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


SCRIPT = """
import os, signal
from fastdiff.runtime.script import StopSignals, run_script

def main():
    with StopSignals() as signals:
        signals.finish()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    print("saved")

run_script(main, "train.py")
"""


def test_signals_after_the_end_are_ignored() -> None:
    """After finish() no signal counts. A script continues to ignore them; where this is a library, it doesn't."""
    old = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested is None
    assert signal.getsignal(signal.SIGTERM) == old
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr


def test_other_threads_hear_nothing() -> None:
    heard: list[str | None] = []

    def listen() -> None:
        with StopSignals() as signals:
            heard.append(signals.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [None]
