"""Listing, labels, shards and pixels are the recorded ones."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
from helpers.golden_cases import Case, cases
from PIL import Image

from fastdiff.images.labels import index_images
from fastdiff.images.open import open_images
from fastdiff.images.pixels import load_image
from fastdiff.images.settings import DataSettings


@cases("images")
def test_listing_labels_and_shards(case: Case) -> None:
    folder = case.folder / "files"
    found = index_images(folder, "prefix")
    listing = found.names
    assert listing == case.expected["listing"]
    assert found.labels.tolist() == case.expected["labels"]
    for key, shard in case.expected["shards"].items():
        rank, size = map(int, key.split("/"))
        assert listing[rank::size] == shard


def _decoded_sha256(path: Path) -> str:
    with Image.open(path) as image:
        return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


@cases("images")
def test_pixels(case: Case) -> None:
    """Pixels are exact if the decoder reads the files alike, and otherwise within one 8-bit level."""
    folder = case.folder / "files"
    paths = [folder / name for name in case.expected["listing"]]
    sources = case.expected["sources"]
    same = [_decoded_sha256(folder / name) == sources[name]["decoded_sha256"] for name in case.expected["listing"]]
    for size in case.config["resolutions"]:
        images = np.stack([load_image(path, (size, size), "RGB") for path in paths])
        network = (images.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        if all(same):
            case.check(f"out_{size}", network)
        assert np.abs(network - case.data[f"out_{size}"]).max() <= 2 / 255 + 1e-6
        np.testing.assert_allclose(network[same], case.data[f"out_{size}"][same], atol=1e-6)


@cases("images")
def test_loader(case: Case) -> None:
    """Two epochs come in the order of the listing, without the last partial batch."""
    size, batch = case.config["resolutions"][0], case.config["loader_batch_size"]
    settings = DataSettings(
        data_dir=str(case.folder / "files"), loader="pillow", labels="prefix", shuffle=False, drop_last=True
    )
    with open_images(settings, size_hw=(size, size), channels=3, batch_size=batch, class_cond=True) as loader:
        count = len(case.data["out_loader_y"])
        batches = list(itertools.islice(loader, count))
        assert count == 2 * case.expected["loader_batches_per_epoch"]
    case.check("out_loader_y", torch.stack([b.labels for b in batches]))
    means = [(b.images.double() / 127.5 - 1).mean(dim=(1, 2, 3)).numpy() for b in batches]
    case.check("out_loader_image_means", np.stack(means))
