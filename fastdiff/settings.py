"""The base of every component's settings: strict pydantic models whose fields are JSON keys and command-line flags.

A field's name, type, range, default and help are defined once, in the class that uses them. `fastdiff.config.sections`
composes the classes into sections, and `fastdiff.config.load` reads them from files and flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from fastdiff.errors import UserError, quoted, shortened
from fastdiff.runtime.paths import expand_path

# Characters that no file name can contain. U+DC80 to U+DCFF are allowed: they stand for bytes that aren't Unicode.
_NO_TEXT = re.compile(r"[\x00\ud800-\udc7f\udd00-\udfff]")


class Settings(BaseModel):
    """Base class of settings. Unknown keys are rejected, values are validated, and instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # "timestep_respacing": 250
    )

    @field_validator("*")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and _NO_TEXT.search(each):
                raise ValueError(f"must be text without NUL and lone surrogates, not {quoted(value)}")
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError(f"must fit in 64 bits, not {quoted(value)}")
        return value


_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be True or False",
    "string": "must be text",
    "tuple": "must be a number or several, such as 16,8",
}


def what_is_wrong(error: ValidationError) -> str:
    """Describe the first error of a value, such as 'must be a whole number, not 2.5'."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # from one of our validators, whose message contains the value
        return shortened(first["msg"].removeprefix("Value error, "))
    kind = first["type"].split("_")[0]  # of int_parsing, int_type, int_from_float
    return f"{_KINDS.get(kind) or first['msg'].replace('Input should', 'must')}, not {quoted(first['input'])}"


S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from values. Raises UserError that names the first invalid value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{place + ': ' if place else ''}{what_is_wrong(error)}") from None


@dataclass(frozen=True)
class Affects:
    """What a setting affects, as metadata of its field: `Annotated[int, Affects("images")]`."""

    what: str


@dataclass(frozen=True)
class Word:
    """Marks the setting that a word without a flag gives as well, as metadata of its field."""


def given_by_word(kind: type[Settings]) -> str:
    """Name of the setting that is marked with `Word`; empty where there is none."""
    marked = (name for name, field in kind.model_fields.items() if Word() in field.metadata)
    return next(marked, "")


def affecting(kind: type[Settings], *what: str) -> set[str]:
    """Names of the settings that affect one of `what`, by the metadata of their fields."""
    marks = {Affects(each) for each in what}
    return {name for name, field in kind.model_fields.items() if not marks.isdisjoint(_marks(field))}


def _marks(field: FieldInfo) -> set[Affects]:
    return {mark for mark in field.metadata if isinstance(mark, Affects)}


def _split(value: Any) -> Any:
    """Split '16,8' into ['16', '8'], put a lone number into a list, and leave anything else as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, (int, float)) else value


def _join(values: tuple[float | str, ...]) -> str:
    return ",".join(str(value) for value in values)


Ints = Annotated[tuple[int, ...], BeforeValidator(_split), PlainSerializer(_join)]
"""Whole numbers, written '16,8' as improved-diffusion does, or as a JSON list."""
Floats = Annotated[tuple[float, ...], BeforeValidator(_split), PlainSerializer(_join)]
"""Numbers, written '0.9999,0.999' or as a JSON list."""
Words = Annotated[tuple[str, ...], BeforeValidator(_split), PlainSerializer(_join)]
"""Words, written 'npz,png' or as a JSON list."""


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except UserError as error:
        raise ValueError(str(error)) from None


FilePath = Annotated[str, AfterValidator(_expanded)]
"""A path of a file or folder, in which ~, ~USER, $NAME and ${NAME} are expanded."""


def _switch(value: Any) -> Any:
    """Keep 'auto', and parse anything else as a bool."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"must be auto, True or False, not {quoted(value)}") from None


Switch = Annotated[Literal["auto", True, False], BeforeValidator(_switch)]
"""True or False, or auto for a choice that is made when the run starts."""


def _count(value: Any) -> Any:
    """Keep 'auto', and parse any other text as a whole number."""
    if isinstance(value, str):
        value = value.strip().lower()
        if value.lstrip("-").isdecimal():
            return int(value)
    if value == "auto" or type(value) is int:
        return value
    raise ValueError(f"must be auto or a whole number, not {quoted(value)}")


Count = Annotated[Literal["auto"] | int, BeforeValidator(_count)]
"""A whole number, or auto for one that is chosen when the run starts."""


def _at_least_one(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"must be at least 1, or auto, not {value}")
    return value


BatchSize = Annotated[Count, AfterValidator(_at_least_one)]
"""Images at a time, or auto for a number that is chosen when the command starts."""


def _interval(value: Any) -> Any:
    """Parse '30 m' as '30min', '2h' as '120min', and text of digits as a number of steps."""
    given = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(m|min|minutes?|h|hours?)?\s*", value.lower())
        if match and match[2]:
            minutes = float(match[1]) * (60 if match[2].startswith("h") else 1)
            if minutes > 0:
                return f"{minutes:g}min"
        elif match and match[1].isdecimal():
            value = int(match[1])
    if type(value) is not int or value < 1:
        raise ValueError(f"must be a number of steps of at least 1, or minutes such as 30min, not {quoted(given)}")
    return value


Interval = Annotated[int | str, BeforeValidator(_interval)]
"""A number of steps, or minutes as '30min'."""
MAX_SIDE = 16384
"""Largest number of pixels of a side. More is a typing error or a malicious file."""


def _size(value: Any) -> Any:
    """Parse 64, '64', '64x96' or [64, 96] as (height, width)."""
    given = value
    if isinstance(value, str):
        value = value.lower().split("x")
    if not isinstance(value, (list, tuple)):
        value = [value]
    sides = [int(v) if isinstance(v, str) and v.strip().isdecimal() else v for v in value]
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(f"a size is a whole number of pixels (64) or height x width (64x96), not {quoted(given)}")
    if min(sides) < 1 or max(sides) > MAX_SIDE:
        raise ValueError(f"a size must be 1 to {MAX_SIDE} pixels, not {quoted(given)}")
    return sides[0], sides[-1]


def _show_size(value: tuple[int, int]) -> int | str:
    return value[0] if value[0] == value[1] else f"{value[0]}x{value[1]}"


Size = Annotated[tuple[int, int], BeforeValidator(_size), PlainSerializer(_show_size)]
"""Height and width in pixels, written 64 for a square or '64x96' (height x width)."""


def is_true(value: Any) -> bool:
    """Whether a setting of type bool would parse the value as true."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False  # the validation of the setting reports the error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into a copy of `base`, recursively."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result
