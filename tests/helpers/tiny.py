"""Helpers for tests of the scripts: tiny networks, checkpoints and pictures, and error messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.diffusion import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, UNetSettings, build_model, weights
from fastdiff.models.classifier import Classifier, build_classifier
from fastdiff.models.classifier_settings import ClassifierSettings

Main = Callable[[list[str]], None]
M = TypeVar("M", bound=nn.Module)

MODEL: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
}
SUPER_RES: dict[str, Any] = {
    **{name: value for name, value in MODEL.items() if name != "image_size"},
    "large_size": 16,
    "small_size": 8,
    "attention_resolutions": "8",
}
CLASSIFIER: dict[str, Any] = {
    "image_size": 8,
    "classifier_width": 64,
    "classifier_channel_mult": "1,2",
    "classifier_depth": 1,
    "classifier_attention_resolutions": "4",
    "num_classes": 3,
}
DIFFUSION: dict[str, Any] = {"diffusion_steps": 6, "noise_schedule": "cosine"}


def flags(settings: dict[str, Any]) -> list[str]:
    """Convert {"lr": 1} to ["--lr", "1"]."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def random_model(settings: BackboneSettings, seed: int = 0) -> UNet:
    """Make a network without zero weights, as after training: the output of a new network is always zero."""
    return fill_randomly(build_model(settings), seed)


def classifier(**changes: Any) -> Classifier:
    return fill_randomly(build_classifier(ClassifierSettings(**{**CLASSIFIER, **changes})))


def fill_randomly(model: M, seed: int = 0) -> M:
    """Give a network's weights random values, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim < 2 else 1.2 / parameter[0].numel() ** 0.5
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * spread
                + (name.endswith("0.weight") and parameter.ndim == 1)
            )
    return model.eval()


def unet(**changes: Any) -> UNet:
    return random_model(UNetSettings(**{**MODEL, **changes}))


def super_res(**changes: Any) -> UNet:
    return random_model(SuperResSettings(**{**SUPER_RES, **changes}))


def info_for(model: UNet | Classifier, class_names: Sequence[str] = (), **diffusion: Any) -> dict[str, Any]:
    """Return the metadata of a training run's checkpoint."""
    kinds = {SuperResSettings: "super_res", ClassifierSettings: "classifier"}
    return {
        "kind": kinds.get(type(model.settings), "unet"),
        "model": model.settings.model_dump(mode="json"),
        "diffusion": DiffusionSettings(**{**DIFFUSION, **diffusion}).model_dump(mode="json"),
        "class_names": list(class_names),
    }


def save(model: UNet | Classifier, path: Path, class_names: Sequence[str] = (), **diffusion: Any) -> Path:
    """Save a checkpoint with settings; `diffusion` holds changes to DIFFUSION."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights.with_info(model.state_dict(), info_for(model, class_names, **diffusion)), path)
    return path


def save_bare(model: nn.Module, path: Path) -> Path:
    """Save a checkpoint as another program writes it: the weights without settings."""
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path


def pictures(folder: Path, names: Sequence[str], size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Write PNGs of random pixels, and return the pixels [N, H, W, C]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(names), size, size, channels), dtype=np.uint8)
    for name, image in zip(names, pixels, strict=True):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0] if channels == 1 else image).save(file)
    return pixels


def refusal(main: Main, argv: Sequence[object]) -> str:
    """Return the error message, a single line, with which a script rejects its arguments."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in argv])
    message = str(caught.value)
    assert message == message.strip(), message
    assert "\n" not in message, message
    assert "Traceback" not in message, message
    return message


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path below a folder, with its size and modification time."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Assert that the block creates, changes and removes no file below the folder."""
    before = files(folder)
    yield
    assert files(folder) == before


class RunsCode:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference divided by the norm of `want`, in float64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
