"""Launch plans that send small maps down every path of the group norm kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fastdiff.kernels import group_norm_silu
from fastdiff.kernels.group_norm_silu_plan import Plan, plan

SPLIT = {"slab": False, "rows": 8, "block_l": 4, "block_c": 32}
LOOPED = {"slab": True, "one_block": False, "block_l": 4, "programs": 3}
WAYS: dict[str, dict[str, Any]] = {"one block": {}, "looped slab": LOOPED, "split": SPLIT}


def planned(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Replace fields of every launch plan."""

    def changed(B: int, L: int, *args: Any) -> Plan:
        made = dataclasses.replace(plan(B, L, *args), **changes)
        return dataclasses.replace(made, splits=-(-L // made.rows))

    monkeypatch.setattr(group_norm_silu, "plan", changed)
