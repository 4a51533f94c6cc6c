"""Synthetic pictures of smooth fields at several scales, which compress and resize like photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.images.loader import Loader
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings


def make_photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Make an RGB picture of this size, a different one for each seed."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells, strength in ((3, 60), (9, 30), (31, 12)):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * (strength / 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """photo(height, width, seed=0) makes an RGB picture."""
    return make_photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of twelve pictures of three classes, of kinds that loaders must treat differently."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    kinds = [
        ("a_0.jpg", make_photo(75, 101, 0)),
        ("a_1.png", make_photo(40, 33, 1)),
        ("a_2.jpg", make_photo(150, 64, 2).convert("L")),
        ("a_3.gif", make_photo(50, 70, 3).convert("P")),
        ("b_0.png", make_photo(64, 64, 4).convert("RGBA")),
        ("b_1.jpg", make_photo(90, 45, 5).convert("CMYK")),
        ("b_2.webp", make_photo(41, 57, 6)),
        ("b_3.png", make_photo(70, 66, 7).convert("1")),
        ("deep/a_4.jpeg", make_photo(32, 32, 8)),
        ("deep/b_4.PNG", make_photo(33, 32, 9).convert("LA")),
        ("deep/c_0.JPG", make_photo(20, 24, 10)),
        ("deep/c_1.png", make_photo(160, 129, 11).convert("L")),
    ]
    for name, image in kinds:
        image.save(root / name)
    return root


@pytest.fixture(params=["pillow", "dali"])
def loader_name(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture
def open_loader() -> Iterator[Callable[..., Loader]]:
    """open_images with settings and arguments in one call; its loaders are closed after the test."""
    opened = []

    def open_it(
        data_dir: Path,
        loader: str = "pillow",
        *,
        size_hw: tuple[int, int] = (32, 32),
        channels: int = 3,
        class_cond: bool = False,
        **given: object,
    ) -> Loader:
        chosen = {name: given.pop(name) for name in list(given) if name in DataSettings.model_fields}
        settings = DataSettings(data_dir=str(data_dir), loader=loader, **chosen)
        opened.append(open_images(settings, size_hw=size_hw, channels=channels, class_cond=class_cond, **given))
        return opened[-1]

    yield open_it
    for loader in opened:
        loader.close()
