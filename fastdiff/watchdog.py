"""Ends this rank when another one has died or hangs, and names the one and the reason."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdiff.exit_codes import DONE, PEER_LOST, PREEMPTED
from fastdiff.processes import Processes, script_name, set_peers
from fastdiff.rendezvous import agent_hosts_store
from fastdiff.signs_of_life import End, Exchange, Seen, Sign, this_machine
from fastdiff.stalls import behind, collectives, where

_SLOW_STORE = 8.0
"""Seconds that an exchange may take: a store that lost a client may look up that one's name before it goes on."""


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    interval: float | None = None
    """Between signs of life; None: 1 for few processes, 5 for many."""
    silence: float = 40.0
    """Without a sign of a rank, after which it counts as lost; at most stall_seconds."""
    grace: float = 10.0
    """For a rank to end by itself after another one has."""
    linger: float = 5.0
    """That the rank which hosts the store waits for the others at the end."""


class Watchdog:
    """Watches this rank and, where there are several, the others, from threads of its own.

        with Watchdog(processes, stall_seconds=600) as watchdog:
            watchdog.progress("saving", allowed=3600)

    With one process it says on stderr where that hangs, and waits on. With several a rank counts as lost when its
    process is gone, or it gives no sign of life for 40 s, or the store is out of reach; as late when it made no
    progress for as long as it may, and the others wait for it. Then each rank ends with exit code 76, and one says why.

    After an exception the block is left with the watch still on, and `fastdiff.processes.run_script` ends the process.
    """

    def __init__(self, processes: Processes, stall_seconds: float = 600.0, timing: Timing | None = None) -> None:
        self.rank, self.world_size, self.stall_seconds = processes.rank, processes.world_size, stall_seconds
        self.timing = timing or Timing()
        self.silence = min(self.timing.silence, stall_seconds)
        self.interval = self.timing.interval or min(5.0, max(1.0, processes.world_size / 16))
        self._host, self._machine = socket.gethostname(), this_machine()
        self._main = threading.main_thread().ident
        self._place, self._allowed, self._progress_at = "the start", stall_seconds, time.monotonic()
        self._collectives = 0
        self._done = False
        self._ending = threading.Lock()  # held by whoever ends the process, for good
        self._took_over = False
        self._open = True
        self._reported_stall = False
        self._started = time.monotonic()
        self.exchange: Exchange | None = None

    def __enter__(self) -> Watchdog:
        self._started = self._progress_at = time.monotonic()
        if self.world_size > 1:
            self.exchange = Exchange(self.rank, self.world_size, self._sign, self.interval)
            set_peers(self)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.world_size == 1:
            self.close()

    def progress(self, place: str, allowed: float | None = None) -> None:
        """The main thread has come to `place`, where it may stay `allowed` seconds (stall_seconds by default)."""
        self._place, self._allowed = place, self.stall_seconds if allowed is None else allowed
        self._progress_at = time.monotonic()

    def close(self) -> None:
        """This rank has nothing more to do: nobody misses it from here on."""
        self._done = True
        if self.exchange:
            self._linger(self.exchange)
            self.exchange.close()
            set_peers(None)
        self._open = False

    def _linger(self, exchange: Exchange) -> None:
        """Let the others know, and where the store goes with this rank, until they are done too."""
        start, told = time.monotonic(), False
        exchange.exchange_now()
        hosts = self.rank == 0 and not agent_hosts_store()
        while time.monotonic() - start < self.timing.linger and not exchange.broken and exchange.at:
            told = told or exchange.at > start + 0.02
            waits = self._others() if hosts else {}
            if told and all(seen.sign.done or rank in exchange.dead for rank, seen in waits.items()):
                return
            exchange.exchange_now()
            time.sleep(0.05)

    # --- how this rank ends: fastdiff.processes.Peers ---

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks, and torchrun, why this one ends; the watch is off from here on."""
        self._take_over()
        line = f"rank {self.rank} ({self._host}) ended: {reason}"
        self._tell_end(End(self.rank, os.getpid(), code, reason, line, about="itself"))

    def is_said(self, reason: str, patience: float) -> bool:
        """Whether rank 0 ends for the same reason within `patience` seconds."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if any(end.rank == 0 and end.reason == reason for _, end in self._ends()):
                return True
            time.sleep(0.05)
        return False

    def explain(self) -> str | None:
        """After a collective failed: the sentence on the rank that ended, or None where every rank is alive."""
        self._take_over()
        failed, line = time.monotonic(), None
        while line is None and time.monotonic() < failed + 5 * self.interval + _SLOW_STORE:
            time.sleep(0.05)
            line = self._known_end() or self._vanished()
            at = self.exchange.at if self.exchange and self.exchange.at else failed
            read = at > failed + 5 * self.interval  # time for some signs of everybody who is alive
            silent = [s for s in self._others().values() if read and s.at < at - 3 * self.interval and not s.sign.done]
            if line is None and silent:
                line = _without_a_word(silent[0].sign)
            if read and line is None:
                return None
        if line:
            self._tell_verdict(line, "lost")
        return line

    def speaks(self) -> bool:
        """Whether this is the lowest rank on its machine that still gives signs of life."""
        now, exchange = time.monotonic(), self.exchange
        ended = {end.rank for _, end in self._ends() if end.about == "itself"}
        for rank, seen in self._others().items():
            fresh = now - seen.at < self.silence and not (exchange and rank in exchange.dead)
            if rank < self.rank and fresh and rank not in ended and seen.sign.machine == self._machine:
                return False
        return True

    def _take_over(self) -> None:
        """From here on this thread ends the process; the other one, if it was first, ends it at any moment."""
        if not self._took_over and not self._ending.acquire(blocking=False):
            time.sleep(60)
        self._took_over = True

    def _tell_verdict(self, line: str, about: Literal["lost", "late"]) -> None:
        self._tell_end(End(self.rank, os.getpid(), PEER_LOST, line, line, about))

    def _tell_end(self, end: End) -> None:
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": end.line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
        if not self.exchange:
            return
        hosts = self.rank == 0 and not agent_hosts_store()
        patience = 0.0 if hosts else 2.0  # before there is a store
        if self.exchange.at:
            patience = _SLOW_STORE if time.monotonic() - self.exchange.at < _SLOW_STORE else 0.5
        told = self.exchange.send(end, patience)
        if told and hosts:
            time.sleep(2 * self.interval)  # the store goes with this process: let the others read

    # --- what is known of the others ---

    def _sign(self, beat: int) -> Sign:
        self._look()
        idle = time.monotonic() - self._progress_at
        code, waits = where(self._main)
        return Sign(
            self.rank, self._host, self._machine, os.getpid(), beat, self._place, code, idle, self._allowed,
            self._collectives, waits, self._done,
        )  # fmt: skip

    def _look(self) -> None:
        """Entering a collective is progress too."""
        count = collectives()
        if count != self._collectives:
            self._collectives, self._progress_at = count, time.monotonic()

    def _others(self) -> dict[int, Seen]:
        return dict(self.exchange.peers) if self.exchange else {}

    def _ends(self) -> list[tuple[float, End]]:
        ends = list(self.exchange.ends) if self.exchange else []
        return [(at, end) for at, end in ends if end.rank != self.rank]

    def _known_end(self) -> str | None:
        """The first end that a rank told of."""
        return next((end.line for _, end in self._ends()), None)

    def _vanished(self) -> str | None:
        """A rank whose process is gone though it told no end, on this machine or with the store."""
        exchange, others = self.exchange, self._others()
        if exchange is None:
            return None
        told = {end.rank for _, end in self._ends()}
        for rank in sorted(exchange.dead - told):
            if rank in others and not others[rank].sign.done:
                return _without_a_word(others[rank].sign)
        if exchange.broken is None or time.monotonic() - exchange.broken < self.interval:
            return None
        host, port = exchange.address
        if agent_hosts_store():
            return f"torchrun's store at {host}:{port} is gone (torchrun was killed there, or its node went down)"
        if 0 in others:
            return None if others[0].sign.done else _without_a_word(others[0].sign)
        return f"rank 0, at {host}:{port}, is gone without a word (killed, or its node went down)"

    def _silent(self, now: float) -> str | None:
        """A rank that gave no sign of life for too long."""
        exchange, others, limit = self.exchange, self._others(), self.silence
        if exchange is None:
            return None
        if exchange.at is not None and exchange.broken is None and now - exchange.at > limit:
            who = "torchrun's store" if agent_hosts_store() or 0 not in others else others[0].sign.who
            host, port = exchange.address
            return f"{who} at {host}:{port} gave no answer for {limit:.0f} s (its node or the network is down)"
        told = {end.rank for _, end in self._ends()}
        for rank, seen in sorted(others.items()):
            if now - seen.at > limit and not seen.sign.done and rank not in told and exchange.broken is None:
                return f"{seen.sign.who} gave no sign of life for {limit:.0f} s, last at {seen.sign.place}"
        if now - self._started > max(limit, self._allowed) and exchange.at is not None:
            missing = [rank for rank in range(self.world_size) if rank != self.rank and rank not in others]
            if missing:
                return f"rank {missing[0]} gave no sign of life since the start {now - self._started:.0f} s ago"
        return None

    # --- the watch ---

    def _watch(self) -> None:
        before = time.monotonic()
        while self._open:
            time.sleep(min(1.0, self.interval))
            now = time.monotonic()
            if now - before > max(5.0, 0.3 * self.silence):
                self._forgive(now)  # it is this process that was stopped, or its machine
            before = now
            self._look()
            line: str | None
            about: Literal["lost", "late"] = "lost"
            if told := self._overdue_end(now):
                line, about = told.line, "late" if told.about == "late" else "lost"
            elif not (line := self._vanished() or self._silent(now)):
                line, about = self._late(now), "late"
            if line and self._open and not self._done and self._ending.acquire(blocking=False):
                self._end(line, about)

    def _forgive(self, now: float) -> None:
        for seen in self._others().values():
            seen.at = now
        if self.exchange and self.exchange.at is not None:
            self.exchange.at = now

    def _overdue_end(self, now: float) -> End | None:
        """Another rank's end, once this one has had time to run into it. One that has saved doesn't end the others."""
        for at, end in self._ends():
            if end.about != "itself" or (end.code not in (DONE, PREEMPTED) and now - at > self.timing.grace):
                return end
        return None

    def _late(self, now: float) -> str | None:
        """The rank that the others wait for, once it has had its time."""
        if self.world_size == 1:
            self._report_own_stall(now)
            return None
        signs = [self._sign(0)]
        for seen in self._others().values():
            if not seen.sign.done:
                signs.append(seen.sign)
        if len(self._others()) < self.world_size - 1:
            return None  # not all have started
        late = behind(signs)
        if late:
            overdue = [sign for sign in late if sign.idle > sign.allowed]
            # The others' signs are some seconds old: only who has waited for long waits for the late one.
            if not overdue or any(sign.idle < 4 * self.interval for sign in signs):
                return None
            sign = max(overdue, key=lambda sign: sign.idle)
            at = f"at {sign.place}" + (f", in {sign.code}" if sign.code else "")
            return f"{sign.who} is late: no progress for {sign.idle:.0f} s {at}; the others wait for it"
        if any(sign.idle <= sign.allowed for sign in signs):
            return None
        idle, places = min(sign.idle for sign in signs), sorted({sign.place for sign in signs})
        return (
            f"no rank made progress for {idle:.0f} s, at {' and '.join(places)}; which one holds the others up can't "
            "be told, all have entered the same collectives"
        )

    def _report_own_stall(self, now: float) -> None:
        idle = now - self._progress_at
        if idle < self._allowed:
            self._reported_stall = False
        elif not self._reported_stall:
            self._reported_stall = True
            faulthandler.dump_traceback(all_threads=True)
            name = script_name() or "fastdiff"
            print(f"{name}: no progress for {idle:.0f} s at {self._place}; it waits on", file=sys.stderr, flush=True)

    def _end(self, line: str, about: Literal["lost", "late"]) -> None:
        """End this process from the watchdog's thread."""
        self._tell_verdict(line, about)
        if about == "late":
            faulthandler.dump_traceback(all_threads=True)
        if self.speaks():
            print(f"{script_name() or 'fastdiff'}: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(PEER_LOST)


def _without_a_word(sign: Sign) -> str:
    return f"{sign.who} is gone without a word (killed, or its node went down), last at {sign.place}"
