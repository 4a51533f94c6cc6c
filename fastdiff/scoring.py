"""The variational bound of a folder of images in bits per dimension, which nll.py reports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.noise_keys import BOUND
from fastdiff.images.loader import Loader
from fastdiff.runtime.files import atomic_write, remove_partial_files
from fastdiff.runtime.processes import Processes

TERMS = ("vb", "mse", "xstart_mse")


class NonFiniteBound(ValueError):
    """The bound of an image is not finite; the message says which image."""


def score(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    loader: Loader,
    processes: Processes,
    *,
    class_cond: bool,
    clip_denoised: bool,
    seed: int,
    say: Callable[[str], None] = print,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute the bound of every image in bits per dimension, [N] in the listing's order, and its mean terms.

    The terms vb, mse and xstart_mse are [T] means over the images, with the largest timestep at index 0. They don't
    depend on the batch size and the number of processes. Collective. Raises NonFiniteBound for the first image whose
    bound, or a network output that contributes to it, is not finite.
    """
    count, steps = loader.num_images, diffusion.num_timesteps
    share = -(-count // processes.world_size)  # images of rank 0
    totals = torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(steps, dtype=torch.float64) for name in TERMS}
    done = 0
    bar = tqdm(
        total=share * steps,
        unit="evaluation",
        dynamic_ncols=True,
        disable=not processes.is_main or not sys.stderr.isatty(),
    )
    for batch in loader.once():
        x_start = (batch.images.float() / 127.5 - 1).permute(0, 3, 1, 2)
        positions = batch.positions.to(x_start.device)

        def noise(t: int, positions: Tensor = positions, shape: tuple[int, ...] = tuple(x_start.shape[1:])) -> Tensor:
            bar.update(len(positions))
            return ops.image_noise(seed | BOUND, positions, t, shape)

        kwargs = {"y": batch.labels} if class_cond else {}
        watch = torch.zeros(len(positions), device=x_start.device)  # clipping hides an infinite output

        def watched(*args: Any, watch: Tensor = watch, **kwargs: Any) -> Tensor:
            output = model(*args, **kwargs)
            watch += output.sum(dim=(1, 2, 3), dtype=torch.float32)
            return output

        result = diffusion.calc_bpd_loop(watched, x_start, clip_denoised, kwargs, noise)
        bad = (~(result["total_bpd"] + watch).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteBound(f"the bound of image {int(batch.positions[bad[0]])} of the listing is not finite")
        totals[batch.positions] = result["total_bpd"].double().cpu()
        for name in TERMS:
            sums[name] += result[name].double().sum(dim=0).cpu()
        done += len(positions)
        if processes.is_main:
            scored = totals[batch.positions[-1] % processes.world_size :: processes.world_size][:done]
            say(f"{done} of {share} images: {scored.mean():.4f} bits/dim so far")
    bar.close()
    if processes.world_size > 1:
        for tensor in (totals, *sums.values()):
            there = tensor.to(processes.device)
            dist.all_reduce(there)
            tensor.copy_(there.cpu())
    return totals.numpy(), {name: (values / count).numpy() for name, values in sums.items()}


def save_terms(folder: Path, terms: dict[str, np.ndarray]) -> list[Path]:
    """Write vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz, each with arr_0 [T], as improved-diffusion does."""
    remove_partial_files(folder)
    written = [folder / f"{name}_terms.npz" for name in terms]
    for target, values in zip(written, terms.values(), strict=True):
        with atomic_write(target) as file:
            np.savez(file, values)
    return written
