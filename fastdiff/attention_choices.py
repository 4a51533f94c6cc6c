"""The measured choices of how attention is computed, a table in attention_choices.json beside this file.

benchmarks/choose_attention.py writes it from what benchmarks/gpu_proof.py has timed. An entry is for one GPU, dtype,
head size, length and kind of work; `ops.attention` follows its own rule where the table has none.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.errors import UserError, quoted
from fastdiff.runtime.files import read_json, write_text
from fastdiff.runtime.machine import device_name

FILE = Path(__file__).with_suffix(".json")
WAYS = ("ours", "sdpa", "flash", "cudnn", "efficient")
"""Our kernels, the backend that PyTorch chooses for scaled_dot_product_attention, and three of its backends."""


class Key(NamedTuple):
    """What an entry is for."""

    gpu: str
    """Its name in torch.cuda.get_device_name()."""
    dtype: str
    """As "bfloat16"."""
    D: int
    L: int
    work: str
    """ "training", forward and backward together, or "drawing", forward alone."""


class Entry(NamedTuple):
    """One choice and the figures that it rests on."""

    key: Key
    way: str
    microseconds: dict[str, list[float]]
    """Way → quartile, median and quartile of the timed rounds, summed over the shapes of this D and L."""
    date: str
    torch: str
    triton: str


def read(path: Path) -> dict[Key, Entry]:
    """The entries of a table. UserError where it can't be read or is no table."""
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: must be a list of entries, as benchmarks/choose_attention.py writes it")
    entries = [_entry(found, path) for found in content]
    return {entry.key: entry for entry in entries}


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write a table, sorted, one entry a line."""
    rows = (
        {**entry.key._asdict(), **dict(zip(Entry._fields[1:], entry[1:], strict=True))} for entry in sorted(entries)
    )
    write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _entry(found: Any, path: Path) -> Entry:
    try:
        key = Key(*(found[name] for name in Key._fields))
        entry = Entry(key, *(found[name] for name in Entry._fields[1:]))
    except (KeyError, TypeError):
        raise UserError(f"{path}: {quoted(found)} must be an entry with {', '.join(Key._fields)} and a way") from None
    if entry.way not in WAYS:
        raise UserError(f"{path}: way must be one of {', '.join(WAYS)}, not {quoted(entry.way)}")
    if not all(isinstance(value, (str, int)) for value in key):  # a list could not be looked up
        raise UserError(f"{path}: {quoted(found)} must have words and numbers for {', '.join(Key._fields)}")
    return entry


@functools.cache
def _table(path: Path) -> tuple[dict[Key, Entry], str]:
    """The entries, and the reason why there are none if the file can't be used: training goes on without it."""
    try:
        return read(path), ""
    except UserError as error:
        return {}, str(error)


@torch.compiler.assume_constant_result  # called while a graph is traced, not when it runs
def measured(device: torch.device, dtype: torch.dtype, L: int, D: int, training: bool) -> str:
    """One of WAYS for attention on a GPU, or an empty string where the table has no entry.

    It has none for deterministic algorithms, for which backends were not timed, and which cuDNN refuses.
    """
    entries, _ = _table(FILE)
    if not entries or torch.are_deterministic_algorithms_enabled():
        return ""
    name, work = str(dtype).removeprefix("torch."), "training" if training else "drawing"
    entry = entries.get(Key(device_name(device), name, D, L, work))
    return entry.way if entry else ""


def summary(device: torch.device) -> tuple[str, str]:
    """For the log of a run: how many choices there are for this GPU, by way, and why the table can't be used."""
    entries, problem = _table(FILE)
    name = device_name(device) if entries else ""
    here = Counter(entry.way for entry in entries.values() if entry.key.gpu == name)
    return ", ".join(f"{way} {count}" for way, count in here.most_common()), problem
