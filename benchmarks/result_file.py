"""The JSON file of a benchmark: rewritten with every row; an exception of one variant costs that variant only."""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import StopWith, UserError, shortened
from fastdiff.runtime.files import read_json

Label = dict[str, Any]
"""The keys of a case: {"config": …, "precision": …, "batch": …}."""


class ResultFile:
    """Rows of variants, and the reasons why others were left out, in memory and, given a path, in a JSON file.

    head    the keys before the rows, which say where the figures come from.
    lists   names of further lists beside rows and left_out.
    resume  whether rows and reasons that the file already holds are kept.

    UserError where no file can be written, before anything is timed.
    """

    def __init__(self, path: Path | None, head: dict[str, Any], resume: bool, lists: Sequence[str] = ()) -> None:
        self.path = path
        self.failed: list[str] = []
        self.lists = ("rows", "left_out", *lists)
        before = _rows_before(path, resume) if path is not None else {}
        self.content: dict[str, Any] = {**head, **{name: before.get(name, []) for name in self.lists}}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def missing(self, label: Label, variants: Sequence[str]) -> list[str]:
        """The variants that have neither a row, in any of the lists, nor a reason why they have none."""
        known = [entry for name in self.lists for entry in self.content[name]]
        return [name for name in variants if not any(_is_of(entry, label, name) for entry in known)]

    def add(self, row: dict[str, Any], name: str = "rows") -> None:
        """Append to a list, and write the file."""
        self.content[name].append(row)
        self._write()

    def forget(self, label: Label, variants: Sequence[str]) -> None:
        """Remove rows and reasons of variants that are measured again."""
        for name in ("rows", "left_out"):
            kept = [entry for entry in self.content[name] if not any(_is_of(entry, label, v) for v in variants)]
            self.content[name] = kept

    @contextmanager
    def guard(self, label: Label, variant: str) -> Iterator[None]:
        """Leave the variant out if the body raises an exception, and go on.

        The traceback goes to standard error. A UserError has none: it says that the variant can't run here.
        """
        try:
            yield
        except Exception as error:
            reason = _reason(error)
            if not isinstance(error, UserError):
                traceback.print_exception(error)
                self.failed.append(variant)
        else:
            return
        release_memory()  # the traceback's frames referred to it
        print(f"  {variant} left out: {reason}", flush=True)
        self.add({**label, "variant": variant, "reason": reason}, "left_out")

    def end(self) -> None:
        """Raise StopWith with exit code 1 if a variant failed in this run."""
        if self.failed:
            raise StopWith(1, f"failed and left out: {', '.join(self.failed)}; the tracebacks are above")

    def _write(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=2) + "\n")
        beside.replace(self.path)


def _rows_before(path: Path, resume: bool) -> dict[str, Any]:
    """The content of an earlier file that is to be kept. UserError if it is damaged, or if there can be no file."""
    if path.is_dir():
        raise UserError(f"--json: {path} is a folder; give a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json: {path.parent} can't be made ({error.strerror}); give another file") from None
    before = read_json(path) if resume and path.is_file() else {}
    if not isinstance(before, dict):
        raise UserError(f"--resume: {path} holds no results; leave --resume out, or name another file by --json")
    return before


def _is_of(entry: dict[str, Any], label: Label, variant: str) -> bool:
    return entry.get("variant") == variant and all(entry.get(key) == value for key, value in label.items())


def _reason(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return shortened(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}", 300)


def release_memory() -> None:
    """Collect objects that refer to each other, and give the GPU's cached memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
