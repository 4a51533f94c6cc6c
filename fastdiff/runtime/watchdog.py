"""Ends this rank when another one has died or hangs, and names that rank and the reason."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from fastdiff.errors import DONE, PEER_LOST, PREEMPTED, USER_ERROR
from fastdiff.runtime.files import ProcessId
from fastdiff.runtime.heartbeat import Beat, End, Heartbeat, collectives, this_machine, where_blocked
from fastdiff.runtime.processes import Processes, agent_hosts_store, store_address
from fastdiff.runtime.script import script_name, set_peers

_SLOW_STORE = 8.0
"""Seconds that an exchange may take: a store that lost a client may first look up the client's name."""


class Timing(NamedTuple):
    """Times in seconds."""

    interval: float | None = None  # between heartbeats; None: 1 for few processes, 5 for many
    silence: float = 40.0  # without a heartbeat, after which a rank is lost; at most stall_seconds
    grace: float = 10.0  # for a rank to end by itself after another one has ended
    linger: float = 5.0  # that rank 0, if it hosts the store, waits for the others at the end


class Watchdog:
    """Watches this rank and, where there are several, the others, in separate threads.

        with Watchdog(processes, stall_seconds=600) as watchdog:
            watchdog.progress("saving", allowed=3600)

    A single process that hangs prints its stacks and keeps waiting. Of several, a rank counts as lost when its process
    is gone, or sends no heartbeat for 40 s, or the store is out of reach; as late when it makes no progress for longer
    than allowed and the others wait for it. Then each rank ends with exit code 76, and one per machine says why.

    After an exception the watch stays on until `run_script` ends the process.
    """

    def __init__(self, processes: Processes, stall_seconds: float = 600.0, timing: Timing | None = None) -> None:
        self.rank, self.alone, self.stall_seconds = processes.rank, processes.world_size == 1, stall_seconds
        self.timing = timing or Timing()
        self.silence = min(self.timing.silence, stall_seconds)
        self.interval = self.timing.interval or min(5.0, max(1.0, processes.world_size / 16))
        self.heartbeat = Heartbeat(self.rank, processes.world_size, self._beat, self.interval)
        self._collectives = 0
        self._reported = 0.0  # the _progress_at of the stall that was reported last
        self._done = threading.Event()
        self._ending = threading.RLock()  # the thread that acquires it ends the process, and never releases it
        self.progress("the start")

    def __enter__(self) -> Watchdog:
        if not self.alone:
            self.heartbeat.thread.start()
            set_peers(self)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.alone:
            self.close()

    def progress(self, place: str, allowed: float | None = None) -> None:
        """Note that the main thread is at `place`, where it may stay `allowed` seconds (stall_seconds by default)."""
        self._place, self._allowed = place, self.stall_seconds if allowed is None else allowed
        self._progress_at = time.monotonic()

    def close(self) -> None:
        """End the watch: this rank's work is finished, and the other ranks need not wait for it."""
        self._ending.acquire()
        self._done.set()
        heartbeat, start = self.heartbeat, time.monotonic()
        while time.monotonic() < start + self.timing.linger and heartbeat.at and not heartbeat.broken:
            others = heartbeat.others() if heartbeat.hosts else []
            if heartbeat.at > start and all(beat.leaves or beat.rank in heartbeat.gone for beat in others):
                break  # the others can read that this rank is done; if the store ends with it, they are done too
            heartbeat.exchange_now()
            time.sleep(0.05)
        heartbeat.close()
        set_peers(None)

    # --- how this rank ends: the protocol fastdiff.runtime.script.Peers ---

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks, and torchrun, why this one ends; the watchdog doesn't end it from here on."""
        self._ending.acquire()
        self._notify(End(f"rank {self.rank} ({socket.gethostname()}) ended: {reason}", code))

    def is_said(self, reason: str, code: int, patience: float) -> bool:
        """Whether rank 0 reports the same reason, or (except for wrong input) code, within `patience` seconds."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            for beat, end in self.heartbeat.ends():
                same = end.line.endswith(f" ended: {reason}") or end.code == code != USER_ERROR
                if beat.rank == 0 and end.about == "itself" and same:
                    return True
            time.sleep(0.05)
        return False

    def explain(self) -> str | None:
        """After a collective failed: the sentence on the rank that ended, or None where every rank is alive."""
        self._ending.acquire()
        heartbeat, line = self.heartbeat, None
        if not heartbeat.at:  # the ranks never connected: the error says why
            return None
        until = time.monotonic() + 5 * self.interval  # each rank that is alive sends a heartbeat before
        while not line and heartbeat.at < until and time.monotonic() < until + _SLOW_STORE:
            time.sleep(0.05)
            ends = heartbeat.ends()
            line = ends[0][1].line if ends else lost(heartbeat, heartbeat.gone, math.inf)
        missed = {beat.rank for beat in heartbeat.others() if heartbeat.at - beat.at > 3 * self.interval}
        line = line or lost(heartbeat, missed, _SLOW_STORE)
        if line:
            self._notify(End(line, PEER_LOST, "lost"))
        return line

    def speaks(self) -> bool:
        """Whether this is the lowest rank on its machine that is still alive and has no other reason to give."""
        others, now = self.heartbeat.others(), time.monotonic()
        ended = {beat.rank for beat, end in self.heartbeat.ends() if end.about == "itself"} | self.heartbeat.gone
        alive = [beat.rank for beat in others if beat.machine == this_machine() and now - beat.at < self.silence]
        return self.rank < min({*alive} - ended, default=self.rank + 1)

    def _notify(self, end: End) -> None:
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": end.line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
        unreachable = self.heartbeat.at and time.monotonic() - self.heartbeat.at > _SLOW_STORE
        if self.heartbeat.notify(end, 0.5 if unreachable else _SLOW_STORE) and self.heartbeat.hosts:
            time.sleep(2 * self.interval)  # the store ends with this process: let the others read

    # --- the watch ---

    def _beat(self) -> Beat:
        if (count := collectives()) != self._collectives:  # entering a collective is progress too
            self._collectives, self._progress_at = count, time.monotonic()
        code, waits = where_blocked()
        idle, done = time.monotonic() - self._progress_at, self._done.is_set()
        name = f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()})"
        process = self.rank, name, this_machine(), ProcessId.own()
        return Beat(*process, self._place, code, idle, self._allowed, count, waits, done)

    def _watch(self) -> None:
        now = time.monotonic()
        while not self._done.wait(min(1.0, self.interval)):
            before, now = now, time.monotonic()
            if now - before > max(5.0, 0.3 * self.silence):
                self._forgive(now - before)
            if self.alone:
                self._report_own_stall(now)
            elif (end := self._judge(now)) and self._ending.acquire(blocking=False):
                self._end(end)

    def _forgive(self, pause: float) -> None:
        """Don't count a time in which this process, or its machine, was suspended."""
        self._progress_at += pause
        self.heartbeat.at += pause if self.heartbeat.at else 0.0
        for beat in self.heartbeat.others():
            beat.at += pause

    def _report_own_stall(self, now: float) -> None:
        idle = now - self._progress_at
        if idle > self._allowed and self._reported != self._progress_at:
            self._reported = self._progress_at
            faulthandler.dump_traceback(all_threads=True)
            _print(f"no progress for {idle:.0f} s at {self._place}; it keeps waiting")

    def _judge(self, now: float) -> End | None:
        """Why this rank must end; None where nothing is wrong."""
        heartbeat = self.heartbeat
        for beat, end in heartbeat.ends():
            if end.about != "itself":
                return end
            if end.code not in (DONE, PREEMPTED) and now - beat.at > self.timing.grace:  # it should have ended by now
                return End(end.line, PEER_LOST, "lost")
        if heartbeat.at and (line := lost(heartbeat, heartbeat.gone, self.silence)):
            return End(line, PEER_LOST, "lost")
        line = late(heartbeat, self._beat())
        return End(line, PEER_LOST, "late") if line else None

    def _end(self, end: End) -> None:
        """End this process from the watchdog's thread."""
        self._notify(end)
        if end.about == "late":
            faulthandler.dump_traceback(all_threads=True)
        if self.speaks():
            _print(end.line)
        sys.stdout.flush()
        os._exit(PEER_LOST)


