"""Text out: the cache changes nothing, sliding has no end, sampling does what it says."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from onym import GPT, GPTConfig
from onym.errors import ConfigError
from onym.generation.engine import generate
from onym.generation.sampling import Sampling, choose
from tests.conftest import TINY

GREEDY = Sampling(temperature=0)


@pytest.fixture
def sharp() -> GPT:
    """A model whose logits are far apart, so that rounding cannot change which is largest."""
    model = GPT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() == 2 else 1.0)
    return model


def uncached_greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The book's loop: crop to the context, forward everything, take the likeliest."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-model.config.context_length :]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 31])
def test_greedy_tokens_are_those_without_a_cache(sharp: GPT, length: int) -> None:
    prompt = torch.randint(0, TINY.vocab_size, (length,)).tolist()
    count = TINY.context_length - length + 1
    assert list(generate(sharp, prompt, count, GREEDY)) == uncached_greedy(sharp, prompt, count)


@pytest.mark.parametrize("length", [1, 32, 50])
def test_sliding_by_one_is_cropping_at_each_step(sharp: GPT, length: int) -> None:
    prompt = torch.randint(0, TINY.vocab_size, (length,)).tolist()
    assert list(generate(sharp, prompt, 80, GREEDY, slide=1)) == uncached_greedy(sharp, prompt, 80)


@pytest.mark.parametrize("slide", [None, 1, 7, 32])
def test_generation_goes_on_past_the_context(tiny: GPT, slide: int | None) -> None:
    written = list(generate(tiny, [1, 2, 3], 200, seed=0, slide=slide))
    assert len(written) == 200
    assert all(0 <= token < TINY.vocab_size for token in written)


def test_a_seed_gives_the_same_text_and_none_another(tiny: GPT) -> None:
    def write(seed: int | None) -> list[int]:
        return list(generate(tiny, [1], 30, seed=seed))

    assert write(5) == write(5)
    assert write(5) != write(6)
    assert write(None) != write(None)


def test_generation_leaves_the_global_generator_alone(tiny: GPT) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(generate(tiny, [1], 5, seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_it_stops_before_the_end_of_text(sharp: GPT) -> None:
    endless = list(generate(sharp, [1], 40, GREEDY))
    end = endless[10]
    assert list(generate(sharp, [1], 40, GREEDY, end_of_text=end)) == endless[: endless.index(end)]


def test_tokens_come_one_by_one(tiny: GPT) -> None:
    assert len(list(itertools.islice(generate(tiny, [1], 10**9), 3))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [101]}, "token 101, the model knows 101"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"slide": 33}, "slide must be from 1 to the context length 32"),
        ({"sampling": Sampling(temperature=-1)}, "--temperature"),
        ({"sampling": Sampling(top_k=-1)}, "--top-k"),
        ({"sampling": Sampling(top_p=0)}, "--top-p"),
        ({"sampling": Sampling(temperature=float("nan"))}, "--temperature"),
        ({"seed": 10**23}, "--seed must be from 0"),
    ],
)
def test_what_cannot_work_is_refused(tiny: GPT, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tiny, **{"prompt": [1], "max_new_tokens": 3, **arguments})  # type: ignore[arg-type]


def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """How often each of four tokens with probabilities 0.4, 0.3, 0.2, 0.1 is chosen."""
    logits, uniform = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), random.Random(0)
    chosen = torch.stack([choose(logits, sampling, uniform.random()) for _ in range(count)])
    return torch.bincount(chosen, minlength=4) / count


def test_sampling_follows_the_probabilities() -> None:
    torch.testing.assert_close(draws(Sampling(1.0)), torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(Sampling(0.5)), torch.tensor([16, 9, 4, 1]) / 30, atol=0.03, rtol=0)
    for nearly_nothing in (0, 1e-40, 1e-5):
        assert draws(Sampling(nearly_nothing)).tolist() == [1, 0, 0, 0]


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    torch.testing.assert_close(draws(Sampling(1.0, top_k=2)), torch.tensor([4, 3, 0, 0]) / 7, atol=0.03, rtol=0)
    torch.testing.assert_close(draws(Sampling(1.0, top_p=0.75)), torch.tensor([4, 3, 2, 0]) / 9, atol=0.03, rtol=0)
    assert draws(Sampling(1.0, top_p=0.01)).tolist() == [1, 0, 0, 0]


def test_a_compiled_model_generates_the_same(sharp: GPT) -> None:
    expected = list(generate(sharp, [1, 2], 20, GREEDY))
    sharp.compile()
    assert list(generate(sharp, [1, 2], 20, GREEDY)) == expected


def test_a_model_with_a_context_of_one(tiny: GPT) -> None:
    model = GPT(GPTConfig(vocab_size=7, context_length=1, emb_dim=8, n_heads=2, n_layers=1)).eval()
    assert len(list(generate(model, [1, 2, 3], 5))) == 5
