"""``onym.generate``: text as it comes, from a model or a path."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

import onym
from onym import GPT
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError, OnymError, TokenizerError
from onym.generation.engine import Engine, Request
from onym.generation.sampling import Sampling
from onym.generation.write import prompt_ids, write
from tests.conftest import TINY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the lamp was lit and the cat sat on the mat " * 9], 290)


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    config = onym.GPTConfig(**{**TINY.to_dict(), "vocab_size": tokenizer.vocab_size})
    return GPT(config).eval()


def test_from_a_model_and_from_a_path(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    onym.save(model, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    settings = {"max_new_tokens": 20, "seed": 4, "stop_ids": ()}
    tokens = list(onym.generate(model, "the lamp", tokenizer=tokenizer, **settings))
    assert [token.finish for token in tokens] == [None] * 19 + ["length"]
    assert "".join(token.text for token in tokens) == tokenizer.decode(token.id for token in tokens if token.id is not None)
    assert all(token.logprob < 0 for token in tokens)
    assert list(onym.generate(tmp_path / "model.safetensors", "the lamp", **settings, tokenizer=tmp_path)) == tokens
    assert list(onym.generate(model, tokenizer.encode("the lamp"), tokenizer=tokenizer, **settings)) == tokens


def test_a_stop_string_ends_it_in_the_middle_of_others(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, slots=2, dtype="fp32", compile="off")
    requests = [Request(prompt_ids(tokenizer, "the"), 30, Sampling(1.0), seed=seed) for seed in range(3)]
    free = dict.fromkeys(range(3), "")
    for token in write(engine, tokenizer, requests):
        free[token.request] += token.text
    stop = free[1][5:8]
    stopped: dict[int, str] = dict.fromkeys(range(3), "")
    finishes = {}
    for token in write(engine, tokenizer, [dataclasses.replace(request, stop=[stop]) for request in requests]):
        stopped[token.request] += token.text
        finishes[token.request] = token.finish
    for place in range(3):
        assert stopped[place] == free[place].partition(stop)[0]
        assert finishes[place] == ("stop" if stop in free[place] else "length")
    assert not engine.busy


def test_leaving_early_frees_the_engine(model: GPT, tokenizer: Tokenizer) -> None:
    engine = Engine(model, dtype="fp32", compile="off")
    tokens = write(engine, tokenizer, [Request([1], 30), Request([2], 30)])
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert not engine.busy


def test_what_is_wrong_is_told_before_the_first_token(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="tokenizer="):
        onym.generate(model, "x")
    with pytest.raises(ConfigError, match="--top-p"):
        onym.generate(model, "x", top_p=0, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no tokens"):
        onym.generate(model, [], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="UTF-8"):
        onym.generate(model, "\ud800", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match="name the one that it was trained with"):
        onym.generate(GPT(TINY), "x", tokenizer=tokenizer)
    with pytest.raises(OnymError, match="There is nothing at"):
        onym.generate(tmp_path / "gone", "x")


def test_its_settings_are_those_of_sampling() -> None:
    arguments = inspect.signature(onym.generate).parameters
    for name, default in vars(Sampling()).items():
        assert arguments[name].default == default, name
