"""What to draw and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.kernel_choice import Kernels
from fastdiff.settings import Settings

Precision = Literal["fp32", "bf16", "fp16"]


class SampleSettings(Settings):
    """Drawing images from a checkpoint."""

    model_path: str = ""
    """The checkpoint: a .pt file, or a folder of checkpoints (its newest EMA is taken)."""
    num_samples: int = Field(10000, ge=1)
    """Images to draw."""
    batch_size: int = Field(16, ge=1)
    """Images at a time, per process."""
    clip_denoised: bool = True
    """Clip the predicted x_0 to [-1, 1] at every step."""
    use_ddim: bool = False
    """DDIM instead of ancestral sampling."""
    eta: float = Field(0.0, ge=0, le=1)
    """Noise of DDIM: 0 none, 1 as much as DDPM."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Image i of a job depends on the seed and i, not on batch size or process count."""
    classes: str = ""
    """Classes to draw in turn, by number or name, e.g. 0,5,7; empty: each image's class at random."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body."""
    kernels: Kernels = "auto"
    """What computes the ops: auto takes Triton kernels on a GPU where they are fast, triton takes them wherever they
    run, reference keeps to PyTorch."""
    fused_convolutions: bool = False
    """Experimental: norms computed inside Triton's 3x3 convolutions instead of beside cuDNN's."""
    use_fp16: bool = False
    """The same as precision fp16."""
    out_dir: str = ""
    """Where files go; empty: the folder in OPENAI_LOGDIR, else runs/samples."""
    grid_images: int = Field(100, ge=0)
    """Images in the PNG grid; 0: no grid."""


class SuperResSampleSettings(SampleSettings):
    """Enlarging images with a super-resolution checkpoint."""

    num_samples: int = Field(10000, ge=1)
    """Images to draw; not given: as many as there are small images. More begin with the first small image again."""
    base_samples: str = ""
    """The small images: an .npz as sample.py writes it (arr_0 images, arr_1 labels), or a folder of images."""
