"""A model from its configuration, whichever of the two it is of."""

from __future__ import annotations

from onym.gpt.causal_lm import CausalLM
from onym.gpt.config import ModelConfig
from onym.gpt.decoder import Decoder
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.gpt2 import GPT


def class_of(config: ModelConfig) -> type[CausalLM]:
    """The class whose shape a configuration is."""
    return Decoder if isinstance(config, DecoderConfig) else GPT


def make_model(config: ModelConfig) -> CausalLM:
    """A model with first weights."""
    return class_of(config)(config)


def without_values(config: ModelConfig) -> CausalLM:
    """A model on the meta device."""
    return class_of(config).without_values(config)
