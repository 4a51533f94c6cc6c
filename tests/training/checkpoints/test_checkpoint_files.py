"""A checkpoint folder is complete or absent, even if the process is killed, the disk is full or bytes are damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS
from helpers.killed import killed_after

from fastdiff.errors import UserError
from fastdiff.runtime.files import ProcessId
from fastdiff.training.checkpoints import resume
from fastdiff.training.checkpoints.folder import (
    list_checkpoints,
    newest_whole,
    prune_checkpoints,
    set_aside,
    step_of,
    tidy,
)
from fastdiff.training.checkpoints.format import adam_state_dict, read_snapshot
from fastdiff.training.checkpoints.manifest import find_damage
from fastdiff.training.checkpoints.saver import Saver, write_checkpoint


def files_of(step: int, size: int = 100) -> Iterator[tuple[str, Any]]:
    """Yield the files of a state of one tensor whose values are all `step`."""
    state = {"w": torch.full((size,), float(step))}
    yield f"model{step:06d}.pt", state
    yield f"ema_0.9_{step:06d}.pt", state
    yield f"opt{step:06d}.pt", adam_state_dict(state, state, 3, {"lr": 0.1})
    yield "state.pt", {"step": step, "updates": step}


def save(folder: Path, step: int) -> Path:
    return write_checkpoint(folder, step, files_of(step))


def value_of(checkpoint: Path) -> float:
    """Return the value of all tensors in a checkpoint, and assert that it is undamaged."""
    assert find_damage(checkpoint) == ""
    snapshot = read_snapshot(checkpoint, ["0.9"])
    values = {float(t.unique()) for t in (snapshot.model["w"], snapshot.ema["0.9"]["w"], snapshot.exp_avg["w"])}
    assert len(values) == 1
    return values.pop()


def test_manifest_names_every_file(tmp_path: Path) -> None:
    made = save(tmp_path, 5)
    content = json.loads((made / "manifest.json").read_text())
    assert set(content["files"]) == {"model000005.pt", "ema_0.9_000005.pt", "opt000005.pt", "state.pt"}
    for name, entry in content["files"].items():
        assert entry["bytes"] == (made / name).stat().st_size
        sums = subprocess.run(["sha256sum", made / name], capture_output=True, text=True, check=True).stdout
        assert sums.split()[0] == entry["sha256"]
    assert (tmp_path / "latest").read_text() == "step_000005\n"
    assert newest_whole(tmp_path) == (made, [])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit in the weights": ("model000002.pt", flip, "another content"),
    "a flipped bit in the rest": ("state.pt", flip, "another content"),
    "cut short": ("opt000002.pt", cut, "bytes, not"),
    "empty": ("ema_0.9_000002.pt", lambda file: file.write_bytes(b""), "has 0 bytes"),
    "a missing file": ("ema_0.9_000002.pt", Path.unlink, "is missing"),
    "a manifest cut short": ("manifest.json", cut, "manifest.json can't be read"),
    "a manifest of something else": ("manifest.json", lambda file: file.write_text("[1]"), "it is no manifest"),
    "another manifest": ("manifest.json", lambda file: file.write_text('{"files": {}}'), "names no state.pt"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_the_checkpoint_before_a_damaged_one_is_read(name: str, tmp_path: Path) -> None:
    file, spoil, words = DAMAGES[name]
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    spoil(newest / file)
    taken, notes = newest_whole(tmp_path / "checkpoints")
    assert taken is not None
    assert value_of(taken) == 1
    assert len(notes) == 1
    assert "step_000002 is damaged" in notes[0]
    assert words in notes[0]
    assert "\n" not in notes[0]
    snapshot = read_snapshot(tmp_path, ["0.9"])  # a run's folder, as for --resume_checkpoint
    assert snapshot.step == 1
    assert notes[0] in snapshot.notes
    with pytest.raises(UserError, match=r"step_000002 is damaged"):
        read_snapshot(newest, ["0.9"])


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(save(tmp_path, step) / "state.pt")
    with pytest.raises(UserError, match="none of the 2 checkpoints .* is whole .*step_000002 is damaged"):
        newest_whole(tmp_path)


def test_folders_without_manifests(tmp_path: Path) -> None:
    made = save(tmp_path, 4)
    (made / "manifest.json").unlink()
    assert newest_whole(tmp_path) == (made, [])
    (made / "state.pt").unlink()
    assert "manifest" in find_damage(made)


def test_keeping_few(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        saver.save(step, files_of(step), 0)
    saver.close()
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [4, 8, 9, 10]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_last_from_before_bad_numbers_stays(tmp_path: Path) -> None:
    """It is kept however many are written while steps are skipped, since the run may have to go back to it."""
    saver = Saver(tmp_path, keep_last=2)
    for step in range(1, 4):
        saver.save(step, files_of(step), 0, step)
    for step in range(4, 8):
        saver.save(step, files_of(step), 0, 3)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [3, 6, 7]
    saver.save(8, files_of(8), 0, 8)
    saver.close()
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [7, 8]


def test_keep_last_makes_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message about a full disk advises --keep_last, and with it the same command continues."""
    usage = shutil.disk_usage(tmp_path)
    for step in range(1, 5):
        save(tmp_path, step)

    def small_disk(path: Path) -> Any:  # with room for four folders of 100 bytes
        return usage._replace(free=450 - 100 * len(list_checkpoints(tmp_path)))

    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    with pytest.raises(UserError, match="keep fewer with --keep_last .step_000004 is whole"):
        Saver(tmp_path).save(5, files_of(5), 100)
    lines: list[str] = []
    Saver(tmp_path, keep_last=2, log=lines.append).save(5, files_of(5), 100)
    assert [value_of(p) for p in list_checkpoints(tmp_path)] == [4, 5]
    assert lines[-1] == "removed the checkpoints of steps 1, 2, 3"


