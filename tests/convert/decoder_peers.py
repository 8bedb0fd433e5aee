"""Llamas and Qwens of other people, made with their own packages, small, with random weights; torchtitan's from its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import onym
from onym.gpt.decoder_config import DecoderConfig

SIZES = {"vocab_size": 97, "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 48}
STRETCHED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 16}
KINDS = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def shapes(
    heads: list[tuple[int, int]], free_heads: bool, free_width: bool, eps: list[float], scaled: bool = True, **fields: Any
) -> st.SearchStrategy[DecoderConfig]:
    """Configurations of decoders.

    Args:
        heads: pairs of ``n_heads`` and ``n_kv_groups``.
        free_heads: whether the heads need not be as wide together as the model.
        free_width: whether the width need not be a multiple of the number of heads.
        eps: of norms.
        scaled: whether rotary positions may be scaled.
    """

    def build(pair: tuple[int, int], size: int, width: int, layers: int, **rest: Any) -> DecoderConfig:
        emb_dim = pair[0] * (width if free_heads else size) + (1 if free_width else 0)
        return DecoderConfig(
            emb_dim=emb_dim, n_heads=pair[0], n_kv_groups=pair[1], head_dim=size, n_layers=layers, **fields, **rest
        )

    return st.builds(
        build,
        st.sampled_from(heads),
        st.sampled_from([2, 6, 16]),
        st.sampled_from([3, 8]),
        st.integers(1, 2),
        vocab_size=st.integers(2, 99),
        context_length=st.integers(2, 30),
        hidden_dim=st.integers(1, 40),
        rope_base=st.sampled_from([10_000.0, 500_000.0]),
        rope_freq=st.sampled_from([None, STRETCHED] if scaled else [None]),
        norm_eps=st.sampled_from(eps),
        tie_embeddings=st.booleans(),
    )


PAIRS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3)]
EPS = [1e-5, 1e-6]
OF_KIND = {
    "llama": shapes(PAIRS, True, False, EPS),
    "mistral": shapes(PAIRS, True, True, EPS),
    "qwen2": shapes(PAIRS, False, False, EPS, qkv_bias=True),
    "qwen3": shapes(PAIRS, True, True, EPS, qk_norm=True),
}
"""What each class of transformers can be."""


def config_of(kind: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**SIZES, **KINDS[kind], "norm_eps": 1e-6, **changes})


def edited(path: Path, **changes: Any) -> Path:
    """Change ``config.json``; a value of ... is taken out."""
    values = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return path


def ids(config: DecoderConfig) -> Tensor:
    """Two rows of tokens, as long as the context."""
    size = (2, config.context_length)
    return torch.randint(0, config.vocab_size, size, generator=torch.Generator().manual_seed(3))


def drawn(model: Any) -> Any:
    """With values everywhere that give logits of about 1, whatever the class draws itself."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + is_norm)
    return model.eval()


def ours(config: DecoderConfig) -> onym.Decoder:
    model: onym.Decoder = drawn(onym.Decoder(config))
    return model


def apart(one: nn.Module, other: nn.Module, config: DecoderConfig) -> float:
    """How far the logits of two models are from each other."""
    tokens = ids(config)
    with torch.no_grad():
        first, second = (getattr(out, "logits", out) for out in (one(tokens), other(tokens)))
    return float((first - second).abs().max())


def transformers_model(kind: str, config: DecoderConfig) -> nn.Module:
    """A model of one of transformers' four classes; the configuration is given as its own code takes it."""
    import transformers

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_freq is not None:
        rope |= {"rope_type": "llama3", **config.rope_freq}
        rope["original_max_position_embeddings"] = int(rope.pop("original_context_length"))
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size, hidden_size=config.emb_dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_groups,
        max_position_embeddings=config.context_length, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope, bos_token_id=0, eos_token_id=0, **({} if kind == "qwen2" else {"head_dim": config.head_dim}),
        **({"sliding_window": None} if kind == "mistral" else {}),
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(settings)
    return drawn(model)  # type: ignore[no-any-return]


def book_model(name: str, config: DecoderConfig) -> nn.Module:
    """``Llama3Model`` or ``Qwen3Model`` of the book's package."""
    from llms_from_scratch.llama3 import Llama3Model
    from llms_from_scratch.qwen3 import Qwen3Model

    built: nn.Module = {"Llama3Model": Llama3Model, "Qwen3Model": Qwen3Model}[name](
        {**config.to_dict(), "dtype": torch.float32}
    )
    if config.tie_embeddings:
        built.out_head.weight = built.tok_emb.weight  # type: ignore[union-attr]
    return drawn(built)  # type: ignore[no-any-return]


class Titan(nn.Module):
    """A Llama with torchtitan's names and rotation: neighbouring dimensions, as complex numbers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, groups = config.emb_dim, config.n_kv_groups * config.head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        def layer() -> nn.ModuleDict:
            attention = {"wq": linear(width, config.attention_width), "wk": linear(width, groups), "wv": linear(width, groups)}
            feed_forward = {"w1": linear(width, config.hidden_dim), "w3": linear(width, config.hidden_dim)}
            return nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({**attention, "wo": linear(config.attention_width, width)}),
                    "feed_forward": nn.ModuleDict({**feed_forward, "w2": linear(config.hidden_dim, width)}),
                    "attention_norm": nn.RMSNorm(width, eps=config.norm_eps),
                    "ffn_norm": nn.RMSNorm(width, eps=config.norm_eps),
                }
            )

        self.tok_embeddings = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleDict({str(number): layer() for number in range(config.n_layers)})
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.output = linear(width, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.config.head_dim
        frequencies = 1.0 / (self.config.rope_base ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [time, 1, head_dim / 2]

        def turned(x: Tensor) -> Tensor:  # [batch, time, heads, head_dim]
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            attention, feed_forward = layer["attention"], layer["feed_forward"]
            y = layer["attention_norm"](x)
            q, k, v = (attention[name](y).unflatten(-1, (-1, size)) for name in ("wq", "wk", "wv"))
            q, k, v = (each.transpose(1, 2) for each in (turned(q), turned(k), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + attention["wo"](y.transpose(1, 2).flatten(2))
            y = layer["ffn_norm"](x)
            x = x + feed_forward["w2"](F.silu(feed_forward["w1"](y)) * feed_forward["w3"](y))
        return self.output(self.norm(x))
