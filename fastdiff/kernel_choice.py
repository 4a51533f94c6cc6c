"""What computes: the setting `kernels` of every script and a CPU's threads, said at the start of a run."""

from __future__ import annotations

from typing import Literal

import torch

from fastdiff import ops
from fastdiff.settings import UserError
from fastdiff.threads import use_free_cores

Kernels = Literal["auto", "triton", "reference"]


def choose_kernels(kernels: Kernels, device: torch.device, fused_convolutions: bool = False) -> list[str]:
    """Switch the ops to the setting, use a CPU's free cores, and say line by line what `device` gets and why.

    Raises UserError where Triton's kernels can't run.
    """
    try:
        ops.use(kernels)
        ops.use_fused_convolutions(fused_convolutions)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    threads = [f"threads: {use_free_cores()}"] if device.type == "cpu" else []
    return threads + [f"{choice.op}: {choice.implementation} ({choice.reason})" for choice in ops.choices(device)]