def test_a_damaged_one_does_not_count_among_the_newest(tmp_path: Path) -> None:
    """It is renamed, since keep_last would otherwise keep it instead of a good one."""
    save(tmp_path, 2)
    flip(save(tmp_path, 4) / "state.pt")
    assert set_aside(tmp_path, 2) == ["step_000004 is kept as step_000004.damaged"]
    Saver(tmp_path, keep_last=1).save(3, files_of(3), 0)
    assert newest_whole(tmp_path) == (tmp_path / "step_000003", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000003", "step_000004.damaged"]


def test_steps_beyond_six_digits_are_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2_000_000):
        save(tmp_path, step)
    assert newest_whole(tmp_path)[0] == tmp_path / "step_2000000"
    assert prune_checkpoints(tmp_path, 2, 0) == [999_999]


def test_saving_in_the_background(tmp_path: Path) -> None:
    """Each checkpoint is written and reported, the one before always first."""
    lines: list[str] = []
    saver = Saver(tmp_path, background=True, log=lines.append)
    for step in (1, 2, 3):
        saver.save(step, files_of(step, 100_000), 0)
    saver.wait()
    assert [value_of(folder) for folder in list_checkpoints(tmp_path)] == [1, 2, 3]
    assert lines == [f"saved {tmp_path / f'step_{step:06d}'}" for step in (1, 2, 3)]
    saver.close()


