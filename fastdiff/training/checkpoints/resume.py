"""What a run resumes from, whether its settings allow that, and the lock and status file of its folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.config.presets import preset_for_file
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.errors import UserError, blaming, quoted
from fastdiff.models import weights
from fastdiff.models.classifier import build_network
from fastdiff.runtime.files import FileLock, LocksUnsupported, read_json, write_json
from fastdiff.runtime.processes import Processes
from fastdiff.training.checkpoints.changes import (
    Change,
    changes_in,
    check_allowed,
    lines_for_log,
    need_permission,
    of_equal_shapes,
    permission,
    process_changes,
    shown,
)
from fastdiff.training.checkpoints.folder import newest_whole, step_of
from fastdiff.training.checkpoints.format import LABELS, Snapshot, add_null_class, read_snapshot
from fastdiff.training.effect import check_steps_left
from fastdiff.training.settings import STREAM_SETTINGS, TrainSettings

LOCK = ".lock"
_SCRIPTS = {"super_res": "super_res_train.py", "classifier": "classifier_train.py"}
FILE_SYSTEM_LAG = 60.0
"""Seconds within which every node sees what a process of another node has written to a shared folder."""
LOCK_WAIT = 30.0
"""Seconds that a run waits for the lock of a run that is about to end."""


def kind_of(config: Config) -> str:
    """The kind of model in checkpoints and config.json: super_res, classifier or unet."""
    if isinstance(config, ClassifierConfig):
        return "classifier"
    return "super_res" if isinstance(config, SuperResConfig) else "unet"


def find_snapshot(config: Config, folder: Path) -> tuple[Snapshot | None, str]:
    """Read the state to resume from; returns it and its path, or (None, "") for a new run.

    It is the newest undamaged checkpoint of the run in `folder`, or else the one named by resume_checkpoint. UserError
    where it is of a run with settings that contradict these, and allow_change doesn't name them.
    """
    train = config.train
    with blaming("--run_dir"):
        previous, notes = newest_whole(folder / "checkpoints")
    if previous:
        flag, source, file = "--run_dir", previous, previous / f"model{step_of(previous):06d}.pt"
        stored = _settings_of_run(folder)
        changes = _check_same_process(folder, stored, config)
    elif train.resume_checkpoint:
        source = file = Path(train.resume_checkpoint)
        flag, stored, changes = "--resume_checkpoint", _settings_around(source), []
    else:
        return None, ""
    with torch.device("meta"):
        model = build_network(config.model)
    with blaming(flag):
        snapshot = read_snapshot(file, [str(rate) for rate in train.ema_rate])
        snapshot.notes[:0] = notes
        labels = snapshot.model.get(LABELS)
        lacks_null_class = labels is not None and tuple(labels.shape[:1]) == (config.model.num_classes,)
        adds_null_class = config.model.null_class and lacks_null_class and not previous
        if adds_null_class:
            add_null_class(snapshot)
        own = {name: value.shape for name, value in model.state_dict().items()}
        if own != {name: value.shape for name, value in snapshot.model.items()}:
            weights.load_into(model, snapshot.model, source)  # raises an error that says what differs
    if not previous:
        check_steps_left(train, snapshot.step, str(source))
    if not previous or "model" not in stored:
        preset = preset_for_file(source)
        trained = snapshot.info or (preset.layer if preset else {})
        changes = of_equal_shapes(process_changes(trained, config), config.model.class_cond)
        changes = [change for change in changes if not (adds_null_class and change.name == "null_class")]
    state = snapshot.state
    settings = state.get("settings") or {name: state[name] for name in STREAM_SETTINGS if name in state}
    changes += changes_in("train", {"train": settings}, config)
    check_allowed(changes, train.allow_change, source)
    snapshot.notes += lines_for_log([*changes, *changes_in("data", stored, config)])
    return snapshot, str(source)


def _settings_of_run(folder: Path) -> dict[str, Any]:
    """The sections in the config.json of a run; empty where there is none."""
    file = folder / "config.json"
    return _read_object(file) if file.is_file() else {}


def _settings_around(source: Path) -> dict[str, Any]:
    """The sections in the config.json of the run that a checkpoint lies in; empty for one that lies elsewhere."""
    for folder in (source, *source.absolute().parents)[:4]:
        if (folder / "checkpoints").is_dir():
            with suppress(UserError):  # the checkpoint itself is read nevertheless
                return _settings_of_run(folder)
    return {}


def _check_same_process(folder: Path, stored: dict[str, Any], config: Config) -> list[Change]:
    """The settings of model and diffusion that differ from those of the run in `folder`, as allow_change permits.

    UserError where it doesn't permit one, and where the run is of another script.
    """
    if stored.get("kind", kind_of(config)) != kind_of(config):
        script = _SCRIPTS.get(str(stored["kind"]), "train.py")
        raise UserError(f"--run_dir: {folder} holds a run of {script}; give another --run_dir, or use that script")
    begun = stored.get("train")
    _check_same_beginning(folder, begun if isinstance(begun, dict) else {}, config.train)
    changes = process_changes(stored, config)
    if refused := need_permission(changes, config.train.allow_change):
        differences = ", ".join(f"{c.section}.{c.name} {shown(c.then)} (now it is {shown(c.now)})" for c in refused)
        raise UserError(
            f"--run_dir: {folder} holds a run with {differences}; give another --run_dir, or the run's own settings"
            f"{permission(refused, 'to go on with other ones')}"
        )
    return changes


def _check_same_beginning(folder: Path, stored: dict[str, Any], train: TrainSettings) -> None:
    """UserError if init_from is given for a run that began otherwise, which would go on without reading it."""
    before = stored.get("init_from", "")
    if train.init_from and Path(train.init_from).absolute() != Path(str(before)).absolute():
        raise UserError(
            f"--init_from: {folder} holds a run that {f'began from {before}' if before else 'did not begin from it'}; "
            "give another --run_dir to start a new run, or leave --init_from out to go on with that one"
        )


def agree_on_snapshot(
    processes: Processes, config: Config, folder: Path, snapshot: Snapshot | None, source: str
) -> tuple[Snapshot | None, str]:
    """Make every rank resume from the checkpoint that rank 0 found; takes and returns what `find_snapshot` returns.

    A rank that found another one looks again for FILE_SYSTEM_LAG seconds: the file system may lag, or rank 0 may have
    waited for the previous run to end. UserError where that doesn't help. Collective.
    """
    found = _gather(processes, source)
    until = time.monotonic() + FILE_SYSTEM_LAG
    while source != found[0] and time.monotonic() < until:
        time.sleep(1)
        snapshot, source = find_snapshot(config, folder)
    if any(each != found[0] for each in found):
        found = _gather(processes, source)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"--run_dir: rank 0 resumes from {found[0] or 'nothing'}, rank {rank} from {other or 'nothing'}; "
                "all ranks must see the same folder: start again once they do"
            )
    return snapshot, source


def _gather(processes: Processes, source: str) -> list[str]:
    found = [source] * processes.world_size
    if processes.world_size > 1:
        dist.all_gather_object(found, source)
    return found


# --- one run in a folder ---


def holds_run(folder: Path) -> bool:
    """Whether a run has trained in this folder before.

    UserError where the folder can't be opened, or its name isn't Unicode, which TensorBoard requires.
    """
    try:
        str(folder).encode()
        return (folder / LOCK).is_file()
    except UnicodeEncodeError:
        raise UserError(f"--run_dir: {quoted(str(folder))} is not Unicode; name another folder") from None
    except OSError as error:
        raise UserError(
            f"--run_dir: {quoted(str(folder))} can't be opened ({error.strerror}); name another folder"
        ) from error


def lock_new(folder: Path) -> AbstractContextManager[None]:
    """Like `lock`, for a folder that held no run when this one looked for checkpoints.

    UserError where another run has begun there since then, for it may have saved.
    """
    try:
        (folder / LOCK).touch(exist_ok=False)
    except FileExistsError:
        raise UserError(
            f"--run_dir: another run has begun in {folder} since this one started; give another --run_dir, or start "
            "again to resume from its checkpoints"
        ) from None
    return lock(folder)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the only run that may train in this folder; waits up to LOCK_WAIT seconds, then UserError.

    On a file system without locks the run continues without one.
    """
    file_lock = FileLock(folder / LOCK)
    try:
        if not file_lock.acquire(LOCK_WAIT):
            owner = read_status(folder).get("process", "another process")
            raise UserError(f"--run_dir: {owner} is training in {folder}; stop it, or give another --run_dir")
    except LocksUnsupported:
        pass
    except OSError as error:
        raise UserError(f"--run_dir: {folder} can't be written to ({error.strerror}); name another folder") from error
    try:
        yield
    finally:
        file_lock.release()


# --- status.json, for batch scripts that don't see exit codes ---


def write_status(folder: Path, state: str, step: int, exit_code: int | None = None, reason: str = "") -> None:
    """Write the state of a run: running, done, preempted, interrupted, diverged or failed."""
    content = {"state": state, "step": step, "exit_code": exit_code, "reason": reason}
    process = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        write_json(folder / "status.json", {**content, "process": process})
    except OSError as error:
        raise UserError(f"--run_dir: status.json in {folder} can't be written ({error.strerror})") from error


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote; empty where there is nothing."""
    file = folder / "status.json"
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where it holds another value."""
    content = read_json(file)
    return content if isinstance(content, dict) else {}
