"""What the signs of other ranks come to: who has ended, is gone, silent or late, in a sentence; None if all is well."""

from __future__ import annotations

import time

from fastdiff.errors import DONE, PREEMPTED
from fastdiff.runtime.heartbeat import End, Exchange, Sign
from fastdiff.runtime.rendezvous import agent_hosts_store
from fastdiff.runtime.where_blocked import behind


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
