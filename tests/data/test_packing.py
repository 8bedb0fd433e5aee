"""Windows of whole documents: nothing is cut that need not be, nothing is lost, and best fit fills them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onym.data import packing
from onym.data.batches import IGNORED_TARGET, TrainingBatches
from onym.data.packing import PackedWindows, Plan, describe, plan_windows
from onym.data.sources import Source, Sources
from onym.data.tokens import TokenData, TokenStream
from onym.errors import DataError
from onym.gpt.documents import documents_of

PADDING = 1 << 20
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def starts_of(lengths: list[int]) -> NDArray[np.uint64]:
    return np.cumsum([0, *lengths[:-1]]).astype(np.uint64)


def numbered(lengths: list[int], cut: int = 0) -> TokenStream:
    """A stream in which each token is its own number; in two shards where ``cut`` is in it."""
    starts, total = starts_of(lengths), sum(lengths)
    cut = min(cut, total)
    tokens = np.arange(total, dtype=np.uint32)
    shards = [tokens[:cut], tokens[cut:]] if 0 < cut < total else [tokens]
    bounds = [0, cut, total] if len(shards) == 2 else [0, total]
    known = [starts[(starts >= a) & (starts < b)] - np.uint64(a) for a, b in pairwise(bounds)]
    return TokenStream(tuple(shards), tuple(known))


def windows_of(plan: Plan) -> list[list[tuple[int, int]]]:
    segments = list(zip(plan.starts.tolist(), plan.stops.tolist(), strict=True))
    return [segments[a:b] for a, b in zip(plan.first_segment[:-1], plan.first_segment[1:], strict=True)]


def naive_best_fit(lengths: list[int], context: int) -> int:
    """How many windows best-fit decreasing needs, by looking at each open window."""
    left: list[int] = []
    for length in sorted((n % context for n in lengths if n % context > 1), reverse=True):
        fitting = [space for space in left if space >= length]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else context) - length)
    return len(left) + sum(n // context for n in lengths)


@settings(deadline=None)
@given(lengths=LENGTHS, context=st.integers(2, 16))
@example(lengths=[1, 1, 1], context=4)
@example(lengths=[8, 9, 4, 5], context=4)
def test_a_document_is_cut_only_where_it_is_longer_than_a_window(lengths: list[int], context: int) -> None:
    plan = plan_windows(starts_of(lengths), sum(lengths), context)
    assert plan.windows == naive_best_fit(lengths, context)
    found = Counter(segment for window in windows_of(plan) for segment in window)
    expected: list[tuple[int, int]] = []
    for start, length in zip(starts_of(lengths).astype(int).tolist(), lengths, strict=True):
        pieces = [(at, min(at + context, start + length)) for at in range(start, start + length, context)]
        expected += [(a, b) for a, b in pieces if b - a > 1]
    assert found == Counter(expected)
    used = [sum(b - a for a, b in window) for window in windows_of(plan)]
    assert all(0 < size <= context for size in used)
    if plan.windows:
        assert plan.padding_share == pytest.approx(1 - sum(used) / (plan.windows * context))
        assert plan.padding_share >= 0


@settings(deadline=None)
@given(lengths=LENGTHS, context=st.integers(2, 16), cut=st.integers(0, 400))
def test_each_target_within_a_document_is_in_one_window(lengths: list[int], context: int, cut: int) -> None:
    windows = PackedWindows(numbered(lengths, cut), context, PADDING)
    inputs, targets = windows.read(np.arange(len(windows)))
    assert inputs.shape == targets.shape == (len(windows), context)
    counted = targets != IGNORED_TARGET
    assert (targets[counted] == inputs[counted] + 1).all()
    starts = set(starts_of(lengths).astype(int).tolist())
    assert sorted(targets[counted].tolist()) == [token for token in range(sum(lengths)) if token not in starts]
    assert not counted[inputs == PADDING].any()


@settings(deadline=None)
@given(lengths=LENGTHS, context=st.integers(2, 16))
def test_the_inputs_alone_show_which_document_a_token_is_of(lengths: list[int], context: int) -> None:
    tokens = np.ones(sum(lengths), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = 0
    windows = PackedWindows(TokenStream((tokens,), (starts_of(lengths),)), context, 0)
    inputs, _ = windows.read(np.arange(len(windows)))
    found = documents_of(inputs, 0)
    for row, segments in zip(found.tolist(), windows_of(windows.plan), strict=True):
        sizes = [b - a for a, b in segments]
        padding = context - sum(sizes)  # each token of padding sees itself alone
        expected = [number for number, size in enumerate([*sizes, *[1] * padding]) for _ in range(size)]
        assert row == expected


def test_blocks_of_documents_are_planned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 3, 9, 2, 6, 4, 1, 7, 2, 5]
    in_one = plan_windows(starts_of(lengths), sum(lengths), 8)
    monkeypatch.setattr(packing, "_BLOCK_DOCUMENTS", 4)
    in_blocks = plan_windows(starts_of(lengths), sum(lengths), 8)
    assert in_blocks.windows == sum(naive_best_fit(lengths[at : at + 4], 8) for at in (0, 4, 8))
    segments = [sorted(zip(plan.starts.tolist(), plan.stops.tolist(), strict=True)) for plan in (in_one, in_blocks)]
    assert segments[0] == segments[1]


def test_windows_of_many_documents_are_almost_full() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(5.5, 1.2, 30_000)).astype(int).tolist()
    plan = plan_windows(starts_of(lengths), sum(lengths), 1024)
    assert plan.padding_share < 0.001


def test_the_share_of_padding_is_reported() -> None:
    windows = [PackedWindows(numbered([3, 3]), 4, PADDING), PackedWindows(numbered([4, 4]), 4, PADDING)]
    assert describe(windows) == "4 windows of whole documents, 12.5% padding"


def test_a_batch_is_the_same_however_many_share_it() -> None:
    windows = [PackedWindows(numbered([5, 9, 2, 7, 3, 8] * 20), 8, PADDING)]
    whole = TrainingBatches(windows, 4, 0)[7]
    parts = [TrainingBatches(windows, 4, 0, share=(rank, 2))[7] for rank in range(2)]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_a_corpus_shorter_than_one_batch_is_named(tmp_path: object) -> None:
    data = TokenData(tmp_path, numbered([4] * 7), numbered([4]), 8)  # type: ignore[arg-type]
    sources = Sources((Source("", 1.0, data),))
    assert len(sources.windows(8, 4, "'small.txt'", PADDING)[0]) == 4
    with pytest.raises(DataError, match=r"'small\.txt' has 28 tokens to train on, fewer than one batch of 5 x 8"):
        sources.windows(8, 5, "'small.txt'", PADDING)


def test_a_stream_without_tokens_has_no_windows() -> None:
    assert plan_windows(np.empty(0, dtype=np.uint64), 0, 8).windows == 0
    assert plan_windows(np.zeros(1, dtype=np.uint64), 1, 8).windows == 0
