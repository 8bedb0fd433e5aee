"""Windows of tokens as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onym.data.batches import IGNORED_TARGET, StreamWindows, TrainingBatches, evaluation_batches
from onym.data.order import shares_of, source_at
from onym.data.source_spec import PERIOD
from onym.data.sources import Source, Sources
from onym.data.tokens import TokenData, TokenStream
from onym.errors import DataError


def stream(length: int) -> TokenStream:
    return TokenStream((np.arange(length, dtype=np.uint16),), (np.zeros(1, dtype=np.uint64),))


def test_a_target_is_the_token_after_its_input() -> None:
    inputs, targets = TrainingBatches([StreamWindows(stream(1000), 16)], 4, seed=0)[5]
    assert inputs.shape == targets.shape == (4, 16)
    assert (targets == inputs + 1).all()
    assert (inputs[:, 0] % 16 == 0).all(), "windows do not overlap"


def test_an_epoch_predicts_every_token_once() -> None:
    batches = TrainingBatches([StreamWindows(stream(16 * 12 + 1), 16)], 4, seed=0)
    seen = sorted(int(t) for batch in range(3) for t in batches[batch][1].flatten())
    assert seen == list(range(1, 16 * 12 + 1))


@given(length=st.integers(2, 300), context=st.integers(1, 20), batch_size=st.integers(1, 6))
def test_an_evaluation_predicts_every_token_once_in_batches_of_one_shape(length: int, context: int, batch_size: int) -> None:
    seen = []
    for inputs, targets in evaluation_batches(stream(length), context, batch_size, limit=10**6):
        assert inputs.shape == targets.shape == (batch_size, context)
        assert (inputs >= 0).all()
        counted = targets != IGNORED_TARGET
        assert (targets[counted] == inputs[counted] + 1).all()
        seen += targets[counted].tolist()
    assert seen == list(range(1, length))


def test_a_limited_evaluation_is_spread_over_the_stream() -> None:
    batches = list(evaluation_batches(stream(10_001), 10, 4, limit=5))
    assert len(batches) == 5
    starts = [int(row[0]) for inputs, _ in batches for row in inputs]
    assert starts == list(range(0, 10_000, 500))


def sources(*lengths: int) -> Sources:
    return Sources(tuple(Source(str(n), 1, TokenData(Path(str(n)), stream(n), stream(9), 1)) for n in lengths))


def test_a_corpus_shorter_than_one_batch_is_named() -> None:
    sources(4 * 16 + 1).windows(16, 4, "'small.txt'")
    with pytest.raises(DataError, match=r"'small\.txt' has 64 tokens to train on, fewer than one batch of 4 x 16"):
        sources(4 * 16).windows(16, 4, "'small.txt'")


def test_a_source_that_runs_dry_is_named() -> None:
    sources(17, 1000).windows(16, 4, "")
    with pytest.raises(DataError, match=r"The source '16' of --mix has 16 tokens to train on, fewer than one window of 16"):
        sources(16, 1000).windows(16, 4, "")


def test_tokens_of_several_shards_are_one_stream() -> None:
    whole = np.arange(100, dtype=np.uint16)
    cut = TokenStream(tuple(np.split(whole, [10, 10, 35])), tuple(np.zeros(0, dtype=np.uint64) for _ in range(4)))
    assert len(cut) == 100
    for start in range(101):
        for stop in range(start, 110):
            assert np.array_equal(cut.read(start, stop), whole[start:stop])


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=6), st.integers(0, 2**40), st.integers(0, 9))
def test_each_source_has_its_share_and_gives_each_window_in_turn(weights: list[float], first: int, seed: int) -> None:
    shares = shares_of(weights)
    assert shares.sum() == PERIOD
    assert shares.min() >= 1
    assert np.abs(shares - np.array(weights) / sum(weights) * PERIOD).max() <= len(weights)
    period = first // PERIOD
    positions = np.arange(period * PERIOD, (period + 2) * PERIOD, dtype=np.uint64)
    of, before = source_at(positions, shares, seed)
    for source, share in enumerate(shares.tolist()):
        assert before[of == source].tolist() == list(range(period * share, (period + 2) * share)), "none left out, none twice"
    at = positions[:: PERIOD // 7]
    assert np.array_equal(source_at(at, shares, seed)[0], of[:: PERIOD // 7]), "each is a function of its number"


def test_a_mixture_is_the_same_for_any_number_of_processes() -> None:
    windows = [StreamWindows(stream(length), 8) for length in (400, 90)]
    whole = TrainingBatches(windows, 12, 3, [0.7, 0.3])
    parts = [TrainingBatches(windows, 12, 3, [0.7, 0.3], (rank, 3)) for rank in range(3)]
    for batch in (0, 1, 341, 10**6):
        inputs, targets = whole[batch]
        assert torch.equal(torch.cat([part[batch][0] for part in parts]), inputs)
        assert torch.equal(torch.cat([part[batch][1] for part in parts]), targets)
        assert (targets == inputs + 1).all()


def test_the_sources_of_a_mixture_are_visited_in_different_orders_and_each_epoch_completely() -> None:
    windows = [StreamWindows(stream(64 * 8 + 1), 8), StreamWindows(stream(64 * 8 + 1), 8)]
    batches = TrainingBatches(windows, PERIOD, 0, [1, 1])
    of, _ = source_at(np.arange(PERIOD, dtype=np.uint64), shares_of([1, 1]), 0)
    firsts = batches[0][0][:, 0].numpy() // 8
    one, other = firsts[of == 0], firsts[of == 1]
    assert sorted(one[:64]) == sorted(other[:64]) == list(range(64))
    assert not np.array_equal(one[:64], other[:64])
