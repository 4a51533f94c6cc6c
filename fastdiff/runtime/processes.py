"""This process among its fellows: rank, device, and how a script starts and ends. Knows no DeepSpeed or models."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from fastdiff import errors as exit_codes
from fastdiff.runtime import script as screen
from fastdiff.runtime.rendezvous import agent_hosts_store, fresh_store
from fastdiff.settings import UserError

_started = False  # once true, an error may be one rank's alone, and each rank reports its own
_script = ""
_peers: Peers | None = None
_SAME_ERROR = 2.0
"""Seconds in which rank 0 makes the same error as this rank, or the launcher, seeing that, ends this rank."""


class StopWith(Exception):
    """Ends a script with an exit code (fastdiff.errors) and one sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Peers(Protocol):
    """What a script's end needs of whoever watches the other ranks: see `fastdiff.runtime.watchdog`."""

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks why this one ends."""

    def is_said(self, reason: str, code: int, patience: float) -> bool:
        """Whether rank 0 says it within `patience` seconds: the same reason, or the same code but for wrong input."""

    def explain(self) -> str | None:
        """One sentence on the rank whose end made this one fail; None where none is known. Waits some seconds."""

    def speaks(self) -> bool:
        """Whether it falls to this rank to say so."""


@dataclass(frozen=True)
class Processes:
    """Where this process stands. `rank` is over all nodes, `local_rank` on this node."""

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
    """This process by the launcher's environment variables (deepspeed, torchrun), or alone without them."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return Processes(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=local_rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )


def script_name() -> str:
    """Name of the script that `run_script` runs; empty where the package is a library."""
    return _script


def set_peers(peers: Peers | None) -> None:
    """Name who watches the other ranks."""
    global _peers
    _peers = peers


def join(group: bool = True, timeout: timedelta = timedelta(minutes=30)) -> Processes:
    """`current()`, and the process group of torch.distributed when there are several processes.

    Without a group the processes go their own ways from here on, and each reports its own errors. timeout is that of
    every collective.
    """
    global _started
    processes = current()
    if group and processes.world_size > 1 and not dist.is_initialized():
        backend, rank, world_size = (
            "nccl" if processes.device.type == "cuda" else "gloo",
            processes.rank,
            processes.world_size,
        )
        if agent_hosts_store():
            store = fresh_store(rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    _started = True
    return processes


def output_folder(setting: str, default: str) -> Path:
    """The folder a setting names, else the one in OPENAI_LOGDIR (improved-diffusion's variable), else the default."""
    return Path(setting or os.environ.get("OPENAI_LOGDIR", "") or default)


def make_writable(folder: Path, flag: str) -> Path:
    """Create the folder if need be; UserError when nothing can be written there."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag}: {folder} can't be written to ({error.strerror}); name another folder") from error
    return folder


def run_script(main: Callable[[], None], name: str) -> None:
    """Run a script's main, and end with one of `fastdiff.errors`.

    A UserError or StopWith ends it with one sentence. Where another rank's end made a collective fail, the last line
    says which rank's and why, instead of a traceback. Whether anybody reads what it prints makes no difference.
    """
    global _script
    _script = name
    with screen.that_may_be_gone():
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        code = _code_of(main)
        if dist.is_initialized() and not code:
            dist.destroy_process_group()
    if code:
        # Other ranks may wait in a collective: leave without the clean-up that would wait for them.
        os._exit(code) if _started or _peers else sys.exit(code)


def _code_of(main: Callable[[], None]) -> int:
    """Run it, say why it ended, and tell the other ranks."""
    try:
        main()
    except UserError as error:
        _say_once(str(error), exit_codes.USER_ERROR, "error")
        return exit_codes.USER_ERROR
    except StopWith as error:
        _say_once(str(error), error.code)
        return error.code
    except KeyboardInterrupt:
        if _peers:
            _peers.report_end("stopped by Ctrl-C", exit_codes.INTERRUPTED)
        print(f"{_script}: stopped", file=sys.stderr, flush=True)
        return exit_codes.INTERRUPTED
    except Exception as error:
        if _peers is None:
            raise
        return _failed(error, _peers)
    return exit_codes.DONE


def _say_once(reason: str, code: int, what: str = "") -> None:
    """Print why this rank ends, unless it is for the reason that rank 0 gives."""
    rank = int(os.environ.get("RANK", "0"))
    if _peers:
        _peers.report_end(reason, code)
    if rank:
        what = f"{what or 'ended'} on rank {rank}"
        if code == exit_codes.USER_ERROR:  # the launcher's signal says that rank 0 has ended, most likely by the same
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _peers and _peers.is_said(reason, code, _SAME_ERROR):
            return
        if not _peers and not _started:
            time.sleep(_SAME_ERROR)
    start = f"{_script}: {what}: " if what else f"{_script}: "
    print(start + reason, file=sys.stderr, flush=True)


def _failed(error: Exception, peers: Peers) -> int:
    """Say what an exception was about, this rank's own or another rank's end; the exit code."""
    if not is_broken_collective(error):
        traceback.print_exception(error)
        peers.report_end(_first_line(error), 1)
        return 1
    line = peers.explain()
    if line is None:
        traceback.print_exception(error)
        line = f"a collective failed, though every rank still gives signs of life: {_first_line(error)}"
        peers.report_end(line, exit_codes.PEER_LOST)
    if peers.speaks():
        print(f"{_script}: {line}", file=sys.stderr, flush=True)
    return exit_codes.PEER_LOST


def is_broken_collective(error: BaseException) -> bool:
    """Whether an exception comes from a collective whose other side failed: gloo and NCCL name themselves."""
    words = ("gloo", "nccl", "processgroup", "connection closed by peer", "connection reset by peer")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
