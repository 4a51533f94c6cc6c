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

from fastdiff.errors import PEER_LOST, USER_ERROR
from fastdiff.runtime import verdicts
from fastdiff.runtime.heartbeat import End, Exchange, Sign, this_machine
from fastdiff.runtime.processes import Processes, script_name, set_peers
from fastdiff.runtime.rendezvous import agent_hosts_store
from fastdiff.runtime.where_blocked import collectives, where

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

    After an exception the block is left with the watch still on, and `run_script` ends the process.
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
            told = told or exchange.at > start
            waits = list(exchange.peers.items()) if hosts else []
            if told and all(seen.sign.done or rank in exchange.dead for rank, seen in waits):
                return
            exchange.exchange_now()
            time.sleep(0.05)

    # --- how this rank ends: fastdiff.runtime.processes.Peers ---

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks, and torchrun, why this one ends; the watch is off from here on."""
        self._take_over()
        line = f"rank {self.rank} ({self._host}) ended: {reason}"
        self._tell_end(End(self.rank, os.getpid(), code, reason, line, about="itself"))

    def is_said(self, reason: str, code: int, patience: float) -> bool:
        """Whether rank 0 says it within `patience` seconds: the same reason, or the same code but for wrong input."""
        until = time.monotonic() + patience
        while self.exchange and time.monotonic() < until:
            ends = [end for _, end in self.exchange.others_ends() if end.rank == 0 and end.about == "itself"]
            if any(end.reason == reason or end.code == code != USER_ERROR for end in ends):
                return True
            time.sleep(0.05)
        return False

    def explain(self) -> str | None:
        """After a collective failed: the sentence on the rank that ended, or None where every rank is alive."""
        self._take_over()
        exchange, failed, line = self.exchange, time.monotonic(), None
        if exchange is None:
            return None
        while line is None and time.monotonic() < failed + 5 * self.interval + _SLOW_STORE:
            time.sleep(0.05)
            line = verdicts.first_end(exchange) or verdicts.vanished(exchange)
            if line is None and exchange.at and exchange.at > failed + 5 * self.interval:
                # Whoever is alive has told that by now.
                line = verdicts.stopped_telling(exchange) or verdicts.missing(exchange)
                break
        line = line or verdicts.unanswered(exchange, failed)
        if line:
            self._tell_verdict(line, "lost")
        return line

    def speaks(self) -> bool:
        """Whether this is the lowest rank on its machine that still gives signs of life."""
        exchange, now = self.exchange, time.monotonic()
        if exchange is None:
            return True
        ended = {end.rank for _, end in exchange.others_ends() if end.about == "itself"} | exchange.dead
        lower = [seen for rank, seen in list(exchange.peers.items()) if rank < self.rank and rank not in ended]
        return not any(seen.sign.machine == self._machine and now - seen.at < self.silence for seen in lower)

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

    # --- what this rank tells ---

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

    # --- the watch ---

    def _watch(self) -> None:
        before = time.monotonic()
        while self._open:
            time.sleep(min(1.0, self.interval))
            now = time.monotonic()
            if now - before > max(5.0, 0.3 * self.silence):
                self._forgive(now, now - before)  # it is this process that was stopped, or its machine
            before = now
            self._look()
            if self.exchange is None:
                self._report_own_stall(now)
            elif (found := self._judge(self.exchange, now)) and self._may_end():
                self._end(*found)

    def _may_end(self) -> bool:
        """Whether this thread is to end the process: the main thread isn't about to, and there is more to do."""
        return self._open and not self._done and self._ending.acquire(blocking=False)

    def _judge(self, exchange: Exchange, now: float) -> tuple[str, Literal["lost", "late"]] | None:
        if end := verdicts.overdue_end(exchange, now, self.timing.grace):
            return end.line, "late" if end.about == "late" else "lost"
        if line := verdicts.vanished(exchange) or verdicts.silent(exchange, now, self.silence):
            return line, "lost"
        since = max(self._started, self._progress_at)
        if now - since > max(self.silence, self._allowed) and (line := verdicts.missing(exchange)):
            return line, "lost"
        return (line, "late") if (line := verdicts.late(exchange, self._sign(0))) else None

    def _forgive(self, now: float, pause: float) -> None:
        self._progress_at += pause
        if self.exchange is None:
            return
        for seen in list(self.exchange.peers.values()):
            seen.at = now
        if self.exchange.at is not None:
            self.exchange.at = now

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
