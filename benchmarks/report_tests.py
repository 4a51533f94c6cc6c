"""A pytest plugin that reports every failure to gpu_proof.py when it happens, and the counts at the end.

It is loaded by `-p benchmarks.report_tests` and appends JSON lines to the file that FASTDIFF_TEST_REPORT names. A test
run that is killed at its limit has reported all failures up to then.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

_counts: Counter[str] = Counter()
_is_worker = False


def _report(**fields: object) -> None:
    with Path(os.environ["FASTDIFF_TEST_REPORT"]).open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count and report. Under xdist both the worker and the process that gathers the reports call this."""
    if _is_worker:
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
        _report(test=report.nodeid, reason=reason.strip().splitlines()[0][:300] if reason.strip() else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report a file that can't be imported as a failure."""
    if report.failed and not _is_worker:
        _counts["failed"] += 1
        _report(test=report.nodeid, reason=str(report.longrepr).strip().splitlines()[-1][:300])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report the counts, once."""
    if not _is_worker:
        _report(**{name: _counts[name] for name in ("passed", "failed", "skipped")})
