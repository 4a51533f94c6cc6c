"""Paths as users write them: with ~ and environment variables, as in a shell.

A shell expands neither in --run_dir=~/run nor in a JSON file. This module imports no PyTorch.
"""

from __future__ import annotations

import os
import re

from fastdiff.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Expand ~, ~USER, $NAME and ${NAME}, unless a file or folder has that very name.

    Raises UserError for a variable that is not set and a user that doesn't exist.
    """
    if not (path.startswith("~") or _VARIABLE.search(path)) or _is_literal(path):
        return path
    whole = os.path.expanduser(_VARIABLE.sub(lambda found: _value(found[1] or found[2], path), path))
    if whole.startswith("~"):
        raise UserError(f"{path}: there is no user {whole[1:].split('/')[0]}; write the whole path")
    return whole


def _is_literal(path: str) -> bool:
    """Whether the path exists as it is written, or its part up to the last name with a variable or ~USER does."""
    names = path.split("/")
    last = max((i for i, name in enumerate(names) if _VARIABLE.search(name)), default=0)
    part = "/".join(names[: last + 1])
    try:
        return os.path.lexists(path) or (part != "~" and os.path.lexists(part))
    except ValueError:  # a NUL character
        return False


def _value(name: str, path: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise UserError(f"{path}: the environment variable {name} is not set; set it, or write the whole path")
    return value
