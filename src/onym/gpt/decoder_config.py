"""The architecture of a Llama or a Qwen3 as a value, with the keys of the book's configuration dicts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onym.errors import ConfigError
from onym.gpt.config import OTHER_ARCHITECTURES, ModelConfig, closest_divisor

_LARGEST = sys.float_info.max  # JSON has larger whole numbers, which no float can be
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")
# A gated feed-forward three times as wide as the model, and half as many heads of keys and values: twelve times the square of
# the width in a block, as GPT-2 has.
_OWN = ("nano", "micro", "mini", "small", "medium")
_SHAPES: dict[str, dict[str, Any]] = {
    "nano": {"context_length": 128, "emb_dim": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384},
    "micro": {"context_length": 128, "emb_dim": 256, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 768},
    "mini": {"context_length": 256, "emb_dim": 384, "n_heads": 6, "n_kv_groups": 3, "n_layers": 6, "hidden_dim": 1152},
    "small": {"emb_dim": 768, "n_heads": 12, "n_kv_groups": 6, "n_layers": 12, "hidden_dim": 2304, "tie_embeddings": True},
    "medium": {"emb_dim": 1024, "n_heads": 16, "n_kv_groups": 8, "n_layers": 24, "hidden_dim": 3072, "tie_embeddings": True},
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "context_length": 40_960,
        "emb_dim": 1024,
        "n_heads": 16,
        "n_kv_groups": 8,
        "n_layers": 28,
        "hidden_dim": 3072,
        "head_dim": 128,
        "qk_norm": True,
        "rope_base": 1_000_000.0,
        "tie_embeddings": True,
    },
    "llama3.2-1b": {
        "vocab_size": 128_256,
        "context_length": 131_072,
        "emb_dim": 2048,
        "n_heads": 32,
        "n_kv_groups": 8,
        "n_layers": 16,
        "hidden_dim": 8192,
        "rope_base": 500_000.0,
        "rope_freq": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192},
        "tie_embeddings": True,
    },
}


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The shape of a :class:`onym.Decoder`.

    A field that is None when it is made gets the value that is usual for the others.

    Raises:
        ConfigError: a value is out of range, or two of them do not fit together.

    >>> DecoderConfig(emb_dim=768, n_heads=12, n_kv_groups=4).head_dim
    64
    """

    called = "A decoder"
    presets = _SHAPES
    others = OTHER_ARCHITECTURES | {
        "drop_rate": "dropout",
        "bias": "biases in norms and feed-forward",
        "gelu": "GELU",
    }
    ignored = frozenset({"kv_window_size", "dtype"})

    hidden_dim: int = None  # type: ignore[assignment]  # resolved below
    """Width of the feed-forward between its layers; 8/3 of emb_dim, up to a multiple of 64, by default."""
    n_kv_groups: int = None  # type: ignore[assignment]  # resolved below
    """Heads of keys and of values, each shared by n_heads / n_kv_groups heads of queries; n_heads by default."""
    head_dim: int = None  # type: ignore[assignment]  # resolved below
    """Width of one head, an even number; emb_dim / n_heads by default."""
    qk_norm: bool = False
    """Normalise each query and key before it is rotated, as Qwen3 does."""
    qkv_bias: bool = False
    """Give the query, key and value projections a bias, as Qwen2 has."""
    rope_base: float = 10_000.0
    """Base of the wavelengths of rotary positions; larger for longer contexts."""
    rope_freq: Mapping[str, float] | None = None
    """Llama 3.1's scaling of these to a longer context: factor, low_freq_factor, high_freq_factor,
    original_context_length."""
    norm_eps: float = None  # type: ignore[assignment]  # resolved below
    """What is added to the mean square in norms; 1e-6 with qk_norm (Qwen3), else 1e-5 (Llama 3)."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head too."""

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DecoderConfig:
        """One of the named shapes, with any field replaced.

        Of those that are counterparts of GPT-2's, the feed-forward and the heads of keys and values follow another width or
        number of heads.

        Raises:
            ConfigError: there is no such preset, or no such field.

        >>> DecoderConfig.preset("nano", emb_dim=256, n_heads=8).hidden_dim
        768
        """
        if name in _OWN:
            width, heads = (overrides.get(key, _SHAPES[name][key]) for key in ("emb_dim", "n_heads"))
            follows = {"hidden_dim": 3 * width, "n_kv_groups": heads if heads % 2 else heads // 2}
            overrides = {key: value for key, value in follows.items() if value > 0} | overrides
        return super().preset(name, **overrides)

    def __post_init__(self) -> None:
        self._require_counts("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        self._require_flags("qk_norm", "qkv_bias", "tie_embeddings", "head_bias")
        self._check_labels()
        if self.head_dim is None and self.emb_dim % self.n_heads:
            raise ConfigError(
                f"emb_dim={self.emb_dim} cannot be split over n_heads={self.n_heads} heads of equal width: give head_dim, or "
                f"take n_heads={closest_divisor(self.emb_dim, self.n_heads)}."
            )
        usual: dict[str, Any] = {
            "hidden_dim": -(-8 * self.emb_dim // 192) * 64,
            "n_kv_groups": self.n_heads,
            "head_dim": self.emb_dim // self.n_heads,
            "norm_eps": 1e-6 if self.qk_norm else 1e-5,
        }
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._require_counts("hidden_dim", "n_kv_groups", "head_dim")
        heads, groups, width = self.n_heads, self.n_kv_groups, self.head_dim
        if heads % groups:
            raise ConfigError(
                f"n_heads={heads} cannot share n_kv_groups={groups} heads of keys and values equally: take "
                f"n_kv_groups={closest_divisor(heads, groups)}."
            )
        if width % 2:
            raise ConfigError(
                f"head_dim={width} is odd, and rotary positions turn pairs of dimensions: take an even one, as "
                f"head_dim={width + 1}, or other numbers for emb_dim and n_heads."
            )
        for name, least in (("rope_base", 1), ("norm_eps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= _LARGEST:
                raise ConfigError(f"{name} must be a number above {least}, not {value!r}.")
            object.__setattr__(self, name, float(value))
        if self.rope_freq is not None:
            object.__setattr__(self, "rope_freq", _scaling(self.rope_freq))

    @property
    def attention_width(self) -> int:
        """Width of all heads of a block together."""
        return self.n_heads * self.head_dim

    @property
    def multiplied_weights(self) -> int:
        """Weights of the matrices that each token is multiplied with."""
        attention = 2 * (self.n_heads + self.n_kv_groups) * self.head_dim * self.emb_dim
        return self.n_layers * (attention + 3 * self.hidden_dim * self.emb_dim) + self.head_rows * self.emb_dim


def _scaling(values: Any) -> dict[str, float]:
    """The four numbers of Llama 3.1's scaling.

    Raises:
        ConfigError: they are others, or do not fit together.
    """
    if not isinstance(values, Mapping) or set(values) != set(_SCALING):
        said = ", ".join(map(str, values)) if isinstance(values, Mapping) else repr(values)
        raise ConfigError(f"rope_freq is Llama 3.1's scaling, with {', '.join(_SCALING)}, not {said}.")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise ConfigError(f"{name} in rope_freq must be a number above 0, not {value!r}.")
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ConfigError("high_freq_factor in rope_freq must be above low_freq_factor.")
    return {name: float(values[name]) for name in _SCALING}
