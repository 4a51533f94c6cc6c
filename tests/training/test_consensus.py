"""Wishes of ranks are heard, however often something else is agreed on between two steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fastdiff.training.consensus import Consensus


class Done:
    def wait(self) -> None:
        """At once."""


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Consensus:
    """Of two ranks, of which the other wishes nothing."""
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Done())
    return Consensus(2, 2, timedelta(seconds=1))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_wish_is_heard(every: int, agreement: Consensus) -> None:
    """Given at step 4 and from then on, with something saved after every so many steps."""
    heard = []
    for step in range(1, 9):
        heard.append(agreement.exchange([step >= 4, False])[0])
        if step % every == 0:
            assert agreement.any(False) is False
    assert heard.index(True) + 1 == 5
    assert heard == [False] * 4 + [True] * 4


def test_a_wish_that_is_granted_is_forgotten(agreement: Consensus) -> None:
    agreement.exchange([True, True])
    agreement.forget(1)
    assert agreement.exchange([False, False]) == [True, False]
    assert agreement.exchange([False, False]) == [False, False]


def test_alone() -> None:
    alone: Any = Consensus(1, 2, timedelta(seconds=1))
    assert alone.exchange([True, False]) == [True, False]
    alone.forget(0, 1)
    assert alone.any(True) is True
