"""A run's checkpoint folders: whole or not there, checked by a manifest, old ones removed.

checkpoints/step_NNNNNN/                a checkpoint; under this name it is complete and on disk
checkpoints/step_NNNNNN/manifest.json   size and SHA-256 of each of its files
checkpoints/latest                      the name of the newest
checkpoints/.step_NNNNNN.partial        one that is being written
checkpoints/.step_NNNNNN.replaced       one that is being replaced by another of the same step
checkpoints/.step_NNNNNN.removed        one that is being removed
checkpoints/step_NNNNNN.damaged         one that was found damaged when the run went on from an older one

A rename makes a folder appear or vanish whole, so a run killed between any two operations leaves only names with a dot
behind, which `tidy` clears away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from fastdiff.errors import UserError

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d+)$")


def step_of(folder: Path) -> int:
    """12 of step_000012, or of .step_000012.partial and the like."""
    match = _STEP_FOLDER.fullmatch(_real(folder).name)
    assert match, folder
    return int(match[1])


def folder_of(checkpoints: Path, step: int) -> Path:
    """step_000012 of 12."""
    return checkpoints / f"step_{step:06d}"


def listed(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((p for p in checkpoints.glob("step_*") if _STEP_FOLDER.fullmatch(p.name) and p.is_dir()), key=step_of)


# --- durable writing ---


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A file on disk, whole or not at all, in place of an older one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into, until `commit`."""
    partial = _dotted(folder_of(checkpoints, step), "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, checkpoints: Path, step: int) -> Path:
    """Give a complete folder its manifest, its real name, and the pointer; each is on disk before the next."""
    files = sorted(partial.iterdir())
    content = {"step": step, "files": {f.name: {"bytes": f.stat().st_size, "sha256": checksum(f)} for f in files}}
    for file in files:
        sync(file)
    write_text(partial / MANIFEST, json.dumps(content, indent=1) + "\n")
    final = folder_of(checkpoints, step)
    replaced = _dotted(final, "replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(checkpoints)
    point_to(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def point_to(checkpoint: Path) -> None:
    """Make it the run's latest."""
    write_text(checkpoint.parent / "latest", checkpoint.name + "\n")


def checksum(file: Path) -> str:
    """SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- checking ---


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, in few words; empty for a whole one. Reads every byte.

    A folder without a manifest is from before there were any, and passes with a state.pt.
    """
    manifest = checkpoint / MANIFEST
    try:
        if not manifest.is_file():
            return "" if (checkpoint / "state.pt").is_file() else "it has no manifest.json"
        files = json.loads(manifest.read_text())["files"]
        for name, wanted in files.items():
            file = checkpoint / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"
            if checksum(file) != wanted["sha256"]:
                return f"{name} has another content than was written"
        return "" if "state.pt" in files else "manifest.json names no state.pt"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no manifest"
        return f"manifest.json can't be read ({reason})"


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence for each newer one that is damaged.

    Raises UserError when there are checkpoints, but not one is whole: starting over would bury them.
    """
    notes: list[str] = []
    # One without its name: the run was killed while it replaced it.
    nameless = [p for p in checkpoints.glob(".step_*.replaced") if not _real(p).exists()]
    folders = sorted([*listed(checkpoints), *nameless], key=step_of)
    for folder in reversed(folders):
        wrong = damage(folder)
        if not wrong:
            return folder, notes
        notes.append(f"{folder} is damaged ({wrong}) and left out")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {checkpoints} is whole ({notes[0]}); "
            "name another folder, or move them away"
        )
    return None, notes


# --- clearing away ---


def tidy(checkpoints: Path) -> list[str]:
    """Clear away what a killed run left behind; sentences on what there was."""
    notes = []
    for replaced in checkpoints.glob(".step_*.replaced"):
        if _real(replaced).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # killed between the two renames
            replaced.rename(_real(replaced))
    for left in [*checkpoints.glob(".step_*.partial"), *checkpoints.glob(".step_*.removed")]:
        if left.suffix == ".partial":
            notes.append(f"an unfinished checkpoint ({_real(left).name}) is cleared away")
        shutil.rmtree(left, ignore_errors=True)
    return notes


def set_aside(checkpoints: Path, step: int) -> list[str]:
    """Take those after `step`, from which the run could not go on, out of the list; sentences on where they are now.

    Listed, they would count among the newest, which stay when old ones are removed.
    """
    notes = []
    for folder in listed(checkpoints):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            notes.append(f"{folder.name} is kept as {aside.name}")
    return notes


def prune(checkpoints: Path, keep_last: int, keep_every: int, sound: int | None = None) -> list[int]:
    """Remove all but the newest keep_last (0: all stay) and those of steps that keep_every (0: none) divides.

    The newest of a step up to `sound` stays too: numbers were good until then, and the run may have to go back there.
    Returns the steps removed.
    """
    if not keep_last:
        return []
    folders = listed(checkpoints)
    kept = {*folders[-keep_last:], *[f for f in folders if sound is not None and step_of(f) <= sound][-1:]}
    old = [f for f in folders if f not in kept and (not keep_every or step_of(f) % keep_every)]
    for folder in old:
        remove(folder)
    return [step_of(folder) for folder in old]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; nobody ever sees half of it."""
    away = _dotted(checkpoint, "removed")
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _real(dotted: Path) -> Path:
    """step_000012 of .step_000012.partial, or of itself."""
    return dotted.with_name(dotted.name.removeprefix(".").partition(".")[0])


def _dotted(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")
