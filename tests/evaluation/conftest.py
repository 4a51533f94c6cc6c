"""Feature networks for the tests: random Inception weights, and a small TorchScript module that is fast."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers.inception import write_random_weights
from torch import Tensor, nn


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("inception") / "random.pth")


class Quarters(nn.Module):
    """The mean colours of an image's quarters, 12 features of 0 to 2.55, and 4 logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 100
        return pool, 5 * pool[:, :4]


class Broken(nn.Module):
    """Features that are not finite for some images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3)).log()


def _script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="session")
def quarters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _script(Quarters(), tmp_path_factory.mktemp("networks") / "quarters.pt")


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _script(Broken(), tmp_path_factory.mktemp("networks") / "broken.pt")
