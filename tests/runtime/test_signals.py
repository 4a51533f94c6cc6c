"""SIGTERM and SIGUSR1: noted, counted once when they come together, and the old handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fastdiff.errors import PREEMPTED, StopWith
from fastdiff.runtime import processes, script
from fastdiff.runtime.script import StopSignals, run_script


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


def test_signals_after_the_end_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """After finish() none counts; a script goes on ignoring them, a caller's own process doesn't."""
    old = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested is None
    assert signal.getsignal(signal.SIGTERM) == old
    monkeypatch.setattr(script, "_script", "train.py")
    try:
        with StopSignals() as signals:
            signals.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGTERM, old)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_other_threads_hear_nothing() -> None:
    heard: list[str | None] = []

    def listen() -> None:
        with StopSignals() as signals:
            heard.append(signals.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [None]


def test_a_script_ends_with_the_code_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_joined", False)
    monkeypatch.setattr(script, "_script", "")  # restored at the end of the test, after run_script has set it

    def main() -> None:
        raise StopWith(PREEMPTED, "saved at step 3")

    with pytest.raises(SystemExit) as ended:
        run_script(main, "train.py")
    assert ended.value.code == 75
    assert capsys.readouterr().err == "train.py: saved at step 3\n"
