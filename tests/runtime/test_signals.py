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


def test_ctrl_c_raises_once_until_it_is_deferred() -> None:
    old = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's: within a second
        assert signals.requested == "Ctrl-C"
    with StopSignals() as signals:
        signals.defer_ctrl_c()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == "Ctrl-C"
    assert signal.getsignal(signal.SIGINT) is old


def test_ctrl_c_stays_ignored_in_background_jobs() -> None:
    """Shells start them with SIGINT ignored, and a terminal's Ctrl-C is meant for the job in the foreground."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.requested is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


AGAIN = """
import os, signal, sys, threading, time
from fastdiff.runtime.script import StopSignals, run_script

def send():
    for word in sys.argv[2:]:
        name, seconds = word.split(":")
        time.sleep(float(seconds))
        print(name, flush=True)
        os.kill(os.getpid(), getattr(signal, name))

def main():
    with StopSignals() as signals:
        signals.on_abort = print
        if sys.argv[1] != "raises":
            signals.defer_ctrl_c()
        if sys.argv[1] == "finished":
            signals.finish()
        threading.Thread(target=send, daemon=True).start()
        try:
            threading.Event().wait(30 if sys.argv[1] == "raises" else 0.1)
        finally:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire(timeout=5)  # the main thread runs no handlers meanwhile, as in a collective
    print("saved")

run_script(main, "train.py")
"""


@pytest.mark.parametrize(
    ("state", "launched", "sent", "code"),
    [
        ("defers", False, "SIGINT:0.2 SIGINT:0.2", 0),
        ("defers", False, "SIGINT:0.2 SIGINT:1.5", 130),
        ("defers", False, "SIGINT:0.2 SIGTERM:1.5", 130),
        ("defers", False, "SIGTERM:0.2 SIGINT:1.5", 130),
        ("raises", False, "SIGINT:0.2 SIGINT:1.5", 130),
        ("raises", True, "SIGINT:0.2 SIGINT:1.5", 130),
        ("defers", True, "SIGINT:0.2 SIGINT:1.5 SIGTERM:1", 0),
        ("defers", True, "SIGINT:0.2 SIGINT:0.1 SIGINT:3.5", 130),
        ("finished", False, "SIGINT:0.2 SIGINT:1.5", 0),
    ],
)
def test_a_second_signal_ends_at_once(state: str, launched: bool, sent: str, code: int) -> None:
    """Launchers follow the terminal's SIGINT by signals of their own, which don't count as a second one."""
    env = {**os.environ, **({"RANK": "0"} if launched else {})}
    done = subprocess.run([sys.executable, "-c", AGAIN, state, *sent.split()], capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stderr
    if code == 0:
        assert "saved" in done.stdout
        assert "ended at once" not in done.stderr
    elif not (state == "raises" and launched):  # there the second one is the launcher's, and the script ends by itself
        assert done.stderr.splitlines()[-1].startswith("train.py: ended at once by a second ")
        assert "ended at once" in done.stdout
        assert "saved" not in done.stdout
