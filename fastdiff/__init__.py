"""fastdiff: train, sample and score pixel-space diffusion models."""

import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_package = Path(__file__).resolve().parent
# A script run as a file has this folder on sys.path, where settings.py and others would shadow other modules.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _package]
if not (_package / "kernels").is_dir():  # a checkout: kernels/ lies beside this package, not inside it
    __path__.append(str(_package.parent))


def __getattr__(name: str) -> Any:
    """`fastdiff.load`, `fastdiff.Model` and `fastdiff.Samples` (see `fastdiff.api`), imported at their first use."""
    if name in ("load", "Model", "Samples"):
        from fastdiff import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
