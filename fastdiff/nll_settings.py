"""What to score."""

from __future__ import annotations

from pydantic import Field

from fastdiff.kernel_choice import Kernels
from fastdiff.sampling.settings import Precision
from fastdiff.settings import Settings


class NllSettings(Settings):
    """Bits per dimension of images under a checkpoint."""

    model_path: str = ""
    """The checkpoint: a .pt file, or a folder of checkpoints (its newest EMA is taken)."""
    preset: str = ""
    """Settings of a published checkpoint by its name, for a .pt file that carries none, e.g. cifar10_uncond."""
    num_samples: int = Field(1000, ge=1)
    """Images to score: the first of the folder's listing."""
    batch_size: int = Field(1, ge=1)
    """Images at a time, per process."""
    clip_denoised: bool = True
    """Clip the predicted x_0 to [-1, 1] at every step."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the noise; an image's noise depends on the seed and its place in the listing."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body."""
    kernels: Kernels = "auto"
    """What computes the ops: auto takes Triton kernels on a GPU where they are fast, triton takes them wherever they
    run, reference keeps to PyTorch."""
    use_fp16: bool = False
    """The same as precision fp16."""
    allow_tf32: bool = False
    """On a GPU, round the factors of float32 products to TF32 (10 bits of mantissa), which is faster: of all matrix
    products and convolutions at precision fp32, else of the time embedding and the last layer."""
    out_dir: str = ""
    """Where the terms go; empty: the folder in OPENAI_LOGDIR, else runs/nll."""
