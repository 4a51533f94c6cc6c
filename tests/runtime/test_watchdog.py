"""When a rank dies, hangs or fails, every rank ends, and the last line names that rank and the reason."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HELPERS, ROOT, TESTS
from helpers.polling import wait_until

from fastdiff.runtime.files import ProcessId
from fastdiff.runtime.heartbeat import Beat, End, Heartbeat
from fastdiff.runtime.processes import Processes, open_store
from fastdiff.runtime.watchdog import Watchdog, behind

pytestmark = pytest.mark.slow

OPTIONS = "timeout:1 attempts:1"
CASES = [
    *("quiet", "slow", "killed", "killed host", "stopped", "stuck", "bug", "error", "same error", "same late error"),
    *("early error", "asked to stop", "asked twice"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Map each case to the exit codes and the output of both ranks: {"codes": [..], "words": [..]}."""
    done = subprocess.run(
        [sys.executable, str(HELPERS / "watched_ranks.py"), *CASES],
        capture_output=True,
        text=True,
        timeout=300,
        # Stores look up the names of lost clients, which takes 5 s without a name server, or 1 s with these options.
        env={
            **os.environ,
            **{"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "RES_OPTIONS": OPTIONS},
        },
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # pytest shows it if a test fails
    return dict(json.loads(done.stdout))


def last_lines(outcome: dict[str, Any]) -> list[str]:
    return [words.strip().splitlines()[-1] if words.strip() else "" for words in outcome["words"]]


@pytest.mark.parametrize("case", ["quiet", "slow"])
def test_nothing_is_said_where_nothing_is_wrong(case: str, outcomes: dict[str, Any]) -> None:
    """In the case "slow" rank 0 stays at a place for long because it may, and rank 1 waits for it."""
    assert outcomes[case] == {"codes": [0, 0], "words": ["", ""]}


@pytest.mark.parametrize(("case", "lost"), [("killed", 1), ("killed host", 0)])
def test_a_killed_rank(case: str, lost: int, outcomes: dict[str, Any]) -> None:
    """With rank 0 its store dies too, for which torch may print a stack trace first."""
    other = 1 - lost
    assert outcomes[case]["codes"][lost] == -9
    assert outcomes[case]["codes"][other] == 76
    line = last_lines(outcomes[case])[other]
    assert re.fullmatch(
        rf"train\.py: rank {lost} \(\S+, pid \d+\) is gone without a word \(.*\), last at step \d+", line
    )


def test_a_stopped_rank(outcomes: dict[str, Any]) -> None:
    assert outcomes["stopped"]["codes"] == [76, -9]
    (line,) = outcomes["stopped"]["words"][0].splitlines()
    assert re.fullmatch(r"train\.py: rank 1 \(\S+, pid \d+\) gave no sign of life for 8 s, last at step \d+", line)


def test_a_stuck_rank_is_told_from_the_one_that_waits_for_it(outcomes: dict[str, Any]) -> None:
    assert outcomes["stuck"]["codes"] == [76, 76]
    line = last_lines(outcomes["stuck"])[0]
    said = r"is late: no progress for \d+ s at step 50, in watched_ranks\.py:\d+; the others wait for it"
    assert re.fullmatch(rf"train\.py: rank 1 \(\S+, pid \d+\) {said}", line)
    stacks = outcomes["stuck"]["words"][1]
    assert "in happen" in stacks


@pytest.mark.parametrize(("case", "code", "reason"), [("bug", 1, "ValueError: no such key"), ("error", 2, "bad file")])
def test_one_ranks_exception(case: str, code: int, reason: str, outcomes: dict[str, Any]) -> None:
    """The rank itself prints the traceback of a bug, and the other rank only a sentence."""
    assert outcomes[case]["codes"] == [76, code]
    zero, one = outcomes[case]["words"]
    assert re.fullmatch(rf"train\.py: rank 1 \(\S+\) ended: {reason}\n", zero)
    assert ("Traceback" in one) == (case == "bug")
    assert one.strip().endswith("ValueError: no such key" if case == "bug" else "train.py: error on rank 1: bad file")


@pytest.mark.parametrize(("case", "reason"), [("same error", "bad flag"), ("same late error", "disk full")])
def test_the_same_error_on_every_rank_is_said_once(case: str, reason: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[case]["codes"][0] == 2
    if case == "same late error":
        assert outcomes[case]["codes"][1] == 2
        assert outcomes[case]["words"] == [f"train.py: error: {reason}\n", ""]
    else:  # there is no store yet, and rank 1 waits two seconds for the launcher's signal
        assert outcomes[case]["words"][0] == f"train.py: error: {reason}\n"


def test_an_error_before_the_ranks_have_joined(outcomes: dict[str, Any]) -> None:
    assert outcomes["early error"]["codes"] == [76, 2]
    assert "rank 1" in outcomes["early error"]["words"][0]
    assert outcomes["early error"]["words"][0].endswith("ended: no such folder\n")


def test_a_signal_to_one_rank_stops_all(outcomes: dict[str, Any]) -> None:
    said = "train.py: saved after step 50, by a signal to another rank\n"
    assert outcomes["asked to stop"] == {"codes": [75, 75], "words": [said, ""]}


def test_a_second_signal_ends_a_rank_inside_a_collective(outcomes: dict[str, Any]) -> None:
    assert outcomes["asked twice"]["codes"] == [130, 76]
    assert outcomes["asked twice"]["words"][0] == "train.py: ended at once by a second SIGTERM\n"


def beat(rank: int, collectives: int = 0, waits: bool = False) -> Beat:
    process = ProcessId("node-1", 100 + rank, 5)
    idle = time.monotonic()
    return Beat(rank, f"rank {rank}", "node-1", process, "step 3", "loader.py:5", idle, 600, collectives, waits)


@pytest.mark.parametrize(
    ("beats", "late"),
    [
        ([beat(0, 5, True), beat(1, 4, False), beat(2, 5, True)], [1]),
        ([beat(0, 4, False), beat(1, 5, True)], [0]),
        ([beat(0, 5, True), beat(1, 5, False)], [1]),  # equal counts
        ([beat(0, 5, True), beat(1, 5, True)], []),  # the network or a bug: no rank is late
        ([beat(0, 5, False), beat(1, 5, False)], []),
        ([beat(0, 7, False), beat(1, 6, True), beat(2, 6, True)], [0]),  # gloo counts what rank 0 gathered before
    ],
)
def test_who_is_late(beats: list[Beat], late: list[int]) -> None:
    assert [beat.rank for beat in behind(beats)] == late


def start_two() -> list[Heartbeat]:
    """Start two ranks in this process, and wait until each has the other's heartbeat."""
    ranks = [Heartbeat(rank, 2, functools.partial(beat, rank), 0.05) for rank in (0, 1)]
    for heartbeat in ranks:
        heartbeat.thread.start()
    wait_until(lambda: all(heartbeat.peers for heartbeat in ranks))
    return ranks


def stop(ranks: list[Heartbeat]) -> None:
    """End the rank that hosts the store last, or torch would warn that the store is gone."""
    for heartbeat in sorted(ranks, key=lambda heartbeat: heartbeat.hosts):
        heartbeat.close()
        heartbeat.thread.join(20)


def test_heartbeats_from_before_a_restart_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store when it restarts ranks, and with it their last heartbeats."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    before = start_two()
    assert before[1].notify(End("rank 1 ended: no such folder", 2), patience=20)
    wait_until(before[0].ends)
    assert [end.line for _, end in before[0].ends()] == ["rank 1 ended: no such folder"]
    after = start_two()
    read = after[0].at
    wait_until(lambda: after[0].at > read)
    assert not after[0].ends()
    stop([*before, *after])


def test_another_run_at_the_same_port_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a launcher is started twice, ranks of the second run connect to the first one's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    ranks = start_two()
    with pytest.raises(dist.DistStoreError, match="rank 0 did not reach the store"):
        open_store("heartbeat", 1, 2, timedelta(seconds=2))
    stop(ranks)


SUSPENDED = """
import time
from fastdiff.runtime.processes import current
from fastdiff.runtime.watchdog import Watchdog
with Watchdog(current(), stall_seconds=5.0) as watchdog:
    watchdog.progress("step 1")
    print("started", flush=True)
    for _ in range(20):
        time.sleep(0.1)
"""


def test_time_in_which_a_process_was_suspended_is_no_stall() -> None:
    """`scontrol suspend`, for one, stops all processes of a job."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SUSPENDED], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        assert process.communicate() == ("", "")


def test_alone_a_stall_is_reported_and_waited_out(capfd: pytest.CaptureFixture[str]) -> None:
    alone = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    out = ""
    with Watchdog(alone, stall_seconds=0.1) as watchdog:
        watchdog.progress("step 1")
        until = time.monotonic() + 30
        while "keeps waiting" not in out and time.monotonic() < until:
            time.sleep(0.1)
            out += capfd.readouterr().err
    assert "test_alone_a_stall" in out
    assert re.search(r"fastdiff: no progress for \d+ s at step 1; it keeps waiting\n$", out)
