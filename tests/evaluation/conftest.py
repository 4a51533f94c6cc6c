"""Random Inception weights, written once for all tests."""

from pathlib import Path

import pytest
from helpers.inception import write_random_weights


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("inception") / "random.pth")
