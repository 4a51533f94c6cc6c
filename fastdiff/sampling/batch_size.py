"""Finds the batch size at which a machine draws fastest, and caches it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastdiff.runtime.files import write_json
from fastdiff.runtime.machine import cache_folder

MIN_SPEEDUP = 1.03
"""Least speedup for which a batch twice as large is chosen; smaller batches balance the work better."""


def best_batch_size(
    seconds: Callable[[int], float], most: int, key: dict[str, Any], cache: Path | None = None
) -> tuple[int, str]:
    """The fastest of the batch sizes 1, 2, 4, … up to `most`, and a log line that says how it was found.

    seconds(size)  Measures one network call. It may raise torch.OutOfMemoryError, or return infinity for a size that
                   does not fit into memory.
    key            Everything that the result depends on. If the JSON file `cache` contains it, nothing is measured.

    Raises torch.OutOfMemoryError if not even one image fits.
    """
    cache = cache or cache_folder() / "batch_sizes.json"
    digest = hashlib.sha256(json.dumps({**key, "most": most}, sort_keys=True).encode()).hexdigest()
    known = _read(cache)
    if digest in known:
        return known[digest], f"{known[digest]}, as found before (in {cache})"
    rates: dict[int, float] = {}
    size, best = 1, 0
    while size <= most:
        try:
            rate = size / seconds(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            rate = 0.0
        rates[size] = rate
        if not rate or (best and size >= 4 * best):
            break
        if not best or rate > MIN_SPEEDUP * rates[best]:
            best = size
        size *= 2
    if not best:
        raise torch.OutOfMemoryError("not even one image fits")
    with suppress(OSError):  # if the cache can't be written, the size is measured again next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, {**_read(cache), digest: best}, sync=False)
    tried = ", ".join(f"{size}: {rate:.4g}" for size, rate in rates.items() if rate)
    return best, f"{best} (images x evaluations per second at {tried})"


def _read(cache: Path) -> dict[str, int]:
    try:
        content = json.loads(cache.read_text())
        return {key: size for key, size in content.items() if isinstance(size, int) and size > 0}
    except (OSError, ValueError, AttributeError):
        return {}  # there is no cache yet, or the file is damaged: the sizes are measured again
