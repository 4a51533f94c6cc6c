"""Leaves the settings of the program that uses fastdiff as a library as they were."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fastdiff.runtime.machine import prepare_cudnn, tf32

_OURS = ("TORCH", "TRITON", "CUBLAS")
"""Beginnings of the names of environment variables that are restored: those that fastdiff or PyTorch may set."""


def default_device() -> torch.device:
    """The current GPU, that of LOCAL_RANK in a process that torchrun started, or the CPU. It doesn't become current."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK", "")
    index = int(local_rank) % torch.cuda.device_count() if local_rank.isdecimal() else torch.cuda.current_device()
    return torch.device("cuda", index)


@contextmanager
def undisturbed(device: torch.device, allow_tf32: bool = False) -> Iterator[None]:
    """Set PyTorch up for networks on `device` within the block, and restore everything afterwards.

    Restored are the states of PyTorch's random generators, number of threads, default dtype and device, current GPU,
    switches of cuDNN, TF32 and deterministic algorithms, filters of warnings, and environment variables.
    """
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    environment = {name: value for name, value in os.environ.items() if name.startswith(_OURS)}
    on_gpu = device.type == "cuda"
    with ExitStack() as settings:
        settings.enter_context(warnings.catch_warnings())
        settings.enter_context(torch.random.fork_rng([device] if on_gpu else []))
        if on_gpu:
            settings.enter_context(torch.cuda.device(device))
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        settings.enter_context(tf32(allow_tf32))
        try:
            torch.set_default_dtype(torch.float32)
            if on_gpu:
                prepare_cudnn()
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic = flags
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            for name in [name for name in os.environ if name.startswith(_OURS)]:
                if name not in environment:
                    del os.environ[name]
            os.environ.update(environment)
