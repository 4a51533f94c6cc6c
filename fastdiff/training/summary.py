"""Lines about a run for its log (classes, parameters, batch, memory), and the dry run, which prints them."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch

from fastdiff.config.sections import Config
from fastdiff.images.labels import describe_classes
from fastdiff.training.trainer import Trainer


def dry_run(config: Config, folder: Path, trainer: Trainer, notes: list[str]) -> None:
    """Take one step and print the time, memory and disk space that a run would take."""
    start = time.perf_counter()
    trainer.take_step()
    metrics = trainer.read_metrics()
    seconds = time.perf_counter() - start
    if not trainer.processes.is_main:
        return
    pictures = ["samples/"] if config.train.sample_interval else []
    names = ("config.json", "log.txt", "progress.csv", "status.json", *pictures, "checkpoints/")
    print(
        "\n".join([*classes_line(config, trainer), *notes]) + "\n"
        f"parameters     {millions(trainer)}\n"
        f"images         {trainer.loader.num_images} ({trainer.loader.loader_name})\n"
        f"batch          {batch_of(trainer)}\n"
        f"first loss     {metrics.get('loss', math.nan):.4f}\n"
        f"first step     {seconds:.1f} s, start-up included\n"
        f"peak memory    {memory_gb(trainer.device):.2f} GB on {trainer.device}\n"
        f"a checkpoint   {trainer.state_bytes / 1e9:.2f} GB\n"
        f"would write    {', '.join(str(folder / name) for name in names)}\n"
        "nothing was written"
    )


def classes_line(config: Config, trainer: Trainer) -> list[str]:
    """The line that lists the classes, or says that labels are given to a model without classes."""
    rule = config.data.labels
    if config.model.class_cond:
        return [describe_classes(trainer.loader.listing)]
    return [] if rule in ("auto", "none") else [f"labels {rule} is not used: the network has no classes (class_cond)"]


def millions(trainer: Trainer) -> str:
    """The number of parameters in millions, such as 120.3M."""
    return f"{sum(shape.numel() for shape in trainer.master_weights.shapes.values()) / 1e6:.1f}M"


def batch_of(trainer: Trainer) -> str:
    """How the batch is split: "128 = 2 processes x 32 images x 2 times"."""
    processes, plan = trainer.processes.world_size, trainer.plan
    many = f"{processes} process{'es' * (processes > 1)}"
    return f"{plan.train.batch_size} = {many} x {plan.micro} images x {plan.accumulation} times"


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the GPU, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # Windows, where only drawing is possible, has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
