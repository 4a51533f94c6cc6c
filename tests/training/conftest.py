"""Pictures for tests of training."""

from pathlib import Path

import pytest
from helpers.pictures_folder import make_pictures


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, which tests only read."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))
