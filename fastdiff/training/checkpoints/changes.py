"""How the settings of a run differ from those of the checkpoint that it continues from, and which may."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fastdiff.config.sections import Config
from fastdiff.errors import UserError, shortened
from fastdiff.images.settings import DataSettings
from fastdiff.models import BackboneSettings
from fastdiff.models.settings import ADDED
from fastdiff.settings import affecting
from fastdiff.training.settings import ALWAYS_FREE, CHANGES, STREAM_SETTINGS, ClassifierTrainSettings, TrainSettings

_QUIET = {
    "train": affecting(TrainSettings, "run") | affecting(ClassifierTrainSettings, "run"),
    "data": affecting(DataSettings, "run"),
}
_ABSENT = {"model": dict.fromkeys(("null_class", *ADDED), False)}
"""Section → settings that older versions didn't store, with the value that they had."""


class Change(NamedTuple):
    """A setting that differs from the stored one, both in the form of JSON."""

    section: str
    name: str
    then: Any
    now: Any


def changes_in(section: str, stored: Mapping[str, Any], config: Config) -> list[Change]:
    """The settings of a section that differ from stored sections; empty if they lack it."""
    then = stored.get(section)
    if not isinstance(then, dict):
        return []
    now = getattr(config, section).model_dump(mode="json")
    pairs = {**_ABSENT.get(section, {}), **then}.items()
    return [
        Change(section, name, value, now[name])
        for name, value in pairs
        if name in now and name != ALWAYS_FREE and now[name] != value
    ]


def process_changes(stored: Mapping[str, Any], config: Config) -> list[Change]:
    """The settings of model and diffusion that differ from stored sections."""
    return [*changes_in("model", stored, config), *changes_in("diffusion", stored, config)]


def of_equal_shapes(changes: Sequence[Change], class_cond: bool) -> list[Change]:
    """The changes without those that mean the same, given that the weights have the same shapes."""
    shown_by_shapes = affecting(BackboneSettings, "shapes") | {"attention_resolutions"}
    if class_cond:
        shown_by_shapes -= {"num_classes", "null_class"}  # only their sum
    return [change for change in changes if change.name not in shown_by_shapes]


def need_permission(changes: Sequence[Change], allowed: Collection[str]) -> list[Change]:
    """The changes that `allowed`, the setting allow_change, would have to name and doesn't."""
    return [
        change
        for change in changes
        if (change.section in ("model", "diffusion") or change.name in STREAM_SETTINGS) and change.name not in allowed
    ]


def check_allowed(changes: Sequence[Change], allowed: Collection[str], source: object) -> None:
    """UserError that names all changes that allow_change doesn't permit. source: the checkpoint, for the message."""
    refused = need_permission(changes, allowed)
    if not refused:
        return
    now = ", ".join(f"--{change.name} {shown(change.now)}" for change in refused)
    then = ", ".join(f"{change.name} {shown(change.then)}" for change in refused)
    it = "it" if len(refused) == 1 else "them"
    raise UserError(f"{now}: {source} is of a run with {then}; keep that{permission(refused, f'to change {it}')}")


def permission(refused: Sequence[Change], purpose: str) -> str:
    """The end of an error message that offers allow_change; empty where it would not help."""
    names = [change.name for change in refused]
    return f", or give --allow_change {','.join(names)} {purpose}" if set(names) <= set(CHANGES) else ""


def lines_for_log(changes: Sequence[Change]) -> list[str]:
    """A sentence for each change, except for settings that only say how the work is done."""
    return [
        f"{name} is {shown(now)} from here on; it was {shown(then)}"
        for section, name, then, now in changes
        if name not in _QUIET.get(section, ())
    ]


def shown(value: Any) -> str:
    """The value as one would write it in a command."""
    return shortened(str(value), 200) or "''"
