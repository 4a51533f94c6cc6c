"""Two rows of bench_train.py: a variant's rate over a minute in one go, and ours fed with JPEG files by its loader."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_data import make_pictures
from benchmarks.train_variants import Case, SameBatch, Step, exact, trainer_of
from benchmarks.variant_timing import build, few_objects_to_collect, seconds_of, synchronize
from fastdiff.errors import blaming
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings

WINDOW = 10.0
"""Seconds at both ends of a sustained run whose rates are given apart; at most a third of the run."""


def sustained(make: Callable[[], Step], case: Case, seconds: float) -> dict[str, Any]:
    """The images per second of a variant that takes steps for so many seconds without a pause.

    A GPU's clock falls as it warms up, which short rounds don't show. The host waits for the device once a second, to
    note the time. clocks holds nvidia-smi's MHz, degrees Celsius and watts in the first and in the last window.
    """
    built = build(make, case.device)
    window = min(WINDOW, seconds / 3)
    marks, clocks = [(0.0, 0)], [ask_clocks(case.device), None]
    with few_objects_to_collect():
        count = max(1, round(min(1.0, window / 4) / seconds_of(built.step)))
        begin = time.perf_counter()
        while marks[-1][0] < seconds:
            for _ in range(count):
                built.step()
            synchronize()
            marks.append((time.perf_counter() - begin, marks[-1][1] + count))
            if clocks[1] is None and marks[-1][0] > seconds - window / 2:
                clocks[1] = ask_clocks(case.device)
    end = marks[-1][0]
    first = next(mark for mark in marks if mark[0] >= window)
    last = next(mark for mark in reversed(marks) if mark[0] <= end - window)
    rate = lambda a, b: case.batch * (b[1] - a[1]) / (b[0] - a[0])
    return {
        "seconds": end,
        "window_seconds": window,
        "images_per_second": rate(marks[0], marks[-1]),
        "first": rate(marks[0], first),
        "last": rate(last, marks[-1]),
        "clocks": [read_clocks(asked) for asked in clocks],
    }


def ask_clocks(device: torch.device) -> subprocess.Popen[str] | None:
    """Start nvidia-smi, which takes tenths of a second, without waiting for it; None without a GPU or without it."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    fields = "--query-gpu=clocks.sm,temperature.gpu,power.draw"
    argv = ["nvidia-smi", f"--id=GPU-{uuid}", fields, "--format=csv,noheader,nounits"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def read_clocks(asked: subprocess.Popen[str] | None) -> list[float] | None:
    """[MHz, °C, W] that nvidia-smi said; None if it didn't."""
    if asked is None:
        return None
    try:
        return [float(word) for word in asked.communicate(timeout=30)[0].split(",")]
    except (ValueError, subprocess.TimeoutExpired):
        asked.kill()
        return None


@contextmanager
def pictures(given: Path | None, size: int) -> Iterator[Path]:
    """The folder of JPEG files that is given, or a temporary one with made-up files: photos, or for 32x32 tiny ones."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny = size <= 32
        yield make_pictures(Path(folder) / "images", 1024 if tiny else 128, *((32, 32) if tiny else (375, 500)))


def with_loader(case: Case, folder: Path, seconds: float, settings: dict[str, bool]) -> dict[str, Any]:
    """Ours with batches that its loader reads and decodes during training, beside ours with one batch in memory.

    `settings` are those of the trainer.

    waiting is the share of the time in which the host waits for a batch, data_wait in a run's log. Where the host is
    ahead of a GPU, a short wait delays nothing, so the rates say more: rounds of both take turns.
    """
    model = case.config.model
    place = {"size_hw": model.size_hw, "channels": model.in_channels, "batch_size": case.batch, "device": case.device}
    with blaming("--images"):
        loader = open_images(DataSettings(data_dir=str(folder)), **place)  # type: ignore[arg-type]
    with loader:
        trainer = trainer_of(case, **settings)
        same = SameBatch(case.images, case.labels)
        step = exact(trainer.take_step)
        count = max(1, round(seconds / 3 / seconds_of(build(lambda: step, case.device).step)))
        times: dict[str, list[float]] = {"loader": [], "memory": []}
        waited = 0.0
        for i in range(4):
            for name, source in (("loader", loader), ("memory", same)):
                trainer.loader = source  # type: ignore[assignment]
                before = trainer.waited
                each = seconds_of(step, count)
                if i:  # the first round fills the loader's queue
                    times[name].append(each)
                    waited += trainer.waited - before if name == "loader" else 0.0
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "loader": loader.loader_name,
        "images_per_second": case.batch / medians["loader"],
        "from_memory": case.batch / medians["memory"],
        "waiting": waited / (count * sum(times["loader"])),
        "step_ms": 1e3 * medians["loader"],
    }
