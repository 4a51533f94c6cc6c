"""Recognises what fastdiff itself has written below a folder of images, so that a run isn't trained on its own samples.

a run's folder            config.json with the settings of a run, or checkpoints/ beside status.json or progress.csv
a sampling job's folder   job.json
a grid of samples         samples_NxHxWxC.png, _steps.png or _steps.gif beside the job's other files
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from fastdiff.errors import UserError, one_line
from fastdiff.runtime.files import read_json

logger = logging.getLogger(__name__)
IMAGES = "images"
"""Folder of a sampling job for its PNG files."""
PREVIEWS = "samples"
"""Folder of a run for its previews."""
_GRID = re.compile(r"(samples_\d+x\d+x\d+x\d+)(?:_steps)?\.(?:png|gif)")
_MARKS = ("config.json", "checkpoints", "status.json", "progress.csv", "job.json")
_NAMED = 5
"""Most names in a message."""


def kind_of_output(folder: Path, names: Collection[str]) -> Literal["run", "job", ""]:
    """Whether a folder with these files and folders is a run's or a sampling job's."""
    if "config.json" in names and _holds(folder / "config.json", {"model", "diffusion", "train"}):
        return "run"
    if "checkpoints" in names and ("status.json" in names or "progress.csv" in names):
        return "run"
    return "job" if "job.json" in names and _holds(folder / "job.json", {"identity", "shape"}) else ""


def is_grid(name: str, names: Collection[str]) -> bool:
    """Whether a file is a sampling job's grid or trajectory, by the files beside it."""
    if not name.startswith("samples_") or not (found := _GRID.fullmatch(name)):  # most names end here
        return False
    return "job.json" in names or any(found[1] + end in names for end in (".npz", ".zip", "-000000.tar"))


def check_root(root: Path) -> Literal["job", ""]:
    """The kind of the folder that is given as data. Raises UserError for a run's, and for its previews."""
    place = root.resolve()
    run = place.parent if place.name == PREVIEWS else place
    if _kind_of_folder(run) == "run":
        where = "in the folder" if run != place else "the folder"
        raise UserError(
            f"{root} is {where} of a training run, whose pictures are previews; give the folder of the images to read"
        )
    return "job" if _kind_of_folder(place) == "job" else ""


def _kind_of_folder(folder: Path) -> Literal["run", "job", ""]:
    return kind_of_output(folder, [name for name in _MARKS if (folder / name).exists()])


def is_linked_previews(folder: Path) -> bool:
    """Whether the folder is a link to a run's previews."""
    place = folder.resolve() if folder.is_symlink() else folder
    return place != folder and place.name == PREVIEWS and _kind_of_folder(place.parent) == "run"


def refuse_as_run(folder: Path, data_dir: Path, flag: str = "--data_dir") -> None:
    """Raise UserError if a run in `folder` would write its files among the images that it reads, which `flag` names."""
    if data_dir.resolve() in (folder.resolve(), (folder / PREVIEWS).resolve()):
        raise UserError(f"--run_dir: {folder} would mix the run's files with the images of {flag}; give another folder")


def say_what_is_read(root: Path, kind: str, count: int, left_out: list[Path]) -> None:
    """Log how many images of a job's folder are read, and what is left out below a folder, on one of several ranks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if kind and count:
        logger.warning("%s is the folder of a sampling job; its images are read as data: %d", root, count)
    if left_out:
        names = [one_line(path.relative_to(root).as_posix()) for path in left_out]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        logger.warning(
            "%s: what runs and sampling jobs wrote is left out, %d in all: %s%s",
            root,
            len(names),
            ", ".join(names[:_NAMED]),
            more,
        )


def _holds(file: Path, keys: set[str]) -> bool:
    try:
        content = read_json(file)
    except UserError:
        return False
    return isinstance(content, dict) and content.keys() >= keys
