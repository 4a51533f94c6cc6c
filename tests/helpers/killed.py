"""Dies at a chosen operation of the file system, as a process that is killed there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

OPERATIONS = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that could clean up may run afterwards."""


def killed_after(count: int, work: Callable[[], Any]) -> bool:
    """Call `work`, in which all operations after the first `count` fail; returns whether there was one."""
    left, dead = count, False

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            nonlocal left, dead
            if dead or left == 0:
                dead = True
                raise Killed
            left -= 1
            return real(*args, **kwargs)

        return operate

    with pytest.MonkeyPatch.context() as patched:
        for name in OPERATIONS:
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr(torch, "save", counted(torch.save))
        with suppress(Killed):
            work()
    return dead
