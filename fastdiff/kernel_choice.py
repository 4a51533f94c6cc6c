"""What computes: the setting `kernels` of every script and a CPU's threads, said at the start of a run."""

from __future__ import annotations

from typing import Literal

import torch

from fastdiff import ops
from fastdiff.runtime.threads import use_free_cores
from fastdiff.settings import UserError

Kernels = Literal["auto", "triton", "reference"]


def choose_kernels(
    kernels: Kernels, device: torch.device, fused_convolutions: bool = False, threads_before: int | None = None
) -> list[str]:
    """Switch the ops to the setting, use a CPU's free cores, and say line by line what `device` gets and why.

    threads_before is how many threads a run had that goes on. Raises UserError where Triton's kernels can't run.
    """
    try:
        ops.use(kernels)
        ops.use_fused_convolutions(fused_convolutions)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    threads = [_threads(threads_before)] if device.type == "cpu" else []
    return threads + [f"{choice.op}: {choice.implementation} ({choice.reason})" for choice in ops.choices(device)]


def _threads(before: int | None) -> str:
    count = use_free_cores(before)
    if not before:
        return f"threads: {count}"
    return (
        f"threads: {count}, as before"
        if count == before
        else (f"threads: {count}, where the run had {before}: its numbers differ in their last bits from here on")
    )
