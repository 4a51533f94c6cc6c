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


def _tell(**fields: object) -> None:
    with Path(os.environ["FASTDIFF_TEST_REPORT"]).open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called for every phase of every test, under xdist in the process that gathers the workers' reports."""
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
        _tell(test=report.nodeid, reason=reason.strip().splitlines()[0][:300] if reason.strip() else "")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the counts, once: xdist's workers run in processes of their own, which have no terminal."""
    if not hasattr(session.config, "workerinput"):
        _tell(**{name: _counts[name] for name in ("passed", "failed", "skipped")})
