"""Settings of the classifier of noised images that guides sampling (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator

from fastdiff.models.settings import SHAPES, TRAINING, BackboneSettings, UNetSettings
from fastdiff.settings import Floats, Ints, Settings, Size, Switch, what_is_wrong

Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]
HEAD_CHANNELS = 64  # of every attention head (guided-diffusion's classifiers)
# Settings of the backbone → what a message about a classifier calls them.
_NAMES = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "channel_mult": "classifier_channel_mult",
    "attention_resolutions": "classifier_attention_resolutions",
    "num_head_channels": "a head's width of",
}


class ClassifierNetSettings(Settings):
    """The settings of a classifier that a diffusion model's settings don't decide, by guided-diffusion's names."""

    classifier_width: Annotated[int, SHAPES] = Field(128, ge=32)
    """Width of the classifier's first level for a multiple of 1; a multiple of 32."""
    classifier_depth: Annotated[int, SHAPES] = Field(2, ge=1)
    """Residual blocks per level of the classifier."""
    classifier_channel_mult: Annotated[Floats, SHAPES] = ()
    """Width multiple of each level of the classifier; empty: the standard one for 512, 256, 128, 64 or 32 pixels."""
    classifier_attention_resolutions: Annotated[Ints, SHAPES] = (32, 16, 8)
    """Sizes of the classifier's levels at which attention blocks stand; empty: only in the middle."""
    classifier_use_scale_shift_norm: Annotated[bool, SHAPES] = True
    """The classifier's time embedding scales and shifts the norms; otherwise it is added."""
    classifier_resblock_updown: Annotated[bool, SHAPES] = True
    """Halve maps inside residual blocks of the classifier; otherwise convolutions do it."""
    classifier_pool: Annotated[Pool, SHAPES] = "attention"
    """How maps become logits. attention: by an attention layer, from the query of their mean; adaptive: by their mean;
    spatial: from the means of all blocks' maps, by two layers; spatial_v2: likewise, with a norm between the layers."""


class ClassifierSettings(ClassifierNetSettings):
    """A classifier of noised images of `image_size` pixels."""

    image_size: Annotated[Size, SHAPES] = (64, 64)
    """Pixels of the images: 64, or height x width such as 64x96."""
    num_classes: Annotated[int, SHAPES] = Field(1000, ge=2)
    """Classes that the classifier tells apart."""
    in_channels: Annotated[int, SHAPES] = Field(3, ge=1)
    """Image channels: 1 gray, 3 RGB, 4 RGBA."""

    use_checkpoint: Annotated[Switch, TRAINING] = False
    """Recompute the activations of each block in the backward pass: about a third more work, far less memory. auto:
    only where the micro-batch would not fit otherwise."""

    class_cond: ClassVar[bool] = True
    """Whether training needs labels."""
    null_class: ClassVar[bool] = False

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size

    @property
    def backbone(self) -> UNetSettings:
        """Settings of the half UNet that computes the maps."""
        return UNetSettings(
            image_size=self.image_size,
            in_channels=self.in_channels,
            num_channels=self.classifier_width,
            num_res_blocks=self.classifier_depth,
            channel_mult=self.classifier_channel_mult,
            attention_resolutions=self.classifier_attention_resolutions,
            num_head_channels=HEAD_CHANNELS,
            use_scale_shift_norm=self.classifier_use_scale_shift_norm,
            resblock_updown=self.classifier_resblock_updown,
            scale_stem=True,
            use_checkpoint=self.use_checkpoint,
        )

    @model_validator(mode="after")
    def _consistent(self) -> ClassifierSettings:
        try:
            _ = self.backbone
        except ValidationError as error:
            names = "|".join(_NAMES)
            raise ValueError(re.sub(rf"\b({names})\b", lambda name: _NAMES[name[0]], what_is_wrong(error))) from None
        return self


NetworkSettings: TypeAlias = BackboneSettings | ClassifierSettings
"""The settings of a network of any kind."""
