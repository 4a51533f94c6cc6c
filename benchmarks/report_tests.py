"""A pytest plugin that tells gpu_proof.py of every failure when it happens, and of the counts at the end.

Loaded with `-p benchmarks.report_tests`; FASTDIFF_TEST_REPORT names the file it appends JSON lines to. A test run that
is killed at its limit has told of all failures up to then.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

_counts: Counter[str] = Counter()
_is_worker = False


def _tell(**fields: object) -> None:
    with Path(os.environ["FASTDIFF_TEST_REPORT"]).open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called for every phase of every test; under xdist by the worker, and by the process that gathers the reports."""
    if _is_worker:
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
        _tell(test=report.nodeid, reason=reason.strip().splitlines()[0][:300] if reason.strip() else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Called for every file; one that can't be imported counts as a failure."""
    if report.failed and not _is_worker:
        _counts["failed"] += 1
        _tell(test=report.nodeid, reason=str(report.longrepr).strip().splitlines()[-1][:300])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the counts, once."""
    if not _is_worker:
        _tell(**{name: _counts[name] for name in ("passed", "failed", "skipped")})
