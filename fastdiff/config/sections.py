"""The sections of a JSON file with settings, by the kind of network or job that it is for."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fastdiff.conversion.settings import ConvertSettings
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.evaluation.settings import EvaluateDrawSettings, EvaluateSettings
from fastdiff.images.settings import ClassifierDataSettings, DataSettings
from fastdiff.models.classifier_settings import ClassifierNetSettings, ClassifierSettings
from fastdiff.models.settings import SuperResSettings, UNetSettings
from fastdiff.sampling.settings import NllSettings, SampleSettings, SuperResSampleSettings
from fastdiff.settings import Settings
from fastdiff.training.settings import ClassifierTrainSettings, TrainSettings


class Config(Settings):
    """The sections of a JSON file. A script uses some of them, and all are checked."""

    model: UNetSettings = Field(default_factory=UNetSettings)
    diffusion: DiffusionSettings = Field(default_factory=DiffusionSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    sample: SampleSettings = Field(default_factory=SampleSettings)
    classifier: ClassifierNetSettings = Field(default_factory=ClassifierNetSettings)
    nll: NllSettings = Field(default_factory=NllSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    convert: ConvertSettings = Field(default_factory=ConvertSettings)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own JSON, merged over the configuration that is derived from the other sections."""


class SuperResConfig(Config):
    """The sections of a JSON file for super-resolution."""

    model: SuperResSettings = Field(default_factory=SuperResSettings)  # type: ignore[assignment]
    sample: SuperResSampleSettings = Field(default_factory=SuperResSampleSettings)  # type: ignore[assignment]


class ClassifierConfig(Config):
    """The sections of a JSON file for training a classifier."""

    model: ClassifierSettings = Field(default_factory=ClassifierSettings)  # type: ignore[assignment]
    data: ClassifierDataSettings = Field(default_factory=ClassifierDataSettings)
    train: ClassifierTrainSettings = Field(default_factory=ClassifierTrainSettings)  # type: ignore[assignment]


class EvaluateConfig(Config):
    """The sections of a JSON file for evaluation."""

    sample: EvaluateDrawSettings = Field(default_factory=EvaluateDrawSettings)  # type: ignore[assignment]
