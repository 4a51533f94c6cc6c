"""Two processes send gradients while the backward pass computes, because the network is compiled in regions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import HELPERS
from helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

CASES = ["0:regions", "1:regions", "1:whole", "2:regions", "2:whole"]
REGIONS = ["ascend_upper", "ascend_lower", "descend_lower", "descend_upper"]
"""In the order of the backward pass."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the events of each case, from one launch of two processes."""
    out = tmp_path_factory.mktemp("overlap") / "events.json"
    run_ranks([str(HELPERS / "overlap_run.py"), str(out), *CASES])
    return dict(zip(CASES, json.loads(out.read_text()), strict=True))


def backward_passes(events: list[str], last: str) -> list[list[str]]:
    """Split the events of a step into those of its micro-batches, each up to the next one's first region."""
    starts = [i for i, event in enumerate(events) if event == f"begin {last}"]
    return [events[start:end] for start, end in zip(starts, [*starts[1:], len(events)], strict=True)]


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_sent_between_regions(stage: int, recorded: dict[str, dict[str, Any]]) -> None:
    """Two buckets of three are sent before the last region's backward pass begins; at stage 1 once per step."""
    passes = backward_passes(recorded[f"{stage}:regions"]["events"], REGIONS[0])
    assert len(passes) == 2
    for i, events in enumerate(passes):
        order = [event for event in events if event != "send"]
        assert order == [f"{what} {name}" for name in REGIONS for what in ("begin", "end")]
        if stage == 1 and i == 0:
            assert "send" not in events
            continue
        for name, after in ("ascend_lower", "descend_lower"), ("descend_lower", "descend_upper"):
            assert "send" in events[events.index(f"end {name}") : events.index(f"begin {after}")], (name, after)
        assert events[-1] == "send"


@pytest.mark.parametrize("stage", [1, 2])
def test_one_graph_sends_only_at_its_end(stage: int, recorded: dict[str, dict[str, Any]]) -> None:
    for events in backward_passes(recorded[f"{stage}:whole"]["events"], "whole"):
        assert events[:2] == ["begin whole", "end whole"]


def test_stage_0_needs_no_regions(recorded: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed reduces after the last backward pass, so the network stays one graph."""
    events = recorded["0:regions"]["events"]
    assert events[:4] == ["begin whole", "end whole"] * 2
    assert set(events[4:]) == {"send"}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_numbers_are_those_of_one_graph(stage: int, recorded: dict[str, dict[str, Any]]) -> None:
    """So they are to rounding; sums of a gradient over regions may be taken in another order."""
    for ours, whole in zip(recorded[f"{stage}:regions"]["losses"], recorded[f"{stage}:whole"]["losses"], strict=True):
        for name, value in whole.items():
            assert ours[name] == pytest.approx(value, rel=2.0**-8), name
