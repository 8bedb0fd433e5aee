"""Which tokens are in batch i: a pure function of (seed, i).

The token stream is cut into windows of ``context_length``; each epoch visits every window once, in an order of its own.
Nothing is remembered from one batch to the next, so a run resumes at any step without a sampler state to save, and the
order does not depend on how many processes share a batch.

The order comes from a Feistel network over the window numbers (Luby and Rackoff, 1988), with cycle-walking to make its
domain the exact number of windows (Black and Rogaway, 2002). It needs no memory, where a shuffled array of a 10-billion-token
corpus takes 80 MB an epoch; and it is ours to keep, where NumPy may change its shuffles between versions (NEP 19).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onym.data.source_spec import PERIOD

UInt64Array = NDArray[np.uint64]

_ROUNDS = 6  # four make a good permutation in theory; small domains are better mixed with more


def permute(index: UInt64Array, size: int, key: int) -> UInt64Array:
    """Position ``index`` in the shuffled order of ``range(size)`` that ``key`` names.

    Args:
        index: uint64, each below ``size``.
        size: length of the sequence being shuffled, at least 1.
        key: 64 bits that choose the order.

    Returns:
        uint64 of the same shape. For a fixed key it is a bijection of ``range(size)``.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    round_keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) ^ _mix(np.array([key], dtype=np.uint64)))

    def encrypt(value: UInt64Array) -> UInt64Array:
        left, right = value >> half_bits, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half_bits) | right

    result = encrypt(index)
    while (outside := result >= size).any():  # the network's domain is at most four times `size`
        result[outside] = encrypt(result[outside])
    return result


def epoch_key(seed: int, epoch: int) -> int:
    """The key of one epoch's order."""
    return int(_mix(np.array([epoch], dtype=np.uint64) ^ _mix(np.array([seed % 2**64], dtype=np.uint64)))[0])


def windows_at(positions: UInt64Array, windows: int, seed: int) -> NDArray[np.int64]:
    """The windows at positions of a sequence that runs through all of them epoch after epoch, each time in another order.

    Args:
        positions: uint64, counted from 0 and without end.
        windows: windows in an epoch.
        seed: of the order.

    Returns:
        int64 of the same shape.
    """
    numbers = np.empty(len(positions), dtype=np.int64)
    epochs, within = positions // np.uint64(windows), positions % np.uint64(windows)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        numbers[chosen] = permute(within[chosen], windows, epoch_key(seed, int(epoch))).astype(np.int64)
    return numbers


def shares_of(weights: Sequence[float]) -> NDArray[np.int64]:
    """How many of :data:`PERIOD` sequences each source gives: in proportion to the weights, at least 1, int64 [sources]."""
    exact = np.array(weights) / np.sum(weights) * PERIOD
    counts: NDArray[np.int64] = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := PERIOD - int(counts.sum())) != 0:
        # the largest remainder first; where minima made it too many, the source that has most gives some up
        changed = np.argmax(exact - counts) if missing > 0 else np.argmax(counts)
        counts[changed] += 1 if missing > 0 else -1
    return counts


def source_at(positions: UInt64Array, shares: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], UInt64Array]:
    """Which source each sequence comes from, and how many of that source come before it.

    In every :data:`PERIOD` sequences each source has its share exactly, in an order of their own.

    Args:
        positions: uint64, numbers of sequences, counted from 0 and without end.
        shares: of each source, as :func:`shares_of` gives them.
        seed: of the run.

    Returns:
        The sources, int64, and the counts, uint64, both of the same shape as ``positions``.
    """
    sources, before = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.uint64)
    periods, slots = positions // np.uint64(PERIOD), (positions % np.uint64(PERIOD)).astype(np.int64)
    for period in np.unique(periods):
        order = permute(np.arange(PERIOD, dtype=np.uint64), PERIOD, epoch_key(~seed, int(period)))
        of_slot = np.searchsorted(np.cumsum(shares), order.astype(np.int64), side="right")
        earlier = np.empty(PERIOD, dtype=np.int64)
        for source, share in enumerate(shares):
            earlier[of_slot == source] = np.arange(share)
        chosen = periods == period
        sources[chosen] = of_slot[slots[chosen]]
        before[chosen] = (int(period) * shares[sources[chosen]] + earlier[slots[chosen]]).astype(np.uint64)
    return sources, before


def _mix(value: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes half of the output bits."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
