"""A sampling job: many images by several processes into one npz, and a picture of the first of them.

Image i depends on the seed and i alone. Each process draws the images rank, rank + world_size, … a batch at a time,
straight into one array on disk that all share; rank 0 then packs it. No process ever holds more than a batch.
"""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.samplers import Step
from fastdiff.models import BackboneSettings
from fastdiff.processes import Processes
from fastdiff.sampling.draw import draw, labels_for
from fastdiff.sampling.pictures import save_grid, to_uint8
from fastdiff.sampling.settings import SampleSettings

Inputs = Callable[[Tensor], dict[str, Tensor]]
"""Extra arguments of the network for images `index` [B] of the job: {"low_res": …}, {"y": …}."""


def run_job(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    model_settings: BackboneSettings,
    settings: SampleSettings,
    processes: Processes,
    folder: Path,
    *,
    chosen: list[int],
    count: int,
    inputs: Inputs | None = None,
    note: str = "",
) -> Path:
    """Draw `count` images into folder/samples_NxHxWxC.npz (arr_0 images uint8, arr_1 labels int64) and a PNG grid.

    chosen  classes to draw in turn; empty: at random. inputs may bring its own labels. Returns the npz's path.
    """
    channels, (height, width) = model_settings.in_channels, model_settings.size_hw
    labelled = model_settings.class_cond
    name = f"samples_{count}x{height}x{width}x{channels}"
    images_file, labels_file = folder / f".{name}.images.npy", folder / f".{name}.labels.npy"
    if processes.is_main:
        np.lib.format.open_memmap(images_file, "w+", np.uint8, (count, height, width, channels)).flush()
        if labelled:
            np.lib.format.open_memmap(labels_file, "w+", np.int64, (count,)).flush()
    processes.barrier()
    images = np.lib.format.open_memmap(images_file, "r+")
    labels = np.lib.format.open_memmap(labels_file, "r+") if labelled else None

    mine = torch.arange(processes.rank, count, processes.world_size)
    with _Progress(count, diffusion.num_timesteps, processes) as progress:
        for index in mine.split(settings.batch_size) if len(mine) else ():  # an empty tensor splits into one part
            there = index.to(processes.device)
            kwargs: dict[str, Any] = inputs(there) if inputs else {}
            if labelled and "y" not in kwargs:
                kwargs["y"] = labels_for(there, chosen, model_settings.num_classes, settings.seed)
            drawn = draw(
                model,
                diffusion,
                there,
                (channels, height, width),
                seed=settings.seed,
                clip_denoised=settings.clip_denoised,
                use_ddim=settings.use_ddim,
                eta=settings.eta,
                model_kwargs=kwargs,
                on_step=partial(progress.step, len(index)),
            )
            images[index.numpy()] = to_uint8(drawn).cpu().numpy()
            if labels is not None:
                labels[index.numpy()] = kwargs["y"].cpu().numpy()
    images.flush()
    if labels is not None:
        labels.flush()
    processes.barrier()

    target = folder / f"{name}.npz"
    if processes.is_main:
        _pack(target, {"arr_0": images_file, **({"arr_1": labels_file} if labelled else {})})
        print(f"{count} images in {target}{note}")
        if settings.grid_images and channels in (1, 3, 4):  # others make no picture
            picture = folder / f"{name}.png"
            _picture(picture, images, labels, min(count, settings.grid_images), len(set(chosen)))
            print(f"the first {min(count, settings.grid_images)} as a picture in {picture}")
        images_file.unlink()
        labels_file.unlink(missing_ok=True)
    processes.barrier()
    return target


def _pack(target: Path, arrays: dict[str, Path]) -> None:
    """The .npy files as one .npz, copied in pieces, whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, file in arrays.items():
            archive.write(file, f"{name}.npy")
    partial.replace(target)


def _picture(path: Path, images: np.ndarray, labels: np.ndarray | None, count: int, classes: int) -> None:
    """A grid of the first images; by class, a row (or several) each, when the classes were chosen."""
    order = np.arange(count) if labels is None else np.argsort(labels[:count], kind="stable")
    per_class = count // classes if classes and count % classes == 0 else None
    save_grid(path, np.asarray(images[:count])[order], columns=per_class)


class _Progress:
    """A bar over network evaluations of all images, as far as this process can see; rank 0 shows it."""

    def __init__(self, count: int, steps: int, processes: Processes) -> None:
        share = -(-count // processes.world_size)
        self.steps, self.share, self.done = steps, share, 0.0
        self.started = self.spoken = time.monotonic()
        self.speaks = processes.is_main and not sys.stderr.isatty()
        self.bar = tqdm(
            total=share,
            unit="image",
            dynamic_ncols=True,
            disable=not processes.is_main or not sys.stderr.isatty(),
            bar_format="{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]",
        )

    def step(self, images: int, step: Step) -> None:
        self.bar.update(images / self.steps)
        self.done += images / self.steps
        now = time.monotonic()
        if self.speaks and now - self.spoken >= 30:  # a log file gets a line now and then instead of a bar
            rate = self.done / (now - self.started)
            left = int((self.share - self.done) / rate)
            print(f"{self.done:.1f} of {self.share} images, {rate:.3g} images/s, {left} s left", flush=True)
            self.spoken = now

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
