"""Windows of tokens as tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym.data.batches import IGNORED_TARGET, TrainingBatches, evaluation_batches
from onym.data.tokens import TokenStream
from onym.errors import DataError


def stream(length: int) -> TokenStream:
    return TokenStream(np.arange(length, dtype=np.uint16), np.zeros(1, dtype=np.uint64))


def test_a_target_is_the_token_after_its_input() -> None:
    inputs, targets = TrainingBatches(stream(1000), 16, 4, seed=0)[5]
    assert inputs.shape == targets.shape == (4, 16)
    assert (targets == inputs + 1).all()
    assert (inputs[:, 0] % 16 == 0).all(), "windows do not overlap"


def test_an_epoch_predicts_every_token_once() -> None:
    batches = TrainingBatches(stream(16 * 12 + 1), 16, 4, seed=0)
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


def test_a_corpus_shorter_than_one_batch_is_named() -> None:
    TrainingBatches(stream(4 * 16 + 1), 16, 4, seed=0)
    with pytest.raises(DataError, match=r"'small\.txt' has 64 tokens to train on, fewer than one batch of 4 x 16"):
        TrainingBatches(stream(4 * 16), 16, 4, seed=0, description="'small.txt'")
