"""A model from its configuration, whichever of the two it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onym.gpt.causal_lm import CausalLM
from onym.gpt.config import GPTConfig, ModelConfig
from onym.gpt.decoder import Decoder
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.gpt2 import GPT
from onym.gpt.kinds import Arch

_CONFIGS: dict[str, type[ModelConfig]] = {"gpt": GPTConfig, "decoder": DecoderConfig}
"""By the architecture that their files name."""


def class_of(config: ModelConfig) -> type[CausalLM]:
    """The class whose shape a configuration is."""
    return Decoder if isinstance(config, DecoderConfig) else GPT


def make_model(config: ModelConfig) -> CausalLM:
    """A model with first weights."""
    return class_of(config)(config)


def without_values(config: ModelConfig) -> CausalLM:
    """A model on the meta device."""
    return class_of(config).without_values(config)


def read_config(architecture: str | None, values: Mapping[str, Any]) -> ModelConfig | None:
    """A stored configuration; None of an architecture that is neither of the two."""
    known = _CONFIGS.get(architecture or "")
    return known.from_dict(values) if known is not None else None


def arch_named(config: ModelConfig) -> Arch:
    """The kind of model, as ``--arch`` names it."""
    if isinstance(config, DecoderConfig):
        return "qwen3" if config.qk_norm else "llama"
    return "gpt2"
