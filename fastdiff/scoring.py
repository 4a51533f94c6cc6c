"""The variational bound of a folder of images in bits per dimension, which nll.py reports."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
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
from fastdiff.runtime.untrusted import read_npz_array

TERMS = ("vb", "mse", "xstart_mse")


class Kept:
    """What a rank has scored so far, in a file of the output folder, from which the same command goes on.

    describes is JSON of everything that the bounds depend on: the file of another command is not read.
    """

    def __init__(self, folder: Path, processes: Processes, describes: dict[str, Any]) -> None:
        self.path = folder / f".scored_{processes.rank}_of_{processes.world_size}.npz"
        self.digest = hashlib.sha256(json.dumps(describes, sort_keys=True).encode()).hexdigest()
        self.done = 0

    def read_into(self, *arrays: Tensor) -> None:
        """Fill float64 arrays with the file's, and set `done` to the number of images that they count."""
        try:
            most = self.path.stat().st_size + (1 << 20)
            with zipfile.ZipFile(self.path) as archive:
                names = ("digest", "done", *map(str, range(len(arrays))))
                digest, done, *found = (read_npz_array(archive, name, most) for name in names)
            fits = all(each.shape == array.shape for each, array in zip(found, arrays, strict=True))
            if str(digest) == self.digest and fits:
                self.done = int(done)
                for each, array in zip(found, arrays, strict=True):
                    array.copy_(torch.from_numpy(each))
        except Exception:  # there is none, or it is damaged; numpy, zipfile and zlib raise many types
            self.done = 0

    def write(self, done: int, *arrays: Tensor) -> None:
        """Write the arrays, which count `done` images."""
        with atomic_write(self.path, sync=False) as file:
            named = {str(i): array.numpy() for i, array in enumerate(arrays)}
            np.savez(file, digest=np.array(self.digest), done=np.array(done), **named)  # type: ignore[arg-type]
        self.done = done


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
    kept: Kept | None = None,
    say: Callable[[str], None] = print,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute the bound of every image in bits per dimension, [N] in the listing's order, and its mean terms.

    The terms vb, mse and xstart_mse are [T] means over the images, with the largest timestep at index 0. They don't
    depend on the batch size and the number of processes. Images that `kept` counts are left out, and it is written
    after each batch. Collective. Raises NonFiniteBound for the first image whose bound, or a network output that
    contributes to it, is not finite.
    """
    count, steps = loader.num_images, diffusion.num_timesteps
    share = -(-count // processes.world_size)  # images of rank 0
    totals = torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(steps, dtype=torch.float64) for name in TERMS}
    if kept:
        kept.read_into(totals, *sums.values())
        if kept.done:
            say(f"{kept.done} of {share} images were scored before")
    done, passed = 0, kept.done if kept else 0
    bar = tqdm(
        total=share * steps,
        initial=passed * steps,
        unit="evaluation",
        dynamic_ncols=True,
        disable=not processes.is_main or not sys.stderr.isatty(),
    )
    for batch in loader.once():
        if done < passed:
            done += len(batch.positions)
            continue
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
        if kept:
            kept.write(done, totals, *sums.values())
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
