"""Imports diffusers for tests, also where torchvision doesn't load, and gives its pipelines the noise to use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastdiff.evaluation.fidelity import prepare_torchvision


def import_diffusers() -> ModuleType:
    """Return the package; the test is skipped where it isn't installed."""
    prepare_torchvision()
    return pytest.importorskip("diffusers")


def load_pipeline(folder: Path, kind: str = "DiffusionPipeline") -> Any:
    """Load a pipeline of that class, with the pipeline.py in the folder for DiffusionPipeline."""
    diffusers = import_diffusers()
    own = {"custom_pipeline": str(folder), "trust_remote_code": True} if kind == "DiffusionPipeline" else {}
    pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_of(folder: Path) -> Callable[..., Tensor]:
    """The UNet in a folder as a function of x, timesteps and labels."""
    unet = import_diffusers().UNet2DModel.from_pretrained(folder / "unet", local_files_only=True).eval()

    @torch.no_grad()
    def network(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return unet(x, t, y).sample

    return network


@contextmanager
def given_noise(pipe: Any, noises: list[Tensor]) -> Iterator[None]:
    """Let the pipeline and its scheduler use these noises [B, C, H, W] in turn."""
    left = list(noises)
    modules = [type(each).__module__ for each in (pipe, pipe.scheduler)]
    with ExitStack() as stack:
        for name in modules:
            module = importlib.import_module(name)
            stack.enter_context(mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: left.pop(0)))
        yield
    assert not left
