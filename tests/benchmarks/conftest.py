"""Tests import the scripts in benchmarks/ as `benchmarks.x`, for which the repository's root must be on sys.path.

`benchmarks` is a namespace package of which this folder is a part too, so no test here may have the name of a script.
"""

import sys
from typing import Any

import pytest
from helpers import ROOT

sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def processes() -> Any:
    from fastdiff.training.deepspeed_engine import start_processes

    return start_processes()
