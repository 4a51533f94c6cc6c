"""Reading JSON files that people write."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdiff.settings import UserError, shortened

MAX_BYTES = 1 << 20
MAX_DEPTH = 50


def read_json(path: Path) -> Any:
    """A JSON file's content. UserError, which names the file, for what can't be read or isn't strict JSON.

    Refused besides: files of more than MAX_BYTES, values nested deeper than MAX_DEPTH, numbers that aren't
    finite, and objects with a key twice, of which readers take now the first and now the last.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be read ({reason}); give the path of a JSON file") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a JSON file of settings")
    try:
        content = json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits, or one of those below
        raise UserError(f"{path}: is not JSON ({shortened(str(error), 200)})") from error
    _check(content, path)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice} stands twice in one object")
    return found


def _check(content: Any, path: Path) -> None:
    """UserError for a number that isn't finite, or values nested too deeply."""
    level = [("", content)]
    for _ in range(MAX_DEPTH):
        for key, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}: {shortened(key)} must be a finite number, not {value}")
        level = [(f"{key}.{name}".lstrip("."), inner) for key, value in level for name, inner in _inside(value)]
    if level:
        raise UserError(f"{path}: is nested too deeply; at most {MAX_DEPTH} levels are read")


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()
