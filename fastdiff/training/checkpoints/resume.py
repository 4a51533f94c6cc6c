"""What a run goes on from, and whether it may."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.config.load import Config, SuperResConfig
from fastdiff.errors import UserError, blaming, quoted
from fastdiff.models import build_model, weights
from fastdiff.runtime.processes import Processes
from fastdiff.settings import affecting
from fastdiff.training.checkpoints import folder as checkpoint_files
from fastdiff.training.checkpoints import format as checkpoints
from fastdiff.training.checkpoints.format import Snapshot
from fastdiff.training.settings import CHANGES, TrainSettings

LOCK = ".lock"
SHARED = 60.0
"""Seconds in which what one rank has written must be seen by those on other nodes."""
LOCK_WAIT = 30.0
"""Seconds that a run waits for the one before it to end."""


def kind_of(config: Config) -> str:
    """super_res or unet, as checkpoints and config.json say."""
    return "super_res" if isinstance(config, SuperResConfig) else "unet"


def find_snapshot(config: Config, folder: Path) -> tuple[Snapshot | None, str]:
    """The state to go on from and where it is from: the newest whole checkpoint of the run in `folder`, before the one
    that resume_checkpoint names. UserError where the run there is of other settings than these.
    """
    train = config.train
    rates = [str(rate) for rate in train.ema_rate]
    with blaming("--run_dir"):
        previous, notes = checkpoint_files.newest_whole(folder / "checkpoints")
    if previous:
        _check_same_model(folder, config)
        source, model_file = previous, f"model{checkpoint_files.step_of(previous):06d}.pt"
        with blaming("--run_dir"):
            snapshot = checkpoints.read(previous / model_file, rates)
        snapshot.notes[:0] = notes
    elif train.resume_checkpoint:
        source = Path(train.resume_checkpoint)
        with blaming("--resume_checkpoint"):
            snapshot = checkpoints.read(source, rates)
    else:
        return None, ""
    with torch.device("meta"):
        model = build_model(config.model)
    labels = snapshot.model.get(checkpoints.LABELS)
    lacks_null_class = labels is not None and tuple(labels.shape[:1]) == (config.model.num_classes,)
    if config.model.null_class and lacks_null_class and not previous:
        checkpoints.add_null_class(snapshot)
    flag = "--run_dir" if previous else "--resume_checkpoint"
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in snapshot.model.items()}:
        with blaming(flag):
            weights.load_into(model, snapshot.model, source)  # raises an error that says what differs
    snapshot.notes += _changes(snapshot.state, train, source)
    return snapshot, str(source)


def _changes(state: dict[str, Any], train: TrainSettings, source: Path) -> list[str]:
    """Sentences on settings that differ from the checkpoint's; UserError for one that must be allowed to."""
    stored = state.get("settings") or {name: state[name] for name in CHANGES if name in state}
    lines, quiet = [], affecting(TrainSettings, "run")
    for name, now in train.model_dump(mode="json").items():
        if name not in stored or stored[name] == now:
            continue
        if name in CHANGES and name not in train.allow_change:
            raise UserError(
                f"--{name} {now}: {source} is of a run with {name} {stored[name]}; keep that, or say "
                f"--allow_change {name} to go on otherwise"
            )
        if name not in quiet:
            lines.append(f"{name} is {now} from here on; it was {stored[name]}")
    return lines


def _check_same_model(folder: Path, config: Config) -> None:
    file = folder / "config.json"
    if not file.is_file():
        return
    stored = checkpoints.read_json(file)
    if stored.get("kind", kind_of(config)) != kind_of(config):
        script = "super_res_train.py" if stored["kind"] == "super_res" else "train.py"
        raise UserError(f"--run_dir: {folder} holds a run of {script}; give another --run_dir, or use that script")
    for section in ("model", "diffusion"):
        now = getattr(config, section).model_dump(mode="json")
        absent = {"null_class": False} if section == "model" else {}  # from runs of before there was one
        then = stored.get(section)
        for name, value in {**absent, **(then if isinstance(then, dict) else {})}.items():
            if name in now and name != "use_checkpoint" and now[name] != value:
                raise UserError(
                    f"--run_dir: {folder} holds a run with {section}.{name} {value}, now it is {now[name]}; "
                    "give another --run_dir, or the run's own settings"
                )


def agree(
    processes: Processes, config: Config, folder: Path, snapshot: Snapshot | None, source: str
) -> tuple[Snapshot | None, str]:
    """What rank 0 goes on from, on every rank: others look again for a while where they found something else, as on
    file systems that lag, or when rank 0 has waited for the run before to end. UserError where that doesn't help.
    Collective.
    """
    found = _gathered(processes, source)
    until = time.monotonic() + SHARED
    while source != found[0] and time.monotonic() < until:
        time.sleep(1)
        snapshot, source = find_snapshot(config, folder)
    if any(each != found[0] for each in found):
        found = _gathered(processes, source)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"--run_dir: rank 0 goes on from {found[0] or 'nothing'}, rank {rank} from {other or 'nothing'}; "
                "all ranks must see the same folder: start again once they do"
            )
    return snapshot, source


def _gathered(processes: Processes, source: str) -> list[str]:
    found = [source] * processes.world_size
    if processes.world_size > 1:
        dist.all_gather_object(found, source)
    return found


def lock_new(folder: Path) -> AbstractContextManager[None]:
    """`lock` for a folder that had none when the run looked for checkpoints.

    UserError where another run has begun there since then, for it may have saved.
    """
    try:
        (folder / LOCK).touch(exist_ok=False)
    except FileExistsError:
        raise UserError(
            f"--run_dir: another run has begun in {folder} since this one started; give another --run_dir, or start "
            "again to go on from what that one has saved"
        ) from None
    return lock(folder)


def is_known(folder: Path) -> bool:
    """Whether a run has trained in this folder before, so that it can be locked. UserError where that can't be told, or
    its name isn't Unicode, as TensorBoard needs it.
    """
    try:
        str(folder).encode()
        return (folder / LOCK).is_file()
    except UnicodeEncodeError:
        raise UserError(f"--run_dir: {quoted(str(folder))} is no Unicode; name another folder") from None
    except OSError as error:
        raise UserError(
            f"--run_dir: {quoted(str(folder))} can't be opened ({error.strerror}); name another folder"
        ) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The only run that trains in this folder; waits a little for one that is about to end, then UserError.

    The system lets go of the lock when the process ends, however it does.
    """
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"--run_dir: {folder} can't be written to ({error.strerror}); name another folder") from error
    with file:
        until = time.monotonic() + LOCK_WAIT
        while not _locked(file):
            if time.monotonic() > until:
                owner = read_status(folder).get("process", "another process")
                raise UserError(f"--run_dir: {owner} is training in {folder}; stop it, or give another --run_dir")
            time.sleep(0.2)
        yield


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nothing protects
        return True
    return True


# --- status.json, for batch scripts that can't see exit codes ---


def write_status(folder: Path, state: str, step: int, exit_code: int | None = None, reason: str = "") -> None:
    """What the run does: running, done, preempted, diverged or failed."""
    content = {"state": state, "step": step, "exit_code": exit_code, "reason": reason}
    process = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        checkpoints.write_json(folder / "status.json", {**content, "process": process})
    except OSError as error:
        raise UserError(f"--run_dir: status.json in {folder} can't be written ({error.strerror})") from error


def read_status(folder: Path) -> dict[str, Any]:
    """The same; empty where there is none."""
    file = folder / "status.json"
    return checkpoints.read_json(file) if file.is_file() else {}
