"""This process among its fellows: rank, device, and how a script starts and ends. Knows no DeepSpeed or models."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastdiff.settings import UserError

_started = False  # once true, an error may be one rank's alone, and each rank reports its own


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


def join(group: bool = True) -> Processes:
    """`current()`, and the process group of torch.distributed when there are several processes.

    Without a group the processes go their own ways from here on, and each reports its own errors.
    """
    global _started
    processes = current()
    if group and processes.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
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
    """Run a script's main. A UserError ends it with one sentence and exit code 2."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    code = 0
    try:
        main()
    except UserError as error:
        who = f"{name}: error" if rank == 0 else f"{name}: error on rank {rank}"
        if rank == 0 or _started:
            print(f"{who}: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr, flush=True)
        code = 130
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    if code:
        sys.stdout.flush()
        # Other ranks may wait in a collective: leave without the clean-up that would wait for them.
        os._exit(code) if _started else sys.exit(code)
