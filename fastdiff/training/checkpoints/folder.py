"""A run's checkpoint folders: writing them atomically, finding the newest undamaged one, removing old ones.

checkpoints/step_NNNNNN/                a checkpoint; under this name it is complete and on disk
checkpoints/step_NNNNNN/manifest.json   size and SHA-256 of each of its files (`manifest`)
checkpoints/latest                      the name of the newest
checkpoints/.step_NNNNNN.partial        one that is being written
checkpoints/.step_NNNNNN.replaced       one that is being replaced by another of the same step
checkpoints/.step_NNNNNN.removed        one that is being removed
checkpoints/step_NNNNNN.damaged         one that was found damaged when the run resumed from an older one
checkpoints/best/                       the best average so far (`best`); it is replaced in the same way as a checkpoint

Renaming a folder is atomic, so a run that is killed between any two operations leaves only hidden names behind, which
`tidy` removes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.runtime.files import hidden, new_folder, remove_partial_files, write_text
from fastdiff.training.checkpoints.manifest import find_damage, write_manifest

_STEP_FOLDER = re.compile(r"step_(\d+)$")


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name: 12 for step_000012, also for .step_000012.partial and the like."""
    match = _STEP_FOLDER.fullmatch(_real(folder).name)
    assert match, folder
    return int(match[1])


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps, such as step_000012."""
    return checkpoints / f"step_{step:06d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((p for p in checkpoints.glob("step_*") if _STEP_FOLDER.fullmatch(p.name) and p.is_dir()), key=step_of)


# --- writing ---


@contextmanager
def new_checkpoint(checkpoints: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder that becomes the checkpoint of `step`, with a manifest, when the block ends.

    It replaces an older checkpoint of that step, and `latest` names it. An exception in the block removes the folder.
    """
    with new_folder(step_folder(checkpoints, step)) as partial:
        yield partial
        write_manifest(partial, step)
    set_latest(step_folder(checkpoints, step))


def set_latest(checkpoint: Path) -> None:
    """Write the name of a checkpoint into the file `latest` beside it."""
    write_text(checkpoint.parent / "latest", checkpoint.name + "\n")


# --- finding ---


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, or None, and a sentence for each newer one that is damaged.

    Raises UserError when all checkpoints are damaged, because a run that starts over would replace them.
    """
    notes: list[str] = []
    # The run was killed while it replaced these, between the two renames.
    nameless = [p for p in checkpoints.glob(".step_*.replaced") if not _real(p).exists()]
    folders = sorted([*list_checkpoints(checkpoints), *nameless], key=step_of)
    for folder in reversed(folders):
        if not (wrong := find_damage(folder)):
            return folder, notes
        notes.append(f"{folder} is damaged ({wrong}) and left out")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {checkpoints} is whole ({notes[0]}); "
            "name another folder, or move them away"
        )
    return None, notes


# --- removing ---


def tidy(checkpoints: Path) -> list[str]:
    """Remove what a killed run left in its checkpoint folder and in the run's folder above; returns notes on it."""
    for folder in (checkpoints, checkpoints.parent):
        remove_partial_files(folder)
    notes = []
    for replaced in _hidden_in(checkpoints, "replaced"):
        if _real(replaced).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # killed between the two renames
            replaced.rename(_real(replaced))
    for left in _hidden_in(checkpoints, "partial", "removed"):
        if left.suffix == ".partial":
            notes.append(f"an unfinished checkpoint ({_real(left).name}) is cleared away")
        shutil.rmtree(left, ignore_errors=True)
    return notes


def set_aside(checkpoints: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`, which are damaged, to step_NNNNNN.damaged; returns notes on them.

    Otherwise they would count among the newest checkpoints, which `prune_checkpoints` keeps.
    """
    notes = []
    for folder in list_checkpoints(checkpoints):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            notes.append(f"{folder.name} is kept as {aside.name}")
    return notes


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int, last_good: int | None = None) -> list[int]:
    """Remove all checkpoints but the newest keep_last (0: keep all) and those of multiples of keep_every (0: none).

    The newest one up to step `last_good` is kept too: losses and gradients were finite until then, and the run may
    have to go back to it. Returns the removed steps.
    """
    if not keep_last:
        return []
    folders = list_checkpoints(checkpoints)
    kept = {*folders[-keep_last:], *[f for f in folders if last_good is not None and step_of(f) <= last_good][-1:]}
    old = [f for f in folders if f not in kept and (not keep_every or step_of(f) % keep_every)]
    for folder in old:
        remove_checkpoint(folder)
    return [step_of(folder) for folder in old]


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no reader sees a part of it."""
    away = hidden(checkpoint, "removed")
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _real(hidden: Path) -> Path:
    """step_000012 for .step_000012.partial and the like, and for itself."""
    return hidden.with_name(hidden.name.removeprefix(".").partition(".")[0])


def _hidden_in(checkpoints: Path, *endings: str) -> list[Path]:
    return [p for ending in endings for name in ("step_*", "best") for p in checkpoints.glob(f".{name}.{ending}")]
