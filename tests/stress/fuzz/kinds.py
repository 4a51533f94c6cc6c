"""The kinds of cases, with their bounds."""

from __future__ import annotations

from typing import NamedTuple

from fuzz import arrays, broken, checkpoints, command_lines, pictures, states
from fuzz.cases import Kind


class Bounded(NamedTuple):
    """A kind of cases."""

    cases: Kind
    count: int
    """The number of cases that the tests run."""
    limit_seconds: float = 20.0
    """Time after which a case counts as hung."""
    bound_bytes: int = 512 << 20
    """The most memory by which a process may grow over all its cases."""


KINDS = {
    "pictures": Bounded(pictures.cases, 2000, bound_bytes=2 << 30),
    "bombs": Bounded(pictures.bombs, 2, limit_seconds=60.0, bound_bytes=4 << 30),
    "loaders": Bounded(pictures.loader_cases, 3, limit_seconds=60.0, bound_bytes=3 << 30),
    "settings": Bounded(command_lines.settings, 700),
    "json": Bounded(command_lines.json_texts, 350),
    "words": Bounded(command_lines.words, 350),
    "checkpoints": Bounded(checkpoints.cases, 500),
    "sampling": Bounded(checkpoints.sampling_cases, 40),
    "states": Bounded(states.cases, 120),
    "npz": Bounded(arrays.npz_cases, 250),
    "evaluation": Bounded(arrays.evaluation_cases, 250),
    "parts": Bounded(arrays.part_cases, 150),
    "packed": Bounded(arrays.packed_cases, 150),
    "pickles": Bounded(arrays.pickle_cases, 200),
}
ALL = {**KINDS, "broken": Bounded(broken.cases, 7, limit_seconds=3.0, bound_bytes=500 << 20)}
"""All kinds, including one for tests of the harness."""
