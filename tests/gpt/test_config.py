"""The configuration: what it accepts, what it refuses, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym import GPTConfig
from onym.errors import ConfigError
from onym.gpt.config import PRESETS

# As it stands in the book, chapter 4.
GPT_CONFIG_124M = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}

configs = st.builds(
    lambda heads, head_dim, **rest: GPTConfig(n_heads=heads, emb_dim=heads * head_dim, **rest),
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 64),
    vocab_size=st.integers(1, 60_000),
    context_length=st.integers(1, 2048),
    n_layers=st.integers(1, 48),
    drop_rate=st.floats(0, 0.99),
    qkv_bias=st.booleans(),
    tie_embeddings=st.booleans(),
)


def test_the_books_dict_is_read_as_it_is() -> None:
    config = GPTConfig(**GPT_CONFIG_124M)  # type: ignore[arg-type]
    assert config == GPTConfig.from_dict(GPT_CONFIG_124M)
    assert (config.emb_dim, config.drop_rate, config.tie_embeddings) == (768, 0.1, False)


@given(configs)
def test_a_configuration_survives_json(config: GPTConfig) -> None:
    assert GPTConfig.from_json(config.to_json()) == config
    assert GPTConfig(**json.loads(config.to_json())) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    assert GPTConfig.preset(name, vocab_size=999).vocab_size == 999


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt2-small", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_the_gpt2_presets_have_gpt2s_number_of_parameters(name: str, parameters: int) -> None:
    import torch

    from onym import GPT

    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"emb_dim": 100, "n_heads": 12}, r"emb_dim=100 .* n_heads=12 .*take n_heads=10, or emb_dim=108"),
        ({"context_length": 0}, "context_length must be a whole number of at least 1, not 0"),
        ({"n_layers": -1}, "n_layers"),
        ({"vocab_size": 50257.0}, "vocab_size"),
        ({"n_heads": True}, "n_heads"),
        ({"emb_dim": "768"}, "emb_dim"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1"),
        ({"drop_rate": float("nan")}, "drop_rate"),
        ({"drop_rate": "0.1"}, "drop_rate must be a number"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**values)  # type: ignore[arg-type]


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'n_layer' \(did you mean 'n_layers'\?\)"):
        GPTConfig.from_dict({**GPT_CONFIG_124M, "n_layer": 12})
    with pytest.raises(ConfigError, match="grouped-query attention"):
        GPTConfig.from_dict({**GPT_CONFIG_124M, "n_kv_groups": 4})
    with pytest.raises(ConfigError, match=r"'gpt2-smal' \(did you mean 'gpt2-small'\?\)"):
        GPTConfig.preset("gpt2-smal")
