"""Where a rank is, and which of several ranks it is that the others wait for."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import torch.distributed as dist

from fastdiff.runtime.heartbeat import Sign

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (sysconfig.get_paths()["stdlib"], f"{os.sep}site-packages{os.sep}", "<")


def behind(signs: list[Sign]) -> list[Sign]:
    """Those of the ranks that have not come to the collective in which the others wait; none where it can't be told.

    First by how many collectives each has entered: who waits has entered one more. Then by who isn't inside
    torch.distributed; also where the counts would name ranks that all wait and leave out one that doesn't, for gloo
    counts what one rank gathers from another too.
    """
    fewest = min(sign.collectives for sign in signs)
    late = [sign for sign in signs if sign.collectives == fewest]
    if len(late) == len(signs) or (all(sign.waits for sign in late) and not all(sign.waits for sign in signs)):
        late = [sign for sign in signs if not sign.waits]
    return late if len(late) < len(signs) else []


def collectives() -> int:
    """How many collectives this process has entered, over all process groups."""
    if not dist.is_initialized():
        return 0
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except (RuntimeError, AttributeError):  # a group that doesn't count
            continue
    return count


def where(thread: int | None) -> tuple[str, bool]:
    """Where a thread is, "file.py:line" outside of libraries, and whether it is inside torch.distributed."""
    frame = sys._current_frames().get(thread or 0)
    code, waits, ours = "", False, False
    while frame and not ours:
        name = frame.f_code.co_filename
        waits = waits or f"torch{os.sep}distributed{os.sep}" in name or f"deepspeed{os.sep}comm{os.sep}" in name
        ours = name.startswith(_PACKAGE) or not any(part in name for part in _LIBRARIES)
        if ours or not code:
            code = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return code, waits
