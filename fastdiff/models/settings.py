"""Settings of the networks."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from fastdiff.settings import Affects, Floats, Ints, Settings, Size, Switch

TRAINING = Affects("training")
"""Marks settings that only training uses: they don't change the function that a network computes."""
SHAPES = Affects("shapes")
"""Marks settings that decide which weights a network has, and their shapes."""
GROUPS = 32  # of every group norm (Ho et al. 2020)
ADDED = ("resblock_updown", "scale_stem", "use_new_attention_order")
"""Settings that version 0.1 did not have and did not store; its networks had them False."""

# Image size → channel_mult, as in improved-diffusion and guided-diffusion.
_DEFAULT_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


class BackboneSettings(Settings):
    """What the UNet and the super-resolution UNet have in common."""

    num_channels: Annotated[int, SHAPES] = Field(128, ge=32)
    """Width of the first level; a multiple of 32."""
    num_res_blocks: Annotated[int, SHAPES] = Field(2, ge=1)
    """Residual blocks per level on the way down (one more on the way up)."""
    num_heads: int = Field(4, ge=1)
    """Attention heads on the way down and in the middle."""
    num_heads_upsample: int = -1
    """Attention heads on the way up; -1: as many as num_heads."""
    num_head_channels: int = -1
    """Channels per attention head; -1: num_heads decides."""
    use_new_attention_order: bool = False
    """The attention's projection makes the queries of all heads, then all keys, then all values; otherwise queries,
    keys and values head by head."""
    attention_resolutions: Ints = (16, 8)
    """Sizes of levels at which attention blocks stand, e.g. 16,8: a level's shorter side in pixels; empty: only in the
    middle."""
    channel_mult: Annotated[Floats, SHAPES] = ()
    """Width multiple of each level, e.g. 1,2,3,4; empty: the standard one for 512, 256, 128, 64 or 32 pixels."""
    scale_stem: Annotated[bool, SHAPES] = False
    """Give the first convolution the width of the first level, channel_mult[0] x num_channels, as guided-diffusion
    does; otherwise it has num_channels."""
    resblock_updown: Annotated[bool, SHAPES] = False
    """Halve and double maps inside residual blocks, as BigGAN does (Dhariwal & Nichol 2021, section 3); otherwise
    convolutions do it."""
    dropout: Annotated[float, TRAINING] = Field(0.0, ge=0, lt=1)
    """Dropout probability inside residual blocks."""
    learn_sigma: Annotated[bool, SHAPES] = False
    """Predict the variances too (Nichol & Dhariwal 2021, section 3.1)."""
    class_cond: Annotated[bool, SHAPES] = False
    """Condition on class labels."""
    num_classes: Annotated[int, SHAPES] = Field(1000, ge=2)
    """Classes of a class-conditional model."""
    null_class: Annotated[bool, SHAPES] = False
    """An extra label, number num_classes, that stands for no class: for classifier-free guidance."""
    in_channels: Annotated[int, SHAPES] = Field(3, ge=1)
    """Image channels: 1 gray, 3 RGB, 4 RGBA."""
    use_checkpoint: Annotated[Switch, TRAINING] = False
    """Recompute the activations of each block in the backward pass: about a third more work, far less memory. auto:
    only where the micro-batch would not fit otherwise."""
    use_scale_shift_norm: Annotated[bool, SHAPES] = True
    """The time embedding scales and shifts the norms; otherwise it is added."""

    size_name: ClassVar[str]
    """Name of the setting with the size of the images that the network draws."""
    default_mult: ClassVar[dict[int, tuple[float, ...]]] = _DEFAULT_MULT
    """Longer side of the images → the standard channel_mult."""

    @property
    def backbone(self) -> BackboneSettings:
        """The settings of the network's input blocks and middle block, which are these."""
        return self

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the images that the network draws."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def network_in_channels(self) -> int:
        return self.in_channels

    @property
    def num_labels(self) -> int:
        """Rows of the table of label embeddings: the classes, and the null class after them."""
        return self.num_classes + self.null_class

    @property
    def level_mult(self) -> tuple[float, ...]:
        """Width multiple of each level, from channel_mult or the standard table."""
        return self.channel_mult or self.default_mult[max(self.size_hw)]

    @property
    def stem_channels(self) -> int:
        """Width of the first convolution's result."""
        return self.level_channels[0] if self.scale_stem else self.num_channels

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(int(mult * self.num_channels) for mult in self.level_mult)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """The shorter side of each level's maps in pixels, by which attention_resolutions name a level."""
        return tuple(min(self.size_hw) >> level for level in range(len(self.level_mult)))

    @property
    def attention_factors(self) -> tuple[int, ...]:
        """Downsampling factors at which there are attention blocks.

        The quotient is rounded down, as in improved-diffusion, so that a resolution that is no level's size may name a
        level nevertheless, or none. `misplaced_attention` finds these.
        """
        return tuple(min(self.size_hw) // resolution for resolution in self.attention_resolutions)

    @property
    def attending_levels(self) -> tuple[int, ...]:
        """The levels with attention blocks, of which 0 has the full size of the images."""
        return tuple(level for level in range(len(self.level_mult)) if 2**level in self.attention_factors)

    @model_validator(mode="after")
    def _consistent(self) -> BackboneSettings:
        if self.null_class and not self.class_cond:
            raise ValueError("null_class True needs class_cond True")
        if self.num_channels % GROUPS:
            raise ValueError(
                f"num_channels {self.num_channels} is not divisible by the {GROUPS} groups of the norms; "
                f"the nearest is {max(1, round(self.num_channels / GROUPS)) * GROUPS}"
            )
        if not self.channel_mult and max(self.size_hw) not in self.default_mult:
            known = ", ".join(str(size) for size in sorted(self.default_mult))
            raise ValueError(
                f"channel_mult has no default for images of {max(self.size_hw)} pixels (only for {known}); "
                "give it, e.g. 1,2,2,2"
            )
        for mult in self.level_mult:
            if mult <= 0 or (mult * self.num_channels) % GROUPS:
                raise ValueError(
                    f"channel_mult {mult:g} x num_channels {self.num_channels} is not divisible by the {GROUPS} groups "
                    "of the norms"
                )
        factor = 2 ** (len(self.level_mult) - 1)
        if any(side % factor for side in self.size_hw):
            raise ValueError(
                f"{self.size_name} {'x'.join(map(str, self.size_hw))} is not divisible by {factor}, which "
                f"{len(self.level_mult)} levels (channel_mult) need"
            )
        for resolution in self.attention_resolutions:
            if resolution < 1:
                raise ValueError(f"attention_resolutions {resolution} is no size; give the sizes of levels, e.g. 16,8")
        self._check_heads()
        return self

    def _check_heads(self) -> None:
        attending = {self.level_channels[-1]}  # the middle block always attends
        attending |= {self.level_channels[level] for level in self.attending_levels}
        for name in ("num_heads", "num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            if value == -1 and name != "num_heads":
                continue
            if name != "num_head_channels" and self.num_head_channels != -1:
                continue
            bad = [c for c in sorted(attending) if value < 1 or c % value]
            if bad:
                raise ValueError(f"{name} {value} does not divide the {bad[0]} channels of an attention block")


class UNetSettings(BackboneSettings):
    """A UNet that draws images of `image_size` pixels."""

    size_name: ClassVar[str] = "image_size"
    image_size: Size = (64, 64)
    """Pixels of the images: 64, or height x width such as 64x96."""

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.image_size


class SuperResSettings(BackboneSettings):
    """A UNet that enlarges images from `small_size` to `large_size` pixels."""

    size_name: ClassVar[str] = "large_size"
    default_mult: ClassVar[dict[int, tuple[float, ...]]] = {**_DEFAULT_MULT, 512: (1, 1, 2, 2, 4, 4)}
    large_size: Size = (256, 256)
    """Pixels of the images that come out: 256, or height x width."""
    small_size: Size = (64, 64)
    """Pixels of the images that go in."""

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.large_size

    @property
    def network_in_channels(self) -> int:
        return 2 * self.in_channels

    @model_validator(mode="after")
    def _smaller(self) -> SuperResSettings:
        if any(small >= large for small, large in zip(self.small_size, self.large_size, strict=True)):
            raise ValueError(
                f"small_size {'x'.join(map(str, self.small_size))} must be smaller than large_size "
                f"{'x'.join(map(str, self.large_size))}"
            )
        return self


def as_before(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network as version 0.1 stored them, without those of ADDED that are False.

    By these it is the same job that version 0.1 began.
    """
    return {name: value for name, value in model.items() if value or name not in ADDED}


def misplaced_attention(settings: BackboneSettings) -> str:
    """An error message if attention_resolutions name a size that no level has; else empty."""
    sizes = settings.level_sizes
    if not (nowhere := [str(size) for size in settings.attention_resolutions if size not in sizes]):
        return ""
    return (
        f"attention_resolutions {','.join(nowhere)}: a network for the {_image_size(settings)} has no level of that "
        f"size; {_levels(settings)}"
    )


def default_attention_warning(settings: BackboneSettings) -> str:
    """A warning if the default attention_resolutions put attention at no level, or at the full size; else empty."""
    default = f"the default attention_resolutions {','.join(map(str, settings.attention_resolutions))}"
    if not settings.attending_levels:
        return (
            f"warning: {default} name no level of a network for the {_image_size(settings)}, so that it has attention "
            f"in its middle block only; {_levels(settings)}, or '' to have it so without this warning"
        )
    if 0 in settings.attending_levels:
        return (
            f"warning: {default} put attention at the full size of the images, where it costs most, in a network for "
            f"the {_image_size(settings)}; {_levels(settings)}"
        )
    return ""


def _image_size(settings: BackboneSettings) -> str:
    return f"{settings.size_name.replace('_', ' ')} {'x'.join(map(str, settings.size_hw))}"


def _levels(settings: BackboneSettings) -> str:
    """The sizes of all levels, and the sizes below the full one that are nearest to the default's."""
    H, W = settings.size_hw
    levels = ", ".join(f"{H >> level}x{W >> level}" for level in range(len(settings.level_mult)))
    smaller = settings.level_sizes[1:] or settings.level_sizes
    default = BackboneSettings.model_fields["attention_resolutions"].default
    near = {min(smaller, key=lambda size: abs(math.log(size / wanted))) for wanted in default}
    named = ", named by their shorter side" if H != W else ""
    advice = ",".join(map(str, sorted(near, reverse=True)))
    return f"its levels are {levels}{named}: give e.g. --attention_resolutions {advice}"
