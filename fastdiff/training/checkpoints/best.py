"""The best average of the weights so far, by the scores of evaluations during training.

checkpoints/best/ema_RATE_NNNNNN.pt    the average, as in the checkpoint of that step
checkpoints/best/best.json             step, rate, metric and value, and what they were measured with

It stays when checkpoints are removed, and when the run goes back to an earlier step.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.weights import with_info
from fastdiff.runtime.files import new_folder, read_json, sync_path, write_json
from fastdiff.training.checkpoints.saver import save_file

NAME, ABOUT = "best", "best.json"


def read_best(checkpoints: Path) -> dict[str, Any]:
    """The entries of best.json; empty where there is none that can be read."""
    with suppress(UserError):
        content = read_json(checkpoints / NAME / ABOUT)
        value = content.get("value") if isinstance(content, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            return content
    return {}


def write_best(checkpoints: Path, about: dict[str, Any], weights: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write the weights with `info` in their metadata, and best.json, in place of the earlier best.

    Raises UserError where they can't be written; then the earlier best is left.
    """
    try:
        with new_folder(checkpoints / NAME) as partial:
            file = partial / f"ema_{about['ema_rate']}_{about['step']:06d}.pt"
            save_file(with_info(weights, info), file)
            sync_path(file)
            write_json(partial / ABOUT, about)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--run_dir: the best average can't be written to {checkpoints / NAME} ({reason}); make room: the same "
            "command resumes"
        ) from error
