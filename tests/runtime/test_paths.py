"""Paths are expanded as in a shell, unless something has that very name, and errors are one sentence."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.runtime.paths import expand_path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of me")
    monkeypatch.setenv("FD_DATA", "/mnt/d$HOME")
    monkeypatch.setenv("FD_TILDE", "~/x")
    monkeypatch.delenv("FD_NONE", raising=False)
    return tmp_path


USER = pwd.getpwuid(os.getuid())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("", ""),
        ("~", "/home/of me"),
        ("~/run", "/home/of me/run"),
        (f"~{USER.pw_name}/run", f"{USER.pw_dir}/run"),
        ("$HOME/run", "/home/of me/run"),
        ("${HOME}run/$FD_DATA", "/home/of merun//mnt/d$HOME"),  # a value is not expanded again
        ("$FD_TILDE", "/home/of me/x"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("cost_5$", "cost_5$"),
        ("$5 and ${}/$", "$5 and ${}/$"),
        ("a\0$HOME", "a\0/home/of me"),
        ("\udcff/$HOME", "\udcff//home/of me"),
    ],
)
def test_expanded(given: str, want: str) -> None:
    assert expand_path(given) == want


@pytest.mark.parametrize("name", ["$HOME", "~bob", "x${FD_NONE}", "a/$FD_NONE"])
def test_an_existing_name_is_taken_as_it_is(name: str, place: Path) -> None:
    (place / name).mkdir(parents=True)
    assert expand_path(name) == name
    assert expand_path(f"{name}/new") == f"{name}/new"


def test_a_folder_named_tilde_hides_no_home(place: Path) -> None:
    (place / "~" / "old").mkdir(parents=True)
    assert expand_path("~/new") == "/home/of me/new"
    assert expand_path("~/old") == "~/old"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("$FD_NONE/x", "$FD_NONE/x: the environment variable FD_NONE is not set; set it, or write the whole path"),
        ("~/${FD_NONE}", "~/${FD_NONE}: the environment variable FD_NONE is not set; set it, or write the whole path"),
        ("~no-such-user/x", "~no-such-user/x: there is no user no-such-user; write the whole path"),
    ],
)
def test_refused(given: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_path(given)
    assert str(caught.value) == sentence
