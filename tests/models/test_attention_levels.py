"""Which levels attention_resolutions name, and what is said where they name none or the full size."""

from __future__ import annotations

import re

import pytest

from fastdiff.models import BackboneSettings, SuperResSettings, UNetSettings
from fastdiff.models.settings import default_attention_warning, misplaced_attention


def unet(size: object, mult: str, **more: object) -> UNetSettings:
    return UNetSettings.model_validate({"image_size": size, "channel_mult": mult, "num_channels": 32, **more})


NOWHERE = {
    "48": ("48", "1,2,2,2", "48x48, 24x24, 12x12, 6x6", "12,6"),
    "96": ("96", "1,1,2,2", "96x96, 48x48, 24x24, 12x12", "12"),
    "100": ("100", "1,2,2", "100x100, 50x50, 25x25", "25"),
    "300": ("300", "1,2,2", "300x300, 150x150, 75x75", "75"),
    "wide": ("144x256", "1,1,2,2,4", "144x256, 72x128, 36x64, 18x32, 9x16, named by their shorter side", "18,9"),
    "tall": ("200x56", "1,2,2,4", "200x56, 100x28, 50x14, 25x7, named by their shorter side", "14,7"),
    "few levels": ("64", "1,2", "64x64, 32x32", "32"),
    "smaller than the default": ("6", "1,2", "6x6, 3x3", "3"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_default_that_names_no_level(case: str) -> None:
    size, mult, levels, advice = NOWHERE[case]
    settings = unet(size, mult)
    assert settings.attending_levels == ()
    warning = default_attention_warning(settings)
    assert "the default attention_resolutions 16,8 name no level" in warning
    assert f"its levels are {levels}: give e.g. --attention_resolutions {advice}, or ''" in warning
    advised = unet(size, mult, attention_resolutions=advice)
    assert advised.attending_levels
    assert not misplaced_attention(advised)


@pytest.mark.parametrize(
    ("size", "mult", "advice"), [("28", "1,2,2", "14,7"), ("24x40", "1,2", "12"), ("16", "1,2", "8"), ("16", "2", "16")]
)
def test_a_default_at_the_full_size(size: str, mult: str, advice: str) -> None:
    settings = unet(size, mult)
    assert settings.attending_levels[0] == 0
    warning = default_attention_warning(settings)
    assert "put attention at the full size" in warning
    assert warning.endswith(f"--attention_resolutions {advice}")


@pytest.mark.parametrize(
    "settings",
    [
        UNetSettings(image_size=64),
        UNetSettings(image_size=256),
        SuperResSettings(),
        unet("36", "1,2,2"),  # rounded down, 16 and 8 name the levels of 18 and 9
        unet("32x64", "1,2,2"),
        unet("64", "1,2,4"),  # no level of 8
    ],
)
def test_defaults_with_attention_below_the_full_size(settings: BackboneSettings) -> None:
    assert not default_attention_warning(settings)


@pytest.mark.parametrize(
    ("given", "named"),
    [("16,8", "16,8"), ("24,8", "8"), ("49", "49"), ("13", "13"), ("64", "64"), ("24,12,6,3", "3")],
)
def test_given_resolutions_of_no_level(given: str, named: str) -> None:
    message = misplaced_attention(unet(48, "1,2,2,2", attention_resolutions=given))
    assert message.startswith(f"attention_resolutions {named}: a network for the image size 48x48 has no level of that")
    assert "its levels are 48x48, 24x24, 12x12, 6x6: give e.g. --attention_resolutions 12,6" in message


@pytest.mark.parametrize("given", ["", "48", "24,6", "12"])
def test_given_resolutions_of_levels(given: str) -> None:
    assert not misplaced_attention(unet(48, "1,2,2,2", attention_resolutions=given))


def test_a_longer_side_is_no_name_of_a_level() -> None:
    """Divided into the shorter side, 64 would name the level of 72x128, although 36x64 has that side."""
    settings = unet("144x256", "1,1,2,2,4", attention_resolutions="64,18")
    assert "attention_resolutions 64: a network for the image size 144x256" in misplaced_attention(settings)


def test_levels_of_super_resolution_are_those_of_the_large_size() -> None:
    small = {"large_size": 96, "small_size": 24, "channel_mult": "1,1,2,2", "num_channels": 32}
    message = misplaced_attention(SuperResSettings.model_validate({**small, "attention_resolutions": "16"}))
    assert "a network for the large size 96x96" in message
    warning = default_attention_warning(SuperResSettings.model_validate(small))
    assert re.search(r"large size 96x96, .* its levels are 96x96, 48x48, 24x24, 12x12", warning)
