"""Llama and Qwen3, from token ids to logits.

A decoder-only transformer of today's shape: rotary positions, RMSNorm before each part, a gated feed-forward (SwiGLU), keys and
values shared by groups of heads (GQA), and in Qwen3 a norm of each query and key. Without ``qk_norm`` it computes what
transformers' ``LlamaForCausalLM`` does (with ``qkv_bias``, ``Qwen2ForCausalLM``), with it ``Qwen3ForCausalLM``. Module names
are those of ``Llama3Model`` and ``Qwen3Model`` in "Build a Large Language Model From Scratch":

    tok_emb trf_blocks.N.{norm1, att.{W_query, W_key, W_value, q_norm, k_norm, out_proj}, norm2, ff.{fc1, fc2, fc3}}
    final_norm out_head

What it shares with the other model is in :mod:`onym.gpt.causal_lm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onym.gpt.attention import Cache, attend
from onym.gpt.causal_lm import CausalLM, new_head
from onym.gpt.decoder_config import DecoderConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which queries and keys are turned, each [time, head_dim] or [batch, 1, time, head_dim]."""


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation, in fp32 whatever the dtypes of input and weight."""

    def forward(self, x: Tensor) -> Tensor:  # [..., width] -> the same
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key and a value head."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, groups = config.n_heads * config.head_dim, config.n_kv_groups * config.head_dim
        self.W_query = nn.Linear(config.emb_dim, queries, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, groups, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, groups, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.out_proj = nn.Linear(queries, config.emb_dim, bias=False)

    def forward(  # [batch, time, emb] -> the same
        self, x: Tensor, cache: Cache | None, documents: Tensor | None, rotation: Rotation
    ) -> Tensor:
        # three of [batch, time, heads or groups, head_dim]
        q, k, v = (product(x).unflatten(-1, (-1, self.head_dim)) for product in (self.W_query, self.W_key, self.W_value))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotated(each.transpose(1, 2), rotation) for each in (q, k))  # [batch, heads or groups, time, head_dim]
        return self.out_proj(attend(q, k, v.transpose(1, 2), self.layer, cache, documents))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: one linear layer gates another, a third brings the result back."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)  # the gate
        self.fc2 = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)  # up
        self.fc3 = nn.Linear(config.hidden_dim, config.emb_dim, bias=False)  # down

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> the same
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.emb_dim, eps=config.norm_eps)
        self.att = Attention(config, layer)
        self.norm2 = RMSNorm(config.emb_dim, eps=config.norm_eps)
        self.ff = FeedForward(config)

    def forward(  # [batch, time, emb] -> the same
        self, x: Tensor, cache: Cache | None, documents: Tensor | None, rotation: Rotation
    ) -> Tensor:
        x = x + self.att(self.norm1(x), cache, documents, rotation)
        return x + self.ff(self.norm2(x))  # type: ignore[no-any-return]


class Decoder(CausalLM):
    """A Llama, or with ``qk_norm`` a Qwen3.

    Args:
        config: its shape; see :class:`DecoderConfig`.

    >>> model = Decoder(DecoderConfig.preset("nano", vocab_size=100))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 100])
    """

    config: DecoderConfig
    residual_outputs = ("att.out_proj", "ff.fc3")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.trf_blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.emb_dim, eps=config.norm_eps)
        self.out_head = new_head(config)
        self._complete()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [batch, time] -> [batch, time, emb]; positions are an input of each block."""
        return self.tok_emb(tokens)  # type: ignore[no-any-return]

    def per_position(self, positions: Tensor) -> tuple[Rotation]:
        """The rotation of the positions [time] or [batch, time]."""
        return (rotation_of(self.config, positions),)


def rotation_of(config: DecoderConfig, positions: Tensor) -> Rotation:
    """How queries and keys are turned at some positions: by halves, as Llama's and Qwen's weights in transformers have it.

    Args:
        positions: [time] or [batch, time] int64.

    Returns:
        Cosines and sines in fp32, each [time, head_dim] or [batch, 1, time, head_dim].
    """
    frequencies = rope_frequencies(config, positions.device)
    if config.rope_freq is not None:
        frequencies = stretched(frequencies, config.rope_freq)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def rope_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Radians a position, of each pair of dimensions, not scaled: [head_dim / 2] fp32."""
    even = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    return 1.0 / (config.rope_base ** (even / config.head_dim))


def stretched(frequencies: Tensor, scaling: Mapping[str, float]) -> Tensor:
    """Llama 3.1's scaling to a longer context: slow frequencies are divided, fast ones are not, those between are mixed."""
    original = scaling["original_context_length"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    share = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # of the frequency as it is
    return (1 - share) * frequencies / scaling["factor"] + share * frequencies


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of dimensions i and i + head_dim / 2; [batch, heads, time, head_dim] -> the same."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
