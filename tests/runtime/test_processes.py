"""Requests of a rank reach all ranks, however often ranks exchange something else between two steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fastdiff.runtime.processes import Consensus


class Done:
    def wait(self) -> None:
        """Return at once."""


@pytest.fixture
def consensus(monkeypatch: pytest.MonkeyPatch) -> Consensus:
    """The consensus of two ranks, of which the other one requests nothing."""
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Done())
    return Consensus(2, 2, timedelta(seconds=1))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_request_is_heard(every: int, consensus: Consensus) -> None:
    """A request of step 4 is returned at step 5, although ranks also agree on saving every few steps."""
    heard = []
    for step in range(1, 9):
        heard.append(consensus.exchange([step >= 4, False])[0])
        if step % every == 0:
            assert consensus.any(False) is False
    assert heard.index(True) + 1 == 5
    assert heard == [False] * 4 + [True] * 4


def test_a_request_that_is_served_is_forgotten(consensus: Consensus) -> None:
    consensus.exchange([True, True])
    consensus.forget(1)
    assert consensus.exchange([False, False]) == [True, False]
    assert consensus.exchange([False, False]) == [False, False]


def test_alone() -> None:
    alone: Any = Consensus(1, 2, timedelta(seconds=1))
    assert alone.exchange([True, False]) == [True, False]
    alone.forget(0, 1)
    assert alone.any(True) is True