@pytest.mark.parametrize("background", [False, True])
def test_memory_of_one_file_at_a_time(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file's content is freed once it is written; in the foreground before the next one is made."""
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []  # while each file is being written
    save_to_disk = torch.save

    def files() -> Iterator[tuple[str, Any]]:
        for name in ("model000001.pt", "ema_0.9_000001.pt", "opt000001.pt", "state.pt"):
            content = torch.ones(10)
            tensors.append(weakref.ref(content))
            holder = [{"w": content}]
            del content
            yield name, holder.pop()

    def counted(content: Any, file: Path) -> None:
        alive.append(sum(tensor() is not None for tensor in tensors))
        save_to_disk(content, file)

    monkeypatch.setattr(torch, "save", counted)
    saver = Saver(tmp_path, background=background)
    saver.save(1, files(), 0)
    saver.close()
    assert alive == ([4, 3, 2, 1] if background else [1, 1, 1, 1])


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_write(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence, the previous checkpoint is undamaged, and nothing of the new one is left."""
    save(tmp_path, 1)

    def full(file: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = Saver(tmp_path, background=background)
    monkeypatch.setattr(torch, "save", full)

    def save_and_wait() -> None:
        saver.save(2, files_of(2), 0)
        saver.wait()

    with pytest.raises(UserError, match="step 2 can't be written .*No space left.*step_000001 is whole"):
        save_and_wait()
    saver.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert value_of(tmp_path / "step_000001") == 1


def test_a_disk_with_too_little_room_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1000000\.00 GB, .* left; make room.*nothing is saved yet"):
        write_checkpoint(tmp_path, 1, files_of(1), size=10**15)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from training.checkpoints.test_checkpoint_files import files_of, value_of
from fastdiff.errors import UserError
from fastdiff.runtime.files import ProcessId
from fastdiff.training.checkpoints.manifest import find_damage
from fastdiff.training.checkpoints.saver import write_checkpoint
folder = Path(sys.argv[1])
for step in range(1, 100):
    try:
        write_checkpoint(folder, step, files_of(step, 100_000))
    except UserError as error:
        print(step, value_of(folder / f"step_{{step - 1:06d}}"), error)
        break
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A real file system of 12 MB, where users may mount one."""
    script = 'mount -t tmpfs -o size=12m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true", ""], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk (unshare --user --mount)")
    done = subprocess.run([*command, sys.executable, FULL_DISK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    step, value, message = done.stdout.strip().split(" ", 2)
    assert int(step) > 2, done.stdout
    assert float(value) == int(step) - 1
    assert "can't be written" in message or "needs" in message
    assert f"step_{int(step) - 1:06d} is whole" in message


def test_unfinished_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    """`tidy` looks in the run's folder too. Files from another host stay, since their process may be running."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    ended = ProcessId.own()._replace(started=1)
    elsewhere = ended._replace(host="another-host")
    for owner in (ended, elsewhere):
        (tmp_path / f".status.json.{owner.tag}.partial").touch()
        (folder / f".latest.{owner.tag}.partial").touch()
    tidy(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".status.json.{elsewhere.tag}.partial", "checkpoints"]
    assert sorted(p.name for p in folder.iterdir()) == [f".latest.{elsewhere.tag}.partial", "latest", "step_000001"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on unprotected; where not even the file can be made, it is refused."""

    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with resume.lock(tmp_path):
        assert resume.holds_run(tmp_path)
    with pytest.raises(UserError, match="--run_dir: .*absent can't be written to"), resume.lock(tmp_path / "absent"):
        pass


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_between_any_two_operations(replaces: bool, tmp_path: Path) -> None:
    """At whichever operation the run dies, listed checkpoints are undamaged; the newest is the old or the new one."""
    step = 2 if replaces else 3
    at = 0
    while True:
        folder = tmp_path / f"{at}"
        save(folder, 1)
        save(folder, 2)

        def overwrite(folder: Path = folder) -> None:
            Saver(folder, keep_last=2).save(step, files_of(step), 0)

        dead = killed_after(at, overwrite)
        newest, notes = newest_whole(folder)
        assert newest is not None
        assert notes == []
        assert value_of(newest) in ((2,) if replaces else (2, 3)), at
        for each in list_checkpoints(folder):
            assert value_of(each) == step_of(each)
        tidy(folder)
        assert newest_whole(folder)[0] is not None
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        if not dead:
            break
        at += 1
    assert at > 15
