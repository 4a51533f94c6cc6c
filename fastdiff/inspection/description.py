"""What is known of a file or folder, as lines of text and as JSON."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.errors import one_line
from fastdiff.settings import Settings

_FEW = 10
"""Entries of a list that the text shows."""
_WIDTH = 116
_INDENT = 15


@dataclass
class Description:
    """What a file or folder is."""

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Name with underscores → number, text, list of texts or dictionary, in the order in which they are shown.
    Numbers named bytes are sizes. Empty values are left out."""
    settings: dict[str, Settings] = field(default_factory=dict)
    """Section → its settings."""
    notes: list[str] = field(default_factory=list)
    next: str = ""
    """The command that fits, as a shell reads it. Words in capitals stand for what the user has to give."""

    def as_json(self) -> dict[str, Any]:
        """The content of --json. `differing` names the settings that differ from their defaults."""
        content: dict[str, Any] = {"path": str(self.path), "kind": self.kind, **self._known()}
        if self.settings:
            content["settings"] = {name: each.model_dump(mode="json") for name, each in self.settings.items()}
            content["differing"] = {name: list(differing(each)) for name, each in self.settings.items()}
        return content | {name: value for name, value in (("notes", self.notes), ("next", self.next)) if value}

    def text(self, all_settings: bool = False) -> str:
        """Lines of text; of the settings those that differ from their defaults, or after them all others."""
        lines = [one_line(str(self.path)), *_entry("kind", self.kind)]
        for name, value in self._known().items():
            lines += _entry("size on disk" if name == "bytes" else name.replace("_", " "), _shown(name, value))
        for section, settings in self.settings.items():
            values = settings.model_dump(mode="json")
            chosen = differing(settings)
            lines += _entry(section, _listed(values, chosen) or "all defaults")
            if all_settings and (rest := [name for name in values if name not in chosen]):
                lines += _entry("", f"at their defaults: {_listed(values, rest)}")
        for note in self.notes:
            lines += _entry("note", note)
        # A command stays in one line, to be copied.
        return "\n".join([*lines, *([f"  {'next':{_INDENT}}{self.next}"] if self.next else [])])

    def _known(self) -> dict[str, Any]:
        return {name: value for name, value in self.facts.items() if value not in ("", None, [], {})}


def differing(settings: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults, name → value as in JSON."""
    defaults = type(settings)().model_dump(mode="json")
    return {name: value for name, value in settings.model_dump(mode="json").items() if value != defaults[name]}


def command(name: str, /, *words: Any, **flags: Any) -> str:
    """A command line of fastdiff as a shell reads it. Flags with an empty value are left out."""
    given = [text for flag, value in flags.items() if value != "" for text in (f"--{flag}", value)]
    return shlex.join(map(str, ["fastdiff", *name.split(), *words, *given]))


def _entry(name: str, value: str) -> Iterator[str]:
    start = f"  {name:{_INDENT}}"
    folded = textwrap.wrap(one_line(value), _WIDTH - len(start), break_long_words=False, break_on_hyphens=False) or [""]
    yield start + folded[0]
    yield from (" " * len(start) + line for line in folded[1:])


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
        return "; ".join(f"{key}: {_shown(key, each)}" for key, each in _few(list(value.items()))) + _rest(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, each)}" for key, each in _few(list(value.items()))) + _rest(value)
    if isinstance(value, list):
        return ", ".join(map(str, _few(value))) + _rest(value)
    if name == "bytes":
        return _size(value)
    return f"{value:,}" if type(value) is int and value >= 10_000 else str(value)


def _few(values: list[Any]) -> list[Any]:
    return values if len(values) <= _FEW + 1 else values[:_FEW]


def _rest(values: list[Any] | dict[str, Any]) -> str:
    return f" and {len(values) - _FEW:,} more" if len(values) > _FEW + 1 else ""


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def _listed(values: dict[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {shlex.quote(str(values[name]))}" for name in names)
