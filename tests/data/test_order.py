"""The order of the data: a permutation an epoch, and a pure function of (seed, batch)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onym.data.order import epoch_key, permute, windows_at


def window_numbers(batch: int, batch_size: int, windows: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    return windows_at(np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.uint64), windows, seed)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_position_is_visited_exactly_once(size: int, key: int) -> None:
    order = permute(np.arange(size, dtype=np.uint64), size, key)
    assert sorted(order.tolist()) == list(range(size))


@given(windows=st.integers(1, 50), batch_size=st.integers(1, 20), seed=st.integers(0, 2**63), epochs=st.integers(1, 4))
def test_batches_cover_each_epoch_without_replacement(windows: int, batch_size: int, seed: int, epochs: int) -> None:
    batches = -(-epochs * windows // batch_size)
    stream = np.concatenate([window_numbers(batch, batch_size, windows, seed) for batch in range(batches)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * windows : (epoch + 1) * windows].tolist()) == list(range(windows))


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    in_turn = [window_numbers(batch, 8, 1000, seed=3).tolist() for batch in range(300)]
    assert window_numbers(217, 8, 1000, seed=3).tolist() == in_turn[217]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (permute(np.arange(500, dtype=np.uint64), 500, epoch_key(0, epoch)) for epoch in (0, 1))
    other = permute(np.arange(500, dtype=np.uint64), 500, epoch_key(1, 0))
    assert (first != second).mean() > 0.9
    assert (first != other).mean() > 0.9


def test_the_order_is_the_same_for_ever() -> None:
    """Runs that were started with this order must continue in it: these numbers may never change."""
    assert window_numbers(0, 8, 1000, seed=0).tolist() == FIRST
    assert window_numbers(10**6, 8, 1000, seed=42).tolist() == LATER


FIRST = [230, 81, 579, 450, 51, 397, 906, 913]
LATER = [521, 991, 564, 40, 185, 365, 208, 96]


def test_neighbours_in_the_text_are_not_neighbours_in_the_order() -> None:
    order = permute(np.arange(10_000, dtype=np.uint64), 10_000, epoch_key(0, 0)).astype(np.int64)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.05
