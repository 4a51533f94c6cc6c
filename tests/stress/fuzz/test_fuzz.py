"""Hostile input with fixed seeds. FASTDIFF_FUZZ=10 tests ten times as many cases; run.py tests new ones."""

from __future__ import annotations

import os

import pytest

from fuzz.campaign import run
from fuzz.kinds import KINDS

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("FASTDIFF_FUZZ", "1"))
MEANT = {
    "pictures": ("pictures",),
    "settings": ("settings", "json", "words"),
    "checkpoints and arrays": ("checkpoints", "sampling", "states", "npz", "parts", "packed", "pickles"),
}


def test_there_are_as_many_cases_as_stated() -> None:
    counts = {name: sum(KINDS[kind].count for kind in kinds) for name, kinds in MEANT.items()}
    assert counts["pictures"] >= 2000
    assert counts["settings"] >= 1000
    assert counts["checkpoints and arrays"] >= 500


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bombs"])  # which take seconds each to make
def test_nothing_goes_wrong(kind: str) -> None:
    if kind == "loaders":
        pytest.importorskip("nvidia.dali")
    report = run(kind, seed=0, start=0, stop=KINDS[kind].count * TIMES)
    assert not report.wrong, "\n".join(report.wrong)
    assert report.count == KINDS[kind].count * TIMES
    if KINDS[kind].count > 100:  # neither is all refused, which would be no test
        assert min(report.results["read"], report.results["refused"]) >= 3, str(report)


def test_the_campaign_notices() -> None:
    """The harness detects hangs, crashes, executed code, wrong exceptions, memory growth and nameless messages."""
    report = run("broken", 0, 0, 7)
    text = "\n".join(report.wrong)
    for part in ("took more than 3 s", "ended its process", "it ran code", "ZeroDivisionError", "MiB", "names none of"):
        assert part in text, (part, text)
    assert len(report.wrong) == 6
    assert report.results["read"] == 3
