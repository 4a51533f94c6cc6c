"""Writes a network's files: weights as .pt or safetensors, and the folder of diffusers."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastdiff.conversion import to_diffusers
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings
from fastdiff.models.weights import metadata_of, with_info
from fastdiff.runtime.files import atomic_write, sync_path, write_json, write_text

WEIGHTS_OF_DIFFUSERS = "diffusion_pytorch_model.safetensors"


def save_pt(file: Path, state: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a state_dict with torch.save; `info` goes into its metadata, unless it is empty."""
    with atomic_write(file) as content:
        torch.save(with_info(state, info), content)


def save_safetensors(file: Path, state: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors as safetensors, with `info` in the metadata."""
    tensors = {name: value.contiguous() for name, value in state.items()}
    with atomic_write(file) as content:
        # By its name, because the library writes to no open file, and a copy in memory would double what is needed. It
        # puts a file of its own under that name, which the owner alone may read, and doesn't wait for the disk.
        mode = os.fstat(content.fileno()).st_mode
        safetensors.torch.save_file(tensors, content.name, {"format": "pt", **metadata_of(info)})
        os.chmod(content.name, mode)
        sync_path(Path(content.name))


def save_diffusers(
    folder: Path,
    state: dict[str, Tensor],
    settings: BackboneSettings,
    diffusion: DiffusionSettings,
    info: dict[str, Any],
) -> None:
    """Write the files of a pipeline of diffusers into an empty folder."""
    unet, scheduler = folder / "unet", folder / "scheduler"
    unet.mkdir()
    scheduler.mkdir()
    weights = to_diffusers.unet_weights(state, settings, diffusion)
    save_safetensors(unet / WEIGHTS_OF_DIFFUSERS, weights, info)
    write_json(unet / "config.json", to_diffusers.unet_config(settings, diffusion))
    write_json(scheduler / "scheduler_config.json", to_diffusers.scheduler_config(settings, diffusion))
    if to_diffusers.needs_pipeline(settings) or settings.learn_sigma:
        write_text(folder / to_diffusers.PIPELINE, to_diffusers.pipeline_source())
    write_json(folder / "model_index.json", to_diffusers.model_index(settings))


def rounded(state: dict[str, Tensor], file: Path) -> tuple[OrderedDict[str, Tensor], str]:
    """The weights in float16, and a sentence on their change. Raises UserError for values that float16 can't hold."""
    halves = OrderedDict((name, value.half()) for name, value in state.items())
    change = total = 0.0
    for name, value in state.items():
        if not halves[name].isfinite().all():
            raise UserError(
                f"{name} in {file} reaches {value.abs().max():.6g}, and float16 ends at 65504; leave --half out"
            )
        change += float((value.double() - halves[name].double()).square().sum())
        total += float(value.double().square().sum())
    relative = (change / total) ** 0.5 if total else 0.0
    return halves, (
        "all weights are rounded to float16, those of norms and embeddings, too: their relative change is "
        f"{relative:.2g} (root mean square)"
    )


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn errors of writing, such as that of a full disk, into a UserError that names what was to be written."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--out: {out} can't be written ({reason}); nothing was changed") from error
