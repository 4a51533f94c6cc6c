"""Tests of the scripts in benchmarks/ import them as `benchmarks.x`, for which the repository's root must be known.

`benchmarks` is a namespace package: this folder is its other half, so no test here may bear a script's name.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
