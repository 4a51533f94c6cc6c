"""Settings of conversion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastdiff.settings import FilePath, Settings, Word


class ConvertSettings(Settings):
    """Writing a network for another program."""

    model_path: FilePath = ""
    """The network: a run's folder, a .pt or .safetensors file, or a folder of diffusers (for pt and safetensors)."""
    preset: str = ""
    """Settings of a published checkpoint by its name, for a file that carries none; without model_path that checkpoint
    is fetched."""
    to: Literal["", "diffusers", "safetensors", "openai", "pt"] = ""
    """diffusers: a folder for its pipelines. safetensors, pt: weights with settings, class names and provenance.
    openai: the bare .pt file for improved-diffusion and guided-diffusion, and the flags that their scripts need."""
    out: Annotated[FilePath, Word()] = ""
    """What is written; a word without a flag gives it as well. A name that ends in .safetensors or .pt is a file, any
    other is a folder, in which a model card lies beside the weights."""
    half: bool = False
    """Round the weights to float16, for a file of half the size."""
    overwrite: bool = False
    """Replace what is there under that name, if convert.py has written it."""
    grid_images: int = Field(0, ge=0)
    """Images to draw for the picture of the model card; 0: the newest grid of the run's samples, if any."""
