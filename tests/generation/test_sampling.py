"""From logits to a token: the distribution is the one that the settings describe."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onym.generation import sampling
from onym.generation.sampling import Sampling, choose, penalised


def by_definition(logits: Tensor, how: Sampling) -> Tensor:
    """Probabilities [vocab], with a sort of everything."""
    probabilities = (logits.double() / how.temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    if how.top_k:
        ordered[how.top_k :] = 0
    before = ordered.cumsum(-1) - ordered
    if how.top_p < 1:
        ordered[before >= how.top_p * ordered.sum()] = 0
    ordered[ordered < how.min_p * ordered[0]] = 0
    result = torch.zeros_like(probabilities)
    result[order] = ordered / ordered.sum()
    return result


SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)


@given(SETTINGS, st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_what_can_be_drawn_and_how_likely(how: Sampling, size: int, seed: int, small_prefixes: bool) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    with pytest.MonkeyPatch.context() as patch:
        if small_prefixes:
            patch.setattr(sampling, "_PREFIXES", (2, 5))
        tokens, weights = sampling._candidates(logits, logits.max(), how)
    found = torch.zeros(size, dtype=torch.float64)
    found[torch.arange(size) if tokens is None else tokens] = weights.double() / weights.sum()
    # A token at the very edge of a nucleus may fall on either side.
    expected = by_definition(logits, how)
    edge = ((found > 0) != (expected > 0)).sum()
    assert edge <= 1
    if not edge:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=6), Sampling(1.0, min_p=0.1)], ids=str
)
def test_draws_are_of_that_distribution(how: Sampling) -> None:
    """Chi-square of 50,000 draws with a fixed seed; below what one of a million true samplers exceeds."""
    logits, draws, count = torch.linspace(-1.5, 1.5, 12)[torch.randperm(12)], random.Random(5), 50_000
    seen = Counter(int(choose(logits, how, draws.random())) for _ in range(count))
    expected = by_definition(logits, how) * count
    assert set(seen) == set(expected.nonzero()[:, 0].tolist())
    chi_square = sum((seen[token] - float(expected[token])) ** 2 / float(expected[token]) for token in seen)
    assert chi_square < {12: 53.0}.get(len(seen), 50.0)


def test_neither_end_of_a_draw_takes_what_cannot_be_drawn() -> None:
    logits = torch.tensor([-1000.0, 0.0, -1000.0, 1.0, -1000.0])
    for how in (Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.99), Sampling(1.0, min_p=0.01)):
        assert {int(choose(logits, how, uniform)) for uniform in (0.0, 1e-300, 0.5, 1 - 2**-53)} == {1, 3}


@pytest.mark.parametrize("size", [1, 50_257, 131_072, 262_144])
def test_sums_over_any_vocabulary_fit(size: int) -> None:
    """Nearly equal logits, whose weights' sum is the largest."""
    logits, draws = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02, random.Random(3)
    for how in (Sampling(0.8), Sampling(100.0, top_p=0.999)):
        drawn = [int(choose(logits, how, draws.random())) for _ in range(100)]
        assert len(set(drawn)) >= min(size, 99)
        assert size == 1 or abs(sum(drawn) / len(drawn) / size - 0.5) < 0.1 or how.top_p < 1


def test_penalties_of_any_size_leave_numbers() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    for how in (Sampling(repetition_penalty=1e-42), Sampling(presence_penalty=-1e39), Sampling(frequency_penalty=1e39)):
        changed = penalised(logits, how, prompt=[0, 1], written={0: 1, 2: 2}, bias={1: float("-inf")})
        assert not changed.isnan().any()
        assert not changed.isposinf().any()


def test_penalties_and_biases() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.5])
    how = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    changed = penalised(logits, how, prompt=[0, 0, 1], written={2: 3}, bias={4: -100.0})
    # The prompt counts for repetition alone; what was written for all three.
    assert changed.tolist() == [1.0, -4.0, 0.5 - 0.25 - 1.5, 1.0, -99.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 1.0, 0.5]
    assert penalised(logits, Sampling(), [0], {2: 1}, {}) is logits
