"""The order of images is a function of the seed and the position."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.images.order import Order, share


def first(order: Order, count: int, start: int = 0) -> list[int]:
    return order.indices(np.arange(start, start + count, dtype=np.int64)).tolist()


def test_every_image_comes_once_per_epoch_in_a_new_order():
    order = Order(num_images=23, batch_size=8, seed=5)
    epochs = [first(order, 23, 23 * e) for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(23))
    assert epochs != [first(Order(23, 8, seed=6), 23, 23 * e) for e in range(3)]


def test_the_order_is_pinned():
    # other numbers would change every run that another release resumes
    order = Order(10, 4, seed=1)
    assert first(order, 20) == [6, 2, 1, 0, 8, 4, 3, 9, 7, 5, 7, 0, 5, 1, 3, 8, 4, 9, 2, 6]
    assert order.flips(np.arange(16)).astype(int).tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0]


def test_without_shuffling_the_listing_repeats():
    assert first(Order(3, 8, shuffle=False), 8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_dropping_the_last_keeps_whole_batches_of_one_epoch(shuffle):
    order = Order(num_images=12, batch_size=5, shuffle=shuffle, drop_last=True)
    assert order.epoch_length == 10
    epochs = [first(order, 10, 10 * e) for e in range(30)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len(set().union(*epochs)) == (12 if shuffle else 10)


def test_dropping_does_not_apply_to_a_folder_smaller_than_a_batch():
    assert Order(3, 8, drop_last=True).epoch_length == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_out_the_same_global_batch(world_size):
    order = Order(num_images=7, batch_size=6, seed=3)
    for start in (0, 6, 120):
        shares = [share(start, 6, rank, world_size) for rank in range(world_size)]
        assert {len(s) for s in shares} == {6 // world_size}
        assert sorted(np.concatenate(shares).tolist()) == list(range(start, start + 6))
        assert shares[-1][0] == start + world_size - 1
        together = np.empty(6, dtype=np.int64)
        for rank, positions in enumerate(shares):
            together[rank::world_size] = order.indices(positions)
        assert together.tolist() == first(order, 6, start)


def test_flips_depend_on_seed_and_position_alone():
    positions = np.arange(20000, dtype=np.int64)
    flips = Order(5, 4, seed=9).flips(positions)
    assert flips.dtype == bool
    assert abs(flips.mean() - 0.5) < 0.02
    assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.02
    assert abs((flips == Order(5, 4, seed=10).flips(positions)).mean() - 0.5) < 0.02
    np.testing.assert_array_equal(Order(99, 3, seed=9).flips(positions[777:800]), flips[777:800])


def test_any_seed_works():
    for seed in (-1, 0, 2**63, 2**70):
        assert sorted(first(Order(9, 3, seed=seed), 9)) == list(range(9))
