"""What a drawer gives to a job, so that neither knows the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np


class Drawn(NamedTuple):
    """Images [n, H, W, C] uint8 and labels [n] int64 (None without classes), on the host."""

    images: np.ndarray
    labels: np.ndarray | None


Draw: TypeAlias = Callable[[np.ndarray, Callable[[float], None]], Drawn]
"""draw(index [n] int64, on_progress) → those images of the job. on_progress(images) is told fractions of images done, n
in all; an exception that it raises ends the drawing."""
