"""Settings of sampling and of likelihood evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fastdiff.diffusion.schedules import Spacing
from fastdiff.diffusion.solvers import SOLVERS, Solver
from fastdiff.ops import Kernels
from fastdiff.settings import Affects, BatchSize, FilePath, Floats, Settings, Switch, Words

IMAGES, NETWORK, BATCH = Affects("images"), Affects("network"), Affects("batch")
"""Marks of settings by what they affect: the images that are drawn, the networks and their arithmetic, the batch size.
Unmarked settings say where files go, or how the same images are computed."""
Precision = Literal["fp32", "bf16", "fp16"]
FORMATS = ("npz", "png", "zip", "tar")


class DrawSettings(Settings):
    """What all sampling jobs have in common."""

    model_path: Annotated[FilePath, NETWORK] = ""
    """The checkpoint: a .pt file, or a folder of checkpoints (its newest EMA is taken)."""
    preset: str = ""
    """Settings of a published checkpoint by its name, for a .pt file that carries none, e.g. cifar10_uncond; without
    model_path that checkpoint is fetched."""
    num_samples: int = Field(10000, ge=1)
    """Images to draw."""
    batch_size: Annotated[BatchSize, BATCH] = 16
    """Images at a time, per process; auto: the fastest size that fits, measured once and remembered."""
    solver: Annotated[Solver, IMAGES] = "ddpm"
    """ddpm: ancestral sampling; ddim; dpmpp_2m, dpmpp_3m: DPM-Solver++, and with _sde its stochastic form; unipc;
    heun: two evaluations a step, as EDM does it."""
    steps: Annotated[int, IMAGES] = Field(0, ge=0)
    """Steps of the solver, spread as `spacing` says; 0: those that timestep_respacing keeps."""
    spacing: Annotated[Literal["auto", Spacing], IMAGES] = "auto"
    """How `steps` are spread over the chain: evenly in t, in its square root, in log SNR, or as Karras et al. do; auto:
    as suits the solver."""
    sigma_max: Annotated[float, IMAGES] = Field(160.0, gt=0)
    """With `steps`: the largest noise to start from, in units of the image; a cosine chain goes on to 80,000."""
    use_ddim: bool = False
    """The same as solver ddim."""
    eta: Annotated[float, IMAGES] = Field(0.0, ge=0, le=1)
    """Noise of DDIM: 0 none, 1 as much as DDPM."""
    clip_denoised: Annotated[bool, IMAGES] = True
    """Clip the predicted x_0 to [-1, 1] at every step."""
    guidance: Annotated[float, IMAGES] = Field(1.0, ge=0)
    """Weight of classifier-free guidance, or of guide_model_path; 1: none."""
    guidance_interval: Annotated[Floats, IMAGES] = ()
    """Guide only at these noise levels, LOW,HIGH in units of the image, e.g. 0.2,5; empty: at all of them."""
    guide_model_path: Annotated[FilePath, NETWORK] = ""
    """Autoguidance: a weaker checkpoint to steer away from, instead of the null class."""
    seed: Annotated[int, IMAGES] = Field(0, ge=0, lt=2**32)
    """Seed of the noise; image i of a job depends on it and on i, not on the batch size or the number of processes."""
    precision: Annotated[Precision, NETWORK] = "fp32"
    """Arithmetic of the network's body."""
    use_fp16: bool = False
    """The same as precision fp16."""
    allow_tf32: Annotated[bool, NETWORK] = False
    """On a GPU, round the factors of float32 products to TF32 (10 bits of mantissa), which is faster: of all matrix
    products and convolutions at precision fp32, else of the time embedding, and without kernels of the last layer."""
    compile: Switch = "auto"
    """Compile the network with torch.compile. auto: on a GPU, and on a CPU for jobs long enough to win back the
    minutes it takes."""
    cuda_graph: Switch = "auto"
    """Replay each step as a CUDA graph. auto: on a GPU."""
    cudnn_benchmark_limit: int = Field(10, ge=0)
    """On a GPU: how many plans cuDNN times for each shape of a convolution, at every start, to take the fastest; 0: all
    of them, for which the first step takes longer and later ones may be faster."""
    kernels: Kernels = "auto"
    """What computes the ops: auto takes Triton kernels on a GPU where they are fast, triton takes them wherever they
    run, reference keeps to PyTorch."""
    out_dir: FilePath = ""
    """Output folder, in which the same job continues. Empty: the folder in OPENAI_LOGDIR, else one of its own in
    runs/samples."""
    overwrite: bool = False
    """Start over in a folder that holds another job, whose files are removed."""
    save_as: Words = ("npz",)
    """Files to make: npz, png (a folder), zip, tar (WebDataset), several separated by commas."""
    grid_images: int = Field(100, ge=0)
    """Images in the PNG grid; 0: no grid."""
    trajectory: int = Field(0, ge=0)
    """Images whose predicted x_0 over the steps becomes a strip and a GIF; 0: none."""

    @field_validator("save_as")
    @classmethod
    def _formats(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value not in FORMATS:
                raise ValueError(f"must be among {', '.join(FORMATS)}, not {value!r}")
        if not values:
            raise ValueError(f"is empty; give one or more of {', '.join(FORMATS)}")
        return tuple(dict.fromkeys(values))

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if values and (len(values) != 2 or not 0 <= values[0] < values[1]):
            raise ValueError(f"must be two rising noise levels such as 0.2,5, not {','.join(map(str, values))}")
        return values

    @model_validator(mode="after")
    def _agree(self) -> DrawSettings:
        if self.use_ddim and self.solver != "ddim":
            raise ValueError(f"use_ddim True contradicts solver {self.solver}")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta {self.eta:g} is for solver ddim; {self.solver} has no eta")
        if self.guidance_interval and self.guidance == 1:
            raise ValueError("guidance_interval needs a guidance other than 1")
        if self.guide_model_path and self.guidance == 1:
            raise ValueError("guide_model_path needs a guidance other than 1")
        if self.steps and self.steps < SOLVERS[self.solver].least_steps:
            raise ValueError(f"steps {self.steps}: {self.solver} takes at least {SOLVERS[self.solver].least_steps}")
        return self


class SampleSettings(DrawSettings):
    """Drawing images from a checkpoint."""

    classes: Annotated[str, IMAGES] = ""
    """Classes to draw in turn, by number or name, e.g. 0,5,7; with weights at random, e.g. cat:3,dog:1; balanced: all
    in turn; empty: each image's class at random."""
    classifier_path: FilePath = ""
    """A classifier of noised images that guides towards the classes: a .pt file or a run of classifier_train.py."""
    classifier_scale: Annotated[float, IMAGES] = Field(1.0, ge=0)
    """Weight of the classifier's gradient; 0: none."""
    classifier_precision: Literal["auto", Precision] = "auto"
    """Arithmetic of the classifier's body; auto: as the network's."""
    classifier_use_fp16: bool = False
    """The same as classifier_precision fp16."""
    sr_model_path: FilePath = ""
    """A super-resolution checkpoint that enlarges the images as they come."""
    sr_preset: str = ""
    """Settings of a published super-resolution checkpoint by its name, e.g. upsample_256; without sr_model_path that
    checkpoint is fetched."""
    sr_batch_size: BatchSize = "auto"
    """Images that are enlarged at a time, per process; auto as for batch_size."""
    sr_steps: int = Field(0, ge=0)
    """Steps of the solver when enlarging; 0: those that sr_timestep_respacing keeps."""
    sr_timestep_respacing: str = ""
    """timestep_respacing when enlarging."""

    @property
    def guiding_classifier(self) -> str:
        """The path of the classifier that guides; empty for none, or for scale 0."""
        return self.classifier_path if self.classifier_scale else ""

    @model_validator(mode="after")
    def _classifier(self) -> SampleSettings:
        if self.classifier_use_fp16 and self.classifier_precision != "fp16":
            raise ValueError(f"classifier_use_fp16 True contradicts classifier_precision {self.classifier_precision}")
        if not self.classifier_path and self.classifier_scale not in (0, 1):
            raise ValueError(f"classifier_scale {self.classifier_scale:g} needs a classifier_path")
        return self

    @model_validator(mode="after")
    def _cascade(self) -> SampleSettings:
        if not self.sr_model_path and not self.sr_preset:
            for name in ("sr_steps", "sr_timestep_respacing"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for enlarging; name a checkpoint with sr_model_path")
        return self


class SuperResSampleSettings(DrawSettings):
    """Enlarging images with a super-resolution checkpoint."""

    num_samples: int = Field(10000, ge=1)
    """Images to draw; not given: as many as there are small images. More begin with the first small image again."""
    base_samples: FilePath = ""
    """The small images: an .npz as sample.py writes it (arr_0 images, arr_1 labels), a job's folder, which has one, a
    folder of images, or an image."""
    classes: Annotated[str, IMAGES] = ""
    """Classes to take for the images in turn, by number or name, e.g. 0,5,7, instead of those in base_samples."""


class NllSettings(Settings):
    """Bits per dimension of images under a checkpoint."""

    model_path: FilePath = ""
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
    """Seed of the noise; an image's noise depends on it and on the image's place in the listing."""
    precision: Precision = "fp32"
    """Arithmetic of the network's body."""
    kernels: Kernels = "auto"
    """What computes the ops: auto takes Triton kernels on a GPU where they are fast, triton takes them wherever they
    run, reference keeps to PyTorch."""
    use_fp16: bool = False
    """The same as precision fp16."""
    allow_tf32: bool = False
    """On a GPU, round the factors of float32 products to TF32 (10 bits of mantissa), which is faster: of all matrix
    products and convolutions at precision fp32, else of the time embedding, and without kernels of the last layer."""
    out_dir: FilePath = ""
    """Output folder; empty: the folder in OPENAI_LOGDIR, else runs/nll."""
