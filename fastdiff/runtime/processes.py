"""Rank, world size and device of this process, its output folder, and the group, store and consensus of all ranks."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.errors import UserError, blaming
from fastdiff.runtime.machine import number_from_environment
from fastdiff.runtime.paths import expand_path

_POLL = 0.05  # seconds
_joined = False


@dataclass(frozen=True)
class Processes:
    """Rank, world size and device of this process. `rank` counts over all nodes, `local_rank` on this node."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def current() -> Processes:
    """Read the launcher's environment variables (deepspeed, torchrun, srun); without them the process is alone."""
    local_rank = number_from_environment("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return Processes(
        rank=number_from_environment("RANK", 0),
        local_rank=local_rank,
        world_size=number_from_environment("WORLD_SIZE", 1),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )


def join(group: bool = True, timeout: timedelta = timedelta(minutes=30)) -> Processes:
    """`current()`; if there are several processes, also initializes the process group of torch.distributed.

    group=False leaves the group out, for processes that work independently. From here on each process reports its
    own errors. `timeout` applies to every collective and to the start of the group.
    """
    global _joined
    processes = current()
    if group and processes.world_size > 1 and not dist.is_initialized():
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        rank, world_size = processes.rank, processes.world_size
        store = open_store("group", rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    _joined = True
    return processes


def has_joined() -> bool:
    """Whether `join` was called. From then on an error may concern one rank alone, so each rank reports its own."""
    return _joined


def output_folder(setting: str, default: str) -> Path:
    """The folder that a setting names, else that of OPENAI_LOGDIR (improved-diffusion's variable), else the default."""
    with blaming("OPENAI_LOGDIR"):
        return Path(setting or expand_path(os.environ.get("OPENAI_LOGDIR", "")) or default)


def make_writable(folder: Path) -> Path:
    """Create the folder if necessary; UserError if nothing can be written to it."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}); name another folder") from error
    return folder


def agent_hosts_store() -> bool:
    """Whether torchrun's agent hosts the store, so that it outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_address() -> tuple[str, int]:
    """Host and port of the run's store."""
    return os.environ.get("MASTER_ADDR", "localhost"), number_from_environment("MASTER_PORT", 29500)


def open_store(purpose: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The run's key-value store, under a prefix that only the ranks of this start use, and for this purpose only.

    Collective; raises dist.DistStoreError when not all ranks have joined within `timeout`. The store is torchrun's, or
    else rank 0 hosts it: torch lets a process open the same one repeatedly (multi_tenant).

    The prefix is needed because torchrun keeps its store when it restarts ranks, with the addresses of those that
    died, to which a new group can't connect; and because another run on this machine may have the port.
    TORCHELASTIC_RESTART_COUNT doesn't tell starts apart, since nodes count differently. So rank 0 names a round, each
    other rank answers with a random token, and rank 0 publishes the list of tokens: a rank that finds its token in the
    list belongs to that round.
    """
    hosts = rank == 0 and not agent_hosts_store()
    store = dist.TCPStore(*store_address(), is_master=hosts, multi_tenant=True, wait_for_workers=False, timeout=timeout)
    rounds = dist.PrefixStore(f"fastdiff/{purpose}", store)
    until = time.monotonic() + timeout.total_seconds()
    name = _lead(rounds, world_size, until) if rank == 0 else _follow(rounds, rank, until)
    return dist.PrefixStore(name, rounds)


def _lead(store: dist.Store, world_size: int, until: float) -> str:
    name = uuid.uuid4().hex
    store.set("round", name)
    keys = [f"{name}/token/{rank}" for rank in range(1, world_size)]
    for rank, key in enumerate(keys, start=1):
        while not store.check([key]):
            _wait(until, f"rank {rank}")
    store.set(f"{name}/tokens", json.dumps([token.decode() for token in store.multi_get(keys)]))
    return name


def _follow(store: dist.Store, rank: int, until: float) -> str:
    token, answered = uuid.uuid4().hex, ""
    while True:
        name = store.get("round").decode() if store.check(["round"]) else ""
        if name != answered:
            store.set(f"{name}/token/{rank}", token)
            answered = name
        elif name and store.check([tokens := f"{name}/tokens"]) and json.loads(store.get(tokens))[rank - 1] == token:
            return name
        _wait(until, "rank 0")


def _wait(until: float, whom: str) -> None:
    if time.monotonic() > until:
        raise dist.DistStoreError(f"{whom} did not reach the store in time")
    time.sleep(_POLL)


class Consensus:
    """Collects requests of this rank after each step and returns those of all ranks one step later, without waiting.

    The all-reduce of a step runs beside the next step, over a CPU group of its own: it costs the GPU nothing and keeps
    ranks at most one step apart. A lone process gets its requests back at once.
    """

    def __init__(self, world_size: int, requests: int, timeout: timedelta) -> None:
        self._alone = world_size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=timeout)
        self._flags = torch.zeros(requests, dtype=torch.uint8)
        self._known = [False] * requests  # of all ranks, not yet returned
        self._running: Any = None

    def exchange(self, requests: Sequence[bool]) -> list[bool]:
        """Send this step's requests; returns what any rank requested after the step before. Collective."""
        if self._alone:
            return list(requests)
        self.wait()
        agreed, self._known = self._known, [False] * len(self._known)
        self._flags = torch.tensor(requests, dtype=torch.uint8)
        self._running = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def forget(self, *which: int) -> None:
        """Drop requests sent so far that are being served. Collective."""
        self.wait()
        for number in which:
            self._known[number] = False

    def any(self, request: bool) -> bool:
        """Whether any rank requests it now; waits, and leaves the requests of `exchange` alone. Collective."""
        if self._alone:
            return request
        self.wait()
        flag = torch.tensor([request], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def wait(self) -> None:
        """Wait until the last `exchange` is complete on this rank. Collective."""
        if self._running is not None:
            self._running.wait()
            self._running = None
            self._known = [known or bool(flag) for known, flag in zip(self._known, self._flags, strict=True)]
