from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.order import Order, Place, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 1000, 4097])
def test_each_epoch_is_a_bijection(size: int) -> None:
    order = Order(size, seed=3)
    epochs = [list(order.epoch(e)) for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 16:
        assert epochs[0] != epochs[1] != epochs[2]


@given(size=st.integers(1, 2**40), key=st.text(max_size=4), data=st.data())
def test_images_are_in_range_and_differ(size: int, key: str, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=8))
    images = {permute(p, size=size, key=key) for p in places}
    assert len(images) == len(places)
    assert all(0 <= i < size for i in images)


def test_orders_are_equally_likely() -> None:
    """Chi-squared of the 24 orders of 4 items over many seeds; 23 degrees of freedom."""
    seeds = 12_000
    counts = Counter(tuple(Order(4, seed).epoch(0)) for seed in range(seeds))
    expected = seeds / 24
    assert len(counts) == 24
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 60


def test_neighbours_are_unrelated() -> None:
    order = np.array(list(Order(5000, seed=1).epoch(0)))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05


def test_same_place_same_rest() -> None:
    order = Order(37, seed=5)
    place = order.after(Place(), 30)
    rest = order.take(place, 50)
    stored = json.loads(json.dumps(place.state()))
    assert Order(37, seed=5).take(Place.restore(stored), 50) == rest
    assert order.take(Place(), 80)[30:] == rest
    assert order.after(place, 50) == order.after(Place(), 80) == Place(2, 6)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_what_one_would_take(world: int) -> None:
    order = Order(11, seed=2)
    alone = order.take(Place(1, 4), 21)
    shares = [order.take(Place(1, 4), 21, rank=r, world=world) for r in range(world)]
    assert sorted(i for share in shares for i in share) == sorted(alone)
    assert all(share == alone[r::world] for r, share in enumerate(shares))
