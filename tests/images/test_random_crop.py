"""Random crops: their sizes and places, their pixels, and that the seed and the position decide them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.images.order import Order
from fastdiff.images.pixels import cropping_recipe_for, load_image, recipe_for


def take(loader, count):
    return torch.cat([batch.images for batch in itertools.islice(loader, count)])


@pytest.mark.parametrize("size_hw", [(32, 32), (16, 24)])
@pytest.mark.parametrize("shape", [(75, 101), (200, 64), (20, 24)])
def test_every_size_and_place_comes_and_none_beyond(size_hw, shape):
    """The shorter side is resized to 32 to 40 pixels for 32, each about equally often; the crop is anywhere inside."""
    steps = np.linspace(0, 1, 50, endpoint=False)
    recipes = [cropping_recipe_for(*shape, size_hw, (u, v, v)) for u in steps for v in steps]
    for recipe in recipes:
        inside = [0 <= c <= cover - side for c, cover, side in zip(recipe.corner, recipe.cover, size_hw, strict=True)]
        assert all(inside), recipe
    least = recipe_for(*shape, size_hw).cover
    for axis in (0, 1):
        covers = {recipe.cover[axis] for recipe in recipes}
        assert min(covers) == least[axis]
        assert max(covers) <= math.ceil(1.25 * least[axis]) + 1
        assert len({recipe.corner[axis] for recipe in recipes}) > 5
    if size_hw == (32, 32):
        shorter = [min(recipe.cover) for recipe in recipes]
        counts = [shorter.count(size) for size in range(32, 41)]
        assert max(counts) < 1.5 * min(counts)


def test_without_margin_it_is_the_whole_square():
    assert cropping_recipe_for(40, 40, (32, 32), (0, 0.9, 0.9)) == recipe_for(40, 40, (32, 32))


def test_pixels_are_those_of_the_resized_image(tmp_path, photo):
    """Halved by a box filter while that leaves enough, then bicubic, then cropped, with Pillow's own functions."""
    image = photo(161, 90)
    image.save(tmp_path / "a.png")
    crop = (0.999, 0.25, 0.75)  # the largest: 40 pixels for 32
    halved = image.resize((45, 80), Image.Resampling.BOX).resize((40, round(80 * 40 / 45)), Image.Resampling.BICUBIC)
    top, left = int(0.25 * (71 - 32 + 1)), int(0.75 * (40 - 32 + 1))
    wanted = np.asarray(halved.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(load_image(tmp_path / "a.png", (32, 32), "RGB", crop), wanted)


def test_the_numbers_are_uniform_and_independent_of_flips():
    order, positions = Order(10, 5, seed=3), np.arange(4000)
    numbers, flips = order.crops(positions), order.flips(positions)
    assert numbers.shape == (4000, 3)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert np.allclose(numbers.mean(0), 0.5, atol=0.03)
    together = np.corrcoef(np.concatenate([numbers.T, flips[None]]))
    assert np.abs(together - np.eye(4)).max() < 0.06  # 4 standard errors of a correlation
    assert not np.array_equal(Order(10, 5, seed=4).crops(positions), numbers)


def test_the_seed_and_the_position_decide(folder, open_loader):
    given = {"batch_size": 6, "seed": 2, "random_flip": True, "random_crop": True}
    whole = take(open_loader(folder, "pillow", **given), 8)
    assert not torch.equal(whole, take(open_loader(folder, "pillow", **{**given, "random_crop": False}), 8))
    for rank in (0, 1):
        assert torch.equal(take(open_loader(folder, "pillow", rank=rank, world_size=2, **given), 8), whole[rank::2])
    assert not torch.equal(whole[:12].sort(0).values, whole[12:24].sort(0).values)  # each epoch crops anew


def test_once_and_auto_take_the_centre_and_pillow(folder, open_loader):
    loader = open_loader(folder, "auto", batch_size=6, random_crop=True)
    assert loader.loader_name == "pillow"
    central = open_loader(folder, "pillow", batch_size=6)
    pairs = zip(loader.once(), central.once(), strict=True)
    assert all(torch.equal(a.images, b.images) for a, b in pairs)


@pytest.mark.parametrize("settings", [{"loader": "dali"}, {"cache": "disk"}, {"cache": "gpu"}])
def test_other_loaders_refuse(folder, open_loader, settings):
    with pytest.raises(UserError, match="--random_crop True needs images that Pillow decodes anew at each sight"):
        open_loader(folder, batch_size=6, random_crop=True, **settings)
