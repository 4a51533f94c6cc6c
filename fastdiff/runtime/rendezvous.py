"""The store in which ranks find each other, also where torchrun has started them anew."""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_ROUND = "fastdiff/round"
_POLL = 0.05  # seconds


def agent_hosts_store() -> bool:
    """Whether the store is torchrun's, and outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """torchrun's store, under a prefix that only the ranks of this start use. Collective.

    torchrun keeps its store when it starts ranks anew, and in it the addresses of those that died: a group that reads
    them can't connect. TORCHELASTIC_RESTART_COUNT is no way out, since nodes count differently. So rank 0 names the
    round, the others answer with words of their own, and who finds its own word in rank 0's list is in that round.
    Raises dist.DistStoreError when not all have come in time.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
    until = time.monotonic() + timeout.total_seconds()
    name = _lead(store, world_size, until) if rank == 0 else _follow(store, rank, until)
    return dist.PrefixStore(f"{_ROUND}/{name}", store)


def _lead(store: dist.TCPStore, world_size: int, until: float) -> str:
    name = uuid.uuid4().hex
    store.set(_ROUND, name)
    keys = [f"{_ROUND}/{name}/word/{rank}" for rank in range(1, world_size)]
    while not store.check(keys):
        _wait(until, "the other ranks")
    words = [value.decode() for value in store.multi_get(keys)]
    store.set(f"{_ROUND}/{name}/words", json.dumps(words))
    return name


def _follow(store: dist.TCPStore, rank: int, until: float) -> str:
    word, answered = uuid.uuid4().hex, ""
    while True:
        name = store.get(_ROUND).decode() if store.check([_ROUND]) else ""
        if name != answered:
            store.set(f"{_ROUND}/{name}/word/{rank}", word)
            answered = name
        elif (
            name and store.check([words := f"{_ROUND}/{name}/words"]) and json.loads(store.get(words))[rank - 1] == word
        ):
            return name
        _wait(until, "rank 0")


def _wait(until: float, whom: str) -> None:
    if time.monotonic() > until:
        raise dist.DistStoreError(f"{whom} did not come to torchrun's store in time")
    time.sleep(_POLL)