def _print(line: str) -> None:
    print(f"{script_name() or 'fastdiff'}: {line}", file=sys.stderr, flush=True)


# --- verdicts: a sentence on another rank, or None ---


def lost(heartbeat: Heartbeat, gone: set[int], silence: float) -> str | None:
    """A rank that announced no end and is among `gone`, or was silent for more than `silence` seconds; or the store."""
    for beat in heartbeat.others():
        if beat.rank in gone and not beat.leaves:
            return f"{beat.name} is gone without a word (killed, or its node went down), last at {beat.place}"
        if heartbeat.at - beat.at > silence and not beat.leaves:
            return f"{beat.name} gave no sign of life for {silence:.0f} s, last at {beat.place}"
    host, port = store_address()
    owner = "torchrun" if agent_hosts_store() else "rank 0"
    broken = heartbeat.broken and owner == "torchrun"  # where rank 0 hosts the store it counts among the gone
    if broken or (not heartbeat.broken and time.monotonic() - heartbeat.at > silence):
        return f"{owner}'s store at {host}:{port} gives no answer (killed, or its node or the network is down)"
    return None


def late(heartbeat: Heartbeat, own: Beat) -> str | None:
    """The rank that the others wait for, once it has been idle for longer than allowed."""
    others = heartbeat.others()
    beats = [own, *(beat for beat in others if not beat.done)]
    those = behind(beats)
    overdue = [beat for beat in those or beats if beat.idle > beat.allowed]
    # Other ranks' heartbeats are some seconds old, so all must have been idle for several of them.
    waiting = len(others) == heartbeat.world_size - 1 and all(beat.idle > 4 * heartbeat.interval for beat in beats)
    if those and overdue and waiting:
        beat = max(overdue, key=lambda beat: beat.idle)
        at = f"at {beat.place}" + (f", in {beat.code}" if beat.code else "")
        return f"{beat.name} is late: no progress for {beat.idle:.0f} s {at}; the others wait for it"
    if waiting and len(overdue) == len(beats):
        idle, places = min(beat.idle for beat in beats), sorted({beat.place for beat in beats})
        return (
            f"no rank made progress for {idle:.0f} s, at {' and '.join(places)}; all have entered the same "
            "collectives, so which one delays the others is unknown"
        )
    return None


def behind(beats: list[Beat]) -> list[Beat]:
    """The ranks that have not entered the collective in which the others wait; none where that is unknown.

    A rank that waits in a collective has entered one more than a rank that hasn't reached it. Where all counts are
    equal, or only ranks that wait have the lowest one (gloo also counts what one rank gathers from another), the ranks
    outside of torch.distributed are behind.
    """
    fewest = min(beat.collectives for beat in beats)
    late = [beat for beat in beats if beat.collectives == fewest]
    if len(late) == len(beats) or (all(beat.waits for beat in late) and not all(beat.waits for beat in beats)):
        late = [beat for beat in beats if not beat.waits]
    return late if len(late) < len(beats) else []
