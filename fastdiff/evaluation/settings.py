"""Settings of evaluation."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.errors import did_you_mean
from fastdiff.sampling.settings import SampleSettings
from fastdiff.settings import BatchSize, FilePath, Floats, Ints, Settings, Size, Words, what_is_wrong

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


def known_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics without repetitions. Raises ValueError for an unknown one, and if there are none."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"must be among {', '.join(METRICS)}, not {name!r}{did_you_mean(name.lower(), METRICS)}")
    if not names:
        raise ValueError(f"is empty; give one or more of {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


class EvaluateSettings(Settings):
    """Comparing images with a reference."""

    samples: FilePath = ""
    """The images to judge: an .npz (arr_0), a folder or zip of pictures, a sampling job's folder, or a packed folder.
    With model_path the images are drawn instead."""
    reference: FilePath = ""
    """What they are compared with: images as in `samples`, or statistics (.npz with mu and sigma) of OpenAI, EDM,
    clean-fid or reference_out."""
    metrics: Words = ("fid",)
    """Of fid, sfid, is (Inception score), precision, recall, kid, several separated by commas."""
    reference_out: FilePath = ""
    """Write the reference's statistics into this .npz, which later commands take as their reference."""
    resize: str = ""
    """Resize the images of `samples` and `reference` to this size first, as training does; empty: they keep theirs.
    Images that model_path draws are not resized."""
    loader: Literal["auto", "dali", "pillow"] = "auto"
    """What decodes folders of pictures. auto: DALI where it is installed and gives the same pixels as Pillow."""
    features: FilePath = "inception-v3-compat"
    """The network whose features are compared: inception-v3-compat, on which published numbers rest; dinov2-vit-s-14,
    -b-, -l- or -g-14; or a file: TorchScript, or a classifier of train_features."""
    feature_weights: FilePath = ""
    """The file of Inception's weights, for machines without a network; empty: torch-fidelity's are fetched once."""
    feature_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of that network. With bf16 or fp16 the error of each metric is measured on the first images and stated
    beside it."""
    feature_batch_size: BatchSize = "auto"
    """Images that this network sees at a time, per process; auto: 64 on a CPU, 256 on a GPU."""
    train_features: FilePath = ""
    """First train a small classifier on the labelled pictures of `reference`, write it into this file, and use it as
    `features`: for images that Inception doesn't know, such as digits. An existing file is used as it is."""
    splits: int = Field(10, ge=1)
    """Splits of the Inception score."""
    kid_subsets: int = Field(100, ge=1)
    """Random subsets of KID."""
    kid_subset_size: int = Field(1000, ge=2)
    """Images in each of them."""
    resamplings: int = Field(20, ge=0)
    """Resamplings of the samples from which the spreads of FID, sFID and Inception score are estimated; 0: none, which
    saves an eigendecomposition for each."""
    metric_seed: int = Field(2020, ge=0, lt=2**32)
    """Seed of splits, subsets and resamplings; 2020 is torch-fidelity's."""
    results_dir: FilePath = ""
    """Folder for the results: a JSON file each, and a row in evaluations.csv. Empty: the folder in OPENAI_LOGDIR, else
    runs/evaluations."""

    @field_validator("resize")
    @classmethod
    def _resize(cls, value: str) -> str:
        if value:
            TypeAdapter(Size).validate_python(value)
        return value

    @property
    def resize_hw(self) -> tuple[int, int] | None:
        """`resize` as (height, width); None where images keep their size."""
        return TypeAdapter(Size).validate_python(self.resize) if self.resize else None

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in METRICS if name in known_metrics(values))

    @field_validator("resamplings")
    @classmethod
    def _resamplings(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0 or at least 2: one resampling has no deviation")
        return value

    @model_validator(mode="after")
    def _agree(self) -> EvaluateSettings:
        if self.train_features and self.features != "inception-v3-compat":
            raise ValueError("train_features contradicts features; give one of them")
        if self.train_features and self.feature_weights:
            raise ValueError("train_features contradicts feature_weights, which are Inception's; give one of them")
        if self.train_features and not self.reference:
            raise ValueError("train_features needs the labelled pictures of reference")
        return self


class EvaluateDrawSettings(SampleSettings):
    """Drawing the images to judge."""

    num_samples: int = Field(10000, ge=1)
    """Images to draw; with `samples`: how many of them are judged, the first ones, and all if it is not given."""
    steps: Ints = (0,)  # type: ignore[assignment]
    """Steps of the solver, spread as `spacing` says; 0: those that timestep_respacing keeps. Several give a table and
    a plot."""
    guidance: Floats = (1.0,)  # type: ignore[assignment]
    """Weight of classifier-free guidance, or of guide_model_path; 1: none. Several give a table and a plot."""
    spacing: Words = ("auto",)  # type: ignore[assignment]
    """How `steps` are spread over the chain: uniform, quadratic, logsnr or karras; auto: as suits the solver. Several
    give a table and a plot."""
    solvers: Words = ()
    """Solvers to compare in a table and a plot, e.g. ddim,dpmpp_2m; empty: the one in `solver`."""

    @model_validator(mode="after")
    def _agree(self) -> EvaluateDrawSettings:
        for name in ("steps", "guidance", "spacing"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give one or more, separated by commas")
        for solver in self.solvers:
            if solver not in SOLVERS:
                raise ValueError(
                    f"solvers must be among {', '.join(SOLVERS)}, not {solver!r}{did_you_mean(solver, SOLVERS)}"
                )
        self.variants()
        return self

    def variants(self) -> list[SampleSettings]:
        """The settings of every combination of solver, spacing, steps and guidance. ValueError for impossible ones.

        The spacing means nothing with all steps of the chain, of which there is one variant then. Where several are
        compared, settings that only some of them have (eta, and those of guidance) are left out for the others.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set if name != "solvers"}
        found: list[SampleSettings] = []
        for solver, steps, guidance in itertools.product(self.solvers or (self.solver,), self.steps, self.guidance):
            left_out = {"eta"} if solver != "ddim" and "ddim" in self.solvers else set()
            left_out |= {"guidance_interval", "guide_model_path"} if guidance == 1 and len(self.guidance) > 1 else set()
            kept = {name: value for name, value in given.items() if name not in left_out}
            for spacing in self.spacing if steps else self.spacing[:1]:
                chosen = {"solver": solver, "steps": steps, "spacing": spacing, "guidance": guidance}
                try:
                    found.append(SampleSettings.model_validate({**kept, **chosen}))
                except ValidationError as error:
                    place = "".join(f"{name} " for name in error.errors()[0]["loc"])
                    raise ValueError(f"{place}{what_is_wrong(error)}") from None
        return found
