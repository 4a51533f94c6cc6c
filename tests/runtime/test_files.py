"""Files have their names only when they are whole, and a process is told from a later one with its number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_jobs import names
from helpers.polling import wait_until

from fastdiff.runtime.files import ProcessId, atomic_write, partial_path, remove_partial_files


def test_processes() -> None:
    """A process is gone if it ended or its number belongs to another process; of other hosts nothing is known."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = ProcessId.of(child.pid)
    assert ProcessId.parse(owner.tag) == owner
    assert not owner.is_gone()
    assert owner._replace(started=owner.started + 1).is_gone()
    child.kill()
    wait_until(owner.is_gone)  # even before its parent has waited for it
    child.communicate()
    assert owner.is_gone()
    assert not owner._replace(host="elsewhere").is_gone()
    assert not ProcessId.own().is_gone()


def test_whole_files(tmp_path: Path) -> None:
    """A file gets its name when it is finished; unfinished files are removed when their processes have ended."""
    target = tmp_path / "a.npz"

    def fail() -> None:
        with atomic_write(target) as file:
            file.write(b"half")
            assert names(tmp_path) == [partial_path(target).name]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []
    with atomic_write(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"
    ended, other = ProcessId.own()._replace(started=ProcessId.own().started + 1), ProcessId("elsewhere", 1, 2)
    for name in (f".a.npz.{ended.tag}.partial", f".a.npz.{other.tag}.partial", ".of.somebody.partial", ".b"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert names(tmp_path) == [f".a.npz.{other.tag}.partial", ".b", ".of.somebody.partial", "a.npz"]
    os.utime(tmp_path / f".a.npz.{other.tag}.partial", (0, 0))  # it has not been written to for long
    remove_partial_files(tmp_path)
    assert names(tmp_path) == [".b", ".of.somebody.partial", "a.npz"]
