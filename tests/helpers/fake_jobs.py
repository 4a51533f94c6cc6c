"""Sampling jobs without a network: images computed from their numbers, and processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.runtime.processes import Processes
from fastdiff.sampling.job import progress
from fastdiff.sampling.job.chunks import Range
from fastdiff.sampling.job.claims import Claims
from fastdiff.sampling.job.job import run_job
from fastdiff.sampling.job.manifest import Job
from fastdiff.sampling.pictures import Draw, Images

SHAPE = (4, 6, 3)
CLASSES = ["ape", "big bee", "cat_2", "dog", "ünd"]


def images(index: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Make images [n, H, W, C] uint8 whose pixels all depend on their numbers [n]."""
    place = np.arange(np.prod(shape)).reshape(shape)
    return ((index[:, None, None, None] * 7919 >> place % 11) + place * 13).astype(np.uint8)


def labels(index: np.ndarray) -> np.ndarray:
    return (index * 7 // 3 % len(CLASSES)).astype(np.int64)


def drawing(
    labelled: bool = True,
    pause: float = 0.0,
    shape: tuple[int, int, int] = SHAPE,
    told: Callable[[np.ndarray], None] = lambda index: None,
) -> Draw:
    """Return a draw function that first calls `told` with the numbers and takes `pause` seconds per image."""

    def draw(index: np.ndarray, on_progress: Callable[[float], None]) -> Images:
        told(index)
        for _ in index:
            time.sleep(pause)
            on_progress(1.0)
        return Images(images(index, shape), labels(index) if labelled else None)

    return draw


def tracing(index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    final = images(index)
    return [np.full_like(final, 40 * step) for step in range(3)], final


def job(count: int = 23, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "identity": {"seed": 0, "solver": "ddim", "model_path": "sha256:abc"},
        "shape": SHAPE,
        "labelled": True,
        "seed": 0,
        "chunk_size": 5,
        "save_as": ("npz",),
        "grid_images": 0,
        "grid_classes": 0,
        "class_names": CLASSES,
        "trajectory": 0,
        **changes,
    }
    return Job(count=count, **given)


def place(rank: int = 0, world_size: int = 1) -> Processes:
    return Processes(rank, rank, world_size, torch.device("cpu"))


def run(folder: Path, job: Job, **changes: Any) -> list[Range]:
    """Run the job in this process, and return the ranges that it drew."""
    drawn: list[Range] = []
    told = lambda index: drawn.append(Range(int(index[0]), int(index[-1]) + 1))
    run_job(drawing(job.labelled, shape=job.shape, told=told), job, place(), folder, trace=tracing, **changes)
    return drawn


def check_npz(folder: Path, count: int, labelled: bool = True, seed: int = 0) -> None:
    """Assert that the npz is exactly what one undisturbed process would make."""
    index = np.arange(count)
    with np.load(folder / f"samples_{count}x4x6x3.npz", allow_pickle=False) as content:
        assert set(content) == {"arr_0", "seed", "index"} | ({"arr_1", "class_names"} if labelled else set())
        np.testing.assert_array_equal(content["arr_0"], images(index), strict=True)
        np.testing.assert_array_equal(content["index"], index, strict=True)
        np.testing.assert_array_equal(content["seed"], np.array(seed), strict=True)
        if labelled:
            np.testing.assert_array_equal(content["arr_1"], labels(index), strict=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- other processes ---

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fastdiff.sampling.job.job"])  # import torch once for all of them


def start(folder: Path, job: Job, **how: Any) -> Any:
    """Start a process that draws the job; `how` holds arguments of `work`."""
    process = context.Process(target=work, args=(str(folder), job), kwargs=how, daemon=True)
    process.start()
    return process


def hold(folder: str, name: str) -> None:
    """Claim a piece of work and keep the claim until the process is killed."""
    assert Claims(Path(folder)).take(name, 0)
    time.sleep(600)


def work(
    folder: str,
    job: Job,
    rank: int = 0,
    world_size: int = 1,
    pause: float = 0.0,
    killed_at: int = 0,
    log: str = "",
    often: float = 0.02,
    overwrite: bool = False,
) -> None:
    """Run the job. killed_at = n > 0 kills the process at its n-th opening, renaming or removal of a file."""
    progress.LOOK = often
    sys.stdout = sys.stderr = open(log or os.devnull, "a", buffering=1)  # noqa: SIM115
    if killed_at:
        steps = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
                steps += any(isinstance(word, (str, os.PathLike)) and folder in str(word) for word in arguments[:2])
                if steps == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    told = lambda index: print(f"draws {index[0]} to {index[-1]}")
    run_job(
        drawing(job.labelled, pause, told=told),
        job,
        place(rank, world_size),
        Path(folder),
        overwrite=overwrite,
        trace=tracing,
    )
    print("done")
