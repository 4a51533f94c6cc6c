"""Launch plans that send small maps down every path of the group norm kernels."""

from __future__ import annotations

from typing import Any

import pytest
from fastdiff.kernels import group_norm_silu
from fastdiff.kernels.group_norm_silu_plan import Plan, arranged, plan

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"whole": False, "rows": 4, "block_l": 4, "block_c": 32},
    "parts of several blocks": {"whole": False, "rows": 8, "block_l": 4, "block_c": 16},
}


def planned(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Replace blocks of every launch plan. Three programs at once are fewer than a slab's parts."""

    def changed(B: int, L: int, C1: int, C2: int, group: int, itemsize: int, *rest: Any) -> Plan:
        made = plan(B, L, C1, C2, group, itemsize, *rest)
        blocks = {name: getattr(made, name) for name in ("block_c", "block_l", "rows", "whole")}
        return arranged(B, L, C1 + C2, group, itemsize, 3, **{**blocks, **changes})

    monkeypatch.setattr(group_norm_silu, "plan", changed)
