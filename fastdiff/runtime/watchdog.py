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

from fastdiff.errors import DONE, PEER_LOST, PREEMPTED, USER_ERROR
from fastdiff.runtime.heartbeat import End, Exchange, Sign, behind, collectives, this_machine, where
from fastdiff.runtime.processes import Processes, agent_hosts_store
from fastdiff.runtime.script import script_name, set_peers

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

    # --- how this rank ends: fastdiff.runtime.script.Peers ---

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
            line = first_end(exchange) or vanished(exchange)
            if line is None and exchange.at and exchange.at > failed + 5 * self.interval:
                # Whoever is alive has told that by now.
                line = stopped_telling(exchange) or missing(exchange)
                break
        line = line or unanswered(exchange, failed)
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
        if end := overdue_end(exchange, now, self.timing.grace):
            return end.line, "late" if end.about == "late" else "lost"
        if line := vanished(exchange) or silent(exchange, now, self.silence):
            return line, "lost"
        since = max(self._started, self._progress_at)
        if now - since > max(self.silence, self._allowed) and (line := missing(exchange)):
            return line, "lost"
        return (line, "late") if (line := late(exchange, self._sign(0))) else None

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


def first_end(exchange: Exchange) -> str | None:
    """The first end that a rank told of."""
    return next((end.line for _, end in exchange.others_ends()), None)


def overdue_end(exchange: Exchange, now: float, grace: float) -> End | None:
    """Another rank's end, once this one has had `grace` seconds to run into it.

    At once where it is that of a rank who found a third one lost or late; never that of one that has saved.
    """
    for at, end in exchange.others_ends():
        if end.about != "itself" or (end.code not in (DONE, PREEMPTED) and now - at > grace):
            return end
    return None


def vanished(exchange: Exchange) -> str | None:
    """A rank whose process is gone though it told no end: on this machine, or with the store."""
    others = dict(exchange.peers)
    told = {end.rank for _, end in exchange.others_ends()}
    for rank in sorted(exchange.dead - told):
        if rank in others and not others[rank].sign.done:
            return _without_a_word(others[rank].sign)
    if exchange.broken is None or time.monotonic() - exchange.broken < exchange.interval:
        return None
    host, port = exchange.address
    if agent_hosts_store():
        return f"torchrun's store at {host}:{port} is gone (torchrun was killed there, or its node went down)"
    if 0 in others:
        return None if others[0].sign.done else _without_a_word(others[0].sign)
    return f"rank 0, at {host}:{port}, is gone without a word (killed, or its node went down)"


def stopped_telling(exchange: Exchange) -> str | None:
    """After a broken connection: a rank that missed its last three signs."""
    for _, seen in sorted(exchange.peers.items()):
        if exchange.at and seen.at < exchange.at - 3 * exchange.interval and not seen.sign.done:
            return _without_a_word(seen.sign)
    return None


def unanswered(exchange: Exchange, since: float) -> str | None:
    """After a broken connection: that the store too has given no answer since then."""
    if exchange.at and exchange.at > since:
        return None
    return f"{_host(exchange)} gives no answer any more (killed, or its node or the network is down)"


def silent(exchange: Exchange, now: float, limit: float) -> str | None:
    """A rank that gave no sign of life for more than `limit` seconds, or the store no answer."""
    if exchange.at is None or exchange.broken is not None:
        return None
    others = dict(exchange.peers)
    if now - exchange.at > limit:
        return f"{_host(exchange)} gave no answer for {limit:.0f} s (its node or the network is down)"
    told = {end.rank for _, end in exchange.others_ends()}
    for rank, seen in sorted(others.items()):
        if now - seen.at > limit and not seen.sign.done and rank not in told:
            return f"{seen.sign.who} gave no sign of life for {limit:.0f} s, last at {seen.sign.place}"
    return None


def missing(exchange: Exchange) -> str | None:
    """A rank that never gave a sign of life."""
    if exchange.at is None:
        return None
    absent = [rank for rank in range(exchange.world_size) if rank != exchange.rank and rank not in exchange.peers]
    return f"rank {absent[0]} gave no sign of life since the start" if absent else None


def late(exchange: Exchange, own: Sign) -> str | None:
    """The rank that the others wait for, once it has had its time."""
    others = [seen.sign for seen in list(exchange.peers.values())]
    if len(others) < exchange.world_size - 1:
        return None  # not all have started
    signs = [own, *(sign for sign in others if not sign.done)]
    if those := behind(signs):
        overdue = [sign for sign in those if sign.idle > sign.allowed]
        # The others' signs are some seconds old: only who has waited for long waits for the late one.
        if not overdue or any(sign.idle < 4 * exchange.interval for sign in signs):
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


def _host(exchange: Exchange) -> str:
    """Who has the store, and where."""
    host, port = exchange.address
    if agent_hosts_store():
        return f"torchrun's store at {host}:{port}"
    return f"{exchange.peers[0].sign.who if 0 in exchange.peers else 'rank 0'} at {host}:{port}"


def _without_a_word(sign: Sign) -> str:
    return f"{sign.who} is gone without a word (killed, or its node went down), last at {sign.place}"
