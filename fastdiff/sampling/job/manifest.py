"""What job a folder holds: job.json, on which all processes agree, and what is removed to hold another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.runtime.files import PARTIAL, files_in, partial_path, sync_path
from fastdiff.sampling.job.claims import Claims, kept_alive
from fastdiff.sampling.job.exports import index_in

NAME = "job.json"
_OURS = re.compile(r"samples_\d+x\d+x\d+x\d+(\.npz|\.png|\.zip|-\d+\.tar|_steps\.png|_steps\.gif)")
_PATIENCE = 10.0  # seconds for others to write a small file


def digest(identity: dict[str, Any]) -> str:
    """A short name for everything that makes the images what they are."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def agree(folder: Path, record: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of the job in the folder: the one that is there, else this one, which then is there.

    Raises UserError, and leaves everything as it is, when the folder holds another job; overwrite removes that instead.
    """
    problem = _problem(folder, record)
    if problem and overwrite:
        _clear(folder, record)
    elif problem:
        raise UserError(problem)
    if not (folder / NAME).exists():
        _create(folder, record)
        problem = _problem(folder, record)
        if problem:  # somebody else was quicker, with another job
            raise UserError(problem)
    found = _read(folder)
    assert found is not None
    return found


def check_same(folder: Path, record: dict[str, Any]) -> None:
    """UserError when the folder has come to hold another job."""
    try:
        same = _read(folder) == record
    except ValueError:
        same = False
    if not same:
        raise UserError(f"--out_dir: another job was begun in {folder} meanwhile, or its {NAME} removed")


def _problem(folder: Path, record: dict[str, Any]) -> str:
    """Why the folder can't take this job, or nothing."""
    remedy = "name another folder, or give --overwrite True"
    names = files_in(folder)  # first: a job's files come after its record
    try:
        found = _read(folder)
    except ValueError:
        return f"--out_dir: {folder / NAME} is damaged; {remedy}"
    if found is None:
        ours = sorted(name for name in names if _OURS.fullmatch(name) or name == "parts")
        if ours:
            return f"--out_dir: {folder} has {ours[0]}, but no {NAME} to say what job made it; {remedy}"
        return ""
    differences = compare(found.get("identity", {}), record["identity"])
    for key in ("shape", "labelled", "seed"):
        if not differences and found.get(key) != record[key]:
            differences = compare({key: found.get(key)}, {key: record[key]})
    return f"--out_dir: {folder} holds another job: {differences}; {remedy}" if differences else ""


def compare(there: dict[str, Any], now: dict[str, Any]) -> str:
    """'its seed is 0, now it is 1; its solver is ddim, now it is ddpm'. Empty when all is the same."""
    parts = []
    for key in sorted({*there, *now}):
        before, after = (_show(values[key]) if key in values else "not given" for values in (there, now))
        if before != after:
            parts.append(f"its {key} is {before}, now it is {after}")
    return "; ".join(parts)


def _show(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _read(folder: Path) -> dict[str, Any] | None:
    """The record; None without one. ValueError when it is damaged."""
    started = time.monotonic()
    while True:
        try:
            found = json.loads((folder / NAME).read_text())
            if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
                raise ValueError("it is no record of a job")
            if not isinstance(found.get("part_size"), int) or found["part_size"] < 1:
                raise ValueError("it has no part_size")
            return found
        except FileNotFoundError:
            return None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValueError:  # where there are no links, it may be half written
            age = time.time() - _changed(folder / NAME)
            if not 0 <= age < _PATIENCE or time.monotonic() - started > _PATIENCE:
                raise
            time.sleep(0.1)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _create(folder: Path, record: dict[str, Any]) -> None:
    """Write job.json unless there is one: the first wins, and nobody sees it half written."""
    text = json.dumps(record, indent=1, ensure_ascii=False).encode()
    staged = partial_path(folder / NAME)
    try:
        with open(staged, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, folder / NAME)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            with suppress(FileExistsError), open(folder / NAME, "xb") as file:  # a file system without links
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        sync_path(folder)
    finally:
        staged.unlink(missing_ok=True)


def _clear(folder: Path, record: dict[str, Any]) -> None:
    """Remove another job's files and begin this one. Of several processes one does; the others wait until it has."""
    turns = Claims(folder / ".overwriting")
    while _problem(folder, record):
        claim = turns.take_alone("turn")
        if claim is None:
            time.sleep(0.05)
            continue
        with kept_alive(claim):
            if _problem(folder, record):
                _remove(folder)
                _create(folder, record)
    for name in files_in(turns.folder):
        with suppress(OSError):
            (turns.folder / name).unlink()
    with suppress(OSError):
        turns.folder.rmdir()


def _remove(folder: Path) -> None:
    """What a job leaves, its record last, and nothing else."""
    for name in ("parts", "claims"):
        shutil.rmtree(folder / name, ignore_errors=True)
    images = folder / "images"
    for name in files_in(images):
        if index_in(name) is not None or (name.startswith(".") and name.endswith(PARTIAL)):
            (images / name).unlink(missing_ok=True)
    with suppress(OSError):
        images.rmdir()
    for name in files_in(folder):
        if _OURS.fullmatch(name) or (name.startswith(".samples_") and name.endswith(PARTIAL)):
            (folder / name).unlink(missing_ok=True)
    (folder / NAME).unlink(missing_ok=True)


def new_record(
    identity: dict[str, Any], shape: tuple[int, int, int], labelled: bool, seed: int, part_size: int
) -> dict[str, Any]:
    """A record as it reads when it comes back from JSON."""
    record = {"identity": identity, "shape": list(shape), "labelled": labelled, "seed": seed, "part_size": part_size}
    returned: dict[str, Any] = json.loads(json.dumps(record))
    return returned
