"""The architecture of a GPT-2 as a value: frozen, checked when made, JSON both ways.

The first field names are those of the configuration dict in "Build a Large Language Model From Scratch", so
``GPTConfig(**GPT_CONFIG_124M)`` reads it as it is. A file ``config.json`` beside the weights holds exactly these fields.
:class:`ModelConfig` is what a GPT-2's has in common with a :class:`~onym.gpt.decoder_config.DecoderConfig`.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from onym.errors import ConfigError, nearest

# Keys of the book's bonus chapters, each of which asks for another attention or feed-forward than either model has.
OTHER_ARCHITECTURES = {
    "latent_dim": "multi-head latent attention",
    "sliding_window_size": "sliding-window attention",
    "sliding_window_stride": "sliding-window attention",
    "num_experts": "a mixture of experts",
    "num_experts_per_tok": "a mixture of experts",
}


@dataclass(frozen=True)
class ModelConfig(ABC):
    """What the configurations of both models have: fields as a dict and as JSON, named shapes, checks.

    Raises:
        ConfigError: a value is out of range, or two of them do not fit together.
    """

    called: ClassVar[str]
    """What an error calls such a model: "A GPT-2"."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """The named shapes."""
    others: ClassVar[Mapping[str, str]]
    """Keys that ask for something that it does not have, in words."""
    ignored: ClassVar[frozenset[str]]
    """Keys that steer how the book's scripts run, not what the model is."""

    vocab_size: int = 50257
    """Number of tokens the tokenizer knows. The head is padded to a multiple of 64 while it computes, never in a file."""
    context_length: int = 1024
    """Most tokens the model sees at once."""
    emb_dim: int = 768
    """Width of the residual stream."""
    n_heads: int = 12
    """Attention heads in each block."""
    n_layers: int = 12
    """Number of transformer blocks."""
    labels: tuple[str, ...] = ()
    """What a classifier tells apart: its head has a row for each, and no token is predicted. None of a language model."""
    head_bias: bool = False
    """Give the head of a classifier a bias, as the book's has."""

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """One of the named shapes, with any field replaced.

        Raises:
            ConfigError: there is no such preset, or no such field.

        >>> GPTConfig.preset("gpt2-small", context_length=256).n_layers
        12
        """
        if name not in cls.presets:
            known = ", ".join(cls.presets)
            raise ConfigError(f"{cls.called} has no preset {name!r}{nearest(name, cls.presets)}; there are {known}.")
        return cls.from_dict({**cls.presets[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a plain dict: ours, or one of the book's, as ``GPT_CONFIG_124M``.

        Raises:
            ConfigError: a key is unknown, or stands for another architecture.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key in known or key in cls.ignored:
                continue
            if key in cls.others:
                raise ConfigError(
                    f"{key}={value!r} asks for {cls.others[key]}, which {cls.called[0].lower()}{cls.called[1:]} does not have."
                )
            raise ConfigError(f"{cls.called} has no setting {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}.")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, a classifier's where it is one; ``from_dict`` of them is equal."""
        values = dataclasses.asdict(self)
        labels, head_bias = values.pop("labels"), values.pop("head_bias")
        return {**values, "labels": list(labels), "head_bias": head_bias} if labels else values

    def to_json(self) -> str:
        """The text of a ``config.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError(f"A model configuration is a JSON object, not {type(values).__name__}.")
        return cls.from_dict(values)

    @property
    def head_rows(self) -> int:
        """Outputs of the head: one a token, or one a label."""
        return len(self.labels) or self.vocab_size

    @property
    @abstractmethod
    def multiplied_weights(self) -> int:
        """Weights of the matrices that each token is multiplied with; the embeddings are looked up, the head counts, tied or
        not."""

    @property
    @abstractmethod
    def attention_width(self) -> int:
        """Width of all heads of a block together."""

    def _require_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")

    def _check_labels(self) -> None:
        labels = tuple(self.labels)
        object.__setattr__(self, "labels", labels)  # JSON has lists
        if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels) or len(labels) == 1:
            raise ConfigError(f"labels must be two different names or more, not {list(labels)!r}.")
        if labels and getattr(self, "tie_embeddings", False):
            raise ConfigError("The head of a classifier is not the token embedding: set tie_embeddings to false.")
        if self.head_bias and not labels:
            raise ConfigError("head_bias is of classifiers, and no labels were given: leave it out.")

    def _require_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}.")


def closest_divisor(number: int, wanted: int) -> int:
    """Of the divisors of a number, the one next to another number."""
    fitting = [each for each in range(1, min(number, 100_000) + 1) if number % each == 0]
    return min(fitting, key=lambda each: abs(each - wanted))


# The GPT-2 sizes as OpenAI released them (qkv bias, tied head), and three that a laptop trains.
_GPT2 = {"vocab_size": 50257, "context_length": 1024, "qkv_bias": True, "tie_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4},
    "micro": {"context_length": 128, "emb_dim": 256, "n_heads": 4, "n_layers": 4},
    "mini": {"context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6},
    "gpt2-small": {**_GPT2, "emb_dim": 768, "n_heads": 12, "n_layers": 12},
    "gpt2-medium": {**_GPT2, "emb_dim": 1024, "n_heads": 16, "n_layers": 24},
    "gpt2-large": {**_GPT2, "emb_dim": 1280, "n_heads": 20, "n_layers": 36},
    "gpt2-xl": {**_GPT2, "emb_dim": 1600, "n_heads": 25, "n_layers": 48},
}


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """The shape of a :class:`onym.GPT`.

    Raises:
        ConfigError: a value is out of range, or two of them do not fit together.

    >>> GPTConfig(vocab_size=50257, emb_dim=768, n_heads=12, n_layers=12).head_dim
    64
    """

    called = "A GPT-2"
    presets = PRESETS
    others = OTHER_ARCHITECTURES | {
        "n_kv_groups": "grouped-query attention",
        "rope_base": "rotary position embeddings",
        "rope_freq": "rotary position embeddings",
        "qk_norm": "query-key normalisation",
        "hidden_dim": "a gated feed-forward",
        "head_dim": "heads of their own width",
        "norm_eps": "RMSNorm",
    }
    ignored = frozenset({"kv_window_size"})

    drop_rate: float = 0.0
    """Dropout probability while training. 0 for pre-training on much text; 0.1 and more for small corpora."""
    qkv_bias: bool = False
    """Give the query, key and value projections a bias, as OpenAI's GPT-2 has."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head too, as OpenAI's GPT-2 does."""
    bias: bool = True
    """Give the norms and the other linear layers a bias. nanoGPT's models may have none."""
    gelu: str = "tanh"
    """Which form of GELU: "tanh", the approximation that GPT-2 was trained with, or "erf", the exact one, as in nanoGPT."""

    def __post_init__(self) -> None:
        self._require_counts("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        self._require_flags("qkv_bias", "tie_embeddings", "bias", "head_bias")
        self._check_labels()
        if self.gelu not in ("tanh", "erf"):
            raise ConfigError(f"gelu must be tanh or erf, not {self.gelu!r}.")
        if isinstance(self.drop_rate, bool) or not isinstance(self.drop_rate, int | float):
            raise ConfigError(f"drop_rate must be a number, not {self.drop_rate!r}.")
        if not 0 <= self.drop_rate < 1:
            raise ConfigError(f"drop_rate must be at least 0 and below 1, not {self.drop_rate}.")
        if self.emb_dim % self.n_heads:
            raise ConfigError(
                f"emb_dim={self.emb_dim} cannot be split over n_heads={self.n_heads} heads of equal width: take "
                f"n_heads={closest_divisor(self.emb_dim, self.n_heads)}, or "
                f"emb_dim={-(-self.emb_dim // self.n_heads) * self.n_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.emb_dim // self.n_heads

    @property
    def n_kv_groups(self) -> int:
        """Heads of keys and of values: each head has its own."""
        return self.n_heads

    @property
    def attention_width(self) -> int:
        """Width of all heads of a block together."""
        return self.emb_dim

    @property
    def multiplied_weights(self) -> int:
        """Weights of the matrices that each token is multiplied with."""
        return 12 * self.n_layers * self.emb_dim**2 + self.head_rows * self.emb_dim
