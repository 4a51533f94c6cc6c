"""The manifest job.json, which describes the job in a folder; all processes of a job agree on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

from fastdiff.errors import UserError
from fastdiff.runtime.files import PARTIAL, files_in, partial_path, sync_path, write_json
from fastdiff.sampling.job.claims import Claims
from fastdiff.sampling.pictures import FileNames

NAME = "job.json"
_OURS = re.compile(r"samples_\d+x\d+x\d+x\d+(\.npz|\.png|\.zip|-\d+\.tar|_steps\.png|_steps\.gif)")
_REMEDY = "name another folder, or give --overwrite True"


@dataclass(frozen=True)
class Job:
    """The images to draw, and the files to write from them."""

    identity: dict[str, Any]
    """Everything that the images depend on, as JSON: setting → value. Not the count or batch size."""
    count: int
    """The job is images 0 to count - 1."""
    shape: tuple[int, int, int]
    """Height, width, channels."""
    labelled: bool
    seed: int
    chunk_size: int
    """Images per chunk, unless the job in the folder has chunks of another size."""
    save_as: tuple[str, ...] = ("npz",)
    """Of npz, png, zip, tar."""
    grid_images: int = 0
    """Images in the picture grid."""
    grid_classes: int = 0
    """More than 0: the grid has rows by class, for this many classes."""
    class_names: tuple[str, ...] | list[str] = ()
    names: tuple[str, ...] = ()
    """Names for the picture files (see `pictures.FileNames`)."""
    trajectory: int = 0
    """Images whose x_0 predictions become a strip and a GIF."""
    note: str = ""
    """The end of the closing line."""


class Manifest(TypedDict):
    """The content of job.json."""

    identity: dict[str, Any]
    shape: list[int]
    labelled: bool
    seed: int
    part_size: int
    """Images per chunk."""
    class_names: NotRequired[list[str]]
    names: NotRequired[list[str]]
    """Only where the picture files have names of their own."""


def manifest_of(job: Job) -> Manifest:
    """The job's manifest as it is after a round trip through JSON."""
    given = {"identity": job.identity, "shape": job.shape, "labelled": job.labelled, "seed": job.seed}
    more = {"class_names": job.class_names, "names": job.names}
    used = {key: value for key, value in more.items() if value}
    manifest: Manifest = json.loads(json.dumps({**given, "part_size": job.chunk_size, **used}))
    return manifest


def digest(identity: dict[str, Any]) -> str:
    """A short hash of everything that the images depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def agree(folder: Path, manifest: Manifest, overwrite: bool) -> Manifest:
    """Return the manifest in the folder; writes it if there is none.

    Raises UserError and changes nothing if the folder holds another job; overwrite removes that job instead.
    """
    if overwrite and _problem(folder, manifest):
        _clear(folder, manifest)
    for _ in range(2):
        if problem := _problem(folder, manifest):
            raise UserError(problem)
        if found := read_manifest(folder):
            return found
        _create(folder, manifest)  # unless another process, perhaps with another job, does so first
    raise UserError(f"{folder / NAME} is removed again and again")


def check_same(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if another job was started in the folder."""
    with suppress(ValueError):
        if read_manifest(folder) == manifest:
            return
    raise UserError(f"another job was begun in {folder} meanwhile, or its {NAME} removed")


def _problem(folder: Path, manifest: Manifest) -> str:
    """The reason why this job can't use the folder; empty if it can."""
    names = files_in(folder)  # listed first, because a job's files are written after its manifest
    try:
        found = read_manifest(folder)
    except ValueError:
        return f"{folder / NAME} is damaged; {_REMEDY}"
    if found is None:
        ours = sorted(name for name in names if _OURS.fullmatch(name) or name == "parts")
        return f"{folder} has {ours[0]}, but no {NAME} to say what job made it; {_REMEDY}" if ours else ""
    differences = _differences(found["identity"], manifest["identity"])
    for key in ("shape", "labelled", "seed"):
        differences = differences or _differences({key: found.get(key)}, {key: manifest.get(key)})
    return f"{folder} holds another job: {differences}; {_REMEDY}" if differences else ""


def _differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """'its seed is 0, now it is 1; its solver is ddim, now it is ddpm'. Empty when all values are the same."""

    def show(value: Any) -> str:
        return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)

    parts = []
    for key in sorted({*there, *now}):
        before, after = (show(values[key]) if key in values else "not given" for values in (there, now))
        if before != after:
            parts.append(f"its {key} is {before}, now it is {after}")
    return "; ".join(parts)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest; None if there is none. Raises ValueError if it is damaged."""
    try:
        found = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise ValueError("it has no identity")
    if not isinstance(found.get("part_size"), int) or found["part_size"] < 1:
        raise ValueError("it has no part_size")
    manifest: Manifest = found  # type: ignore[assignment]
    return manifest


def _create(folder: Path, manifest: Manifest) -> None:
    """Write job.json unless there is one: of several processes the first wins, and none sees an unfinished file."""
    staged = partial_path(folder / NAME)
    try:
        write_json(staged, manifest)
        try:
            os.link(staged, folder / NAME)  # fails where the file exists, unlike a rename
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not (folder / NAME).exists():
                staged.replace(folder / NAME)
        sync_path(folder)
    finally:
        staged.unlink(missing_ok=True)


def _clear(folder: Path, manifest: Manifest) -> None:
    """Replace another job by this one. One of several processes does so; the others wait until it has."""
    turns = Claims(folder / ".overwriting")
    while _problem(folder, manifest):
        claim = turns.take_alone("turn")
        if claim is None:
            time.sleep(0.05)
            continue
        with claim:
            if _problem(folder, manifest):
                _remove(folder)
                _create(folder, manifest)
    shutil.rmtree(turns.folder, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    """The names of the picture files in the manifest; empty where it has none."""
    found = None
    with suppress(ValueError):
        found = read_manifest(folder)
    names = found.get("names") if found else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remove(folder: Path) -> None:
    """Remove a job's files, the manifest last, and nothing else."""
    for name in ("parts", "claims"):
        shutil.rmtree(folder / name, ignore_errors=True)
    images, file_names = folder / "images", FileNames(names=_names(folder))
    for name in files_in(images):
        if file_names.index_of(name) is not None or (name.startswith(".") and name.endswith(PARTIAL)):
            (images / name).unlink(missing_ok=True)
    with suppress(OSError):
        images.rmdir()
    for name in files_in(folder):
        if _OURS.fullmatch(name) or (name.startswith(".samples_") and name.endswith(PARTIAL)):
            (folder / name).unlink(missing_ok=True)
    (folder / NAME).unlink(missing_ok=True)
