"""One GPT, written once for each way to compute it: what the rungs of ``onym tools ladder`` train.

The same function at every rung. What a rung makes faster is here in its plain form as well: q, k and v from three products, a
stored mask, norms and GELU from their formulas. With all techniques it is what :class:`onym.GPT` computes; a test compares the
two. Only the ladder uses it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onym.gpt.config import GPTConfig

TILE = 64  # rows that matrix units like the vocabulary to be a multiple of
_EPSILON = 1e-5


Technique = Literal["mask", "tf32", "fused", "pinned", "bf16", "norm", "attention", "compile", "padding", "batch", "onym"]
Techniques = Collection[Technique]


class FormulaNorm(nn.Module):
    """Layer normalisation by its formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # [..., width] -> the same
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + _EPSILON) * self.weight + self.bias


class FormulaGELU(nn.Module):
    """GPT-2's form of GELU, by its formula."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class PlainAttention(nn.Module):
    """Causal attention in its steps: three products, all weights, a mask, a softmax, a weighted sum."""

    mask: Tensor | None

    def __init__(self, config: GPTConfig, techniques: Techniques) -> None:
        super().__init__()
        width, context = config.emb_dim, config.context_length
        self.n_heads = config.n_heads
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        mask = None if "mask" in techniques else torch.ones(context, context).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> the same
        batch, time, width = x.shape
        # three of [batch, heads, time, head_dim]
        q, k, v = (
            product(x).view(batch, time, self.n_heads, -1).transpose(1, 2) for product in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.n_heads)  # [batch, heads, time, time]
        if self.mask is not None:
            hidden = self.mask.bool()[:time, :time]
        else:
            hidden = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, time, width)
        return self.proj(mixed)  # type: ignore[no-any-return]


class FusedAttention(nn.Module):
    """The same in two products and one operation, which never holds all weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> the same
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


class LadderBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, techniques: Techniques) -> None:
        super().__init__()
        width = config.emb_dim
        self.norm1, self.norm2 = _norm(width, techniques), _norm(width, techniques)
        self.att = FusedAttention(config) if "attention" in techniques else PlainAttention(config, techniques)
        gelu = nn.GELU(approximate="tanh") if "norm" in techniques else FormulaGELU()
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> the same
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))  # type: ignore[no-any-return]


class LadderModel(nn.Module):
    """The GPT of a rung.

    Args:
        config: its shape. The head is a matrix of its own and there is no dropout, whatever the configuration has.
        techniques: how it is computed; those that are not the model's have no effect. ``mask``: the causal mask is made in each
            forward pass, and no block stores one [context, context]. ``norm``: torch's LayerNorm and GELU, one operation each.
            ``attention``: ``scaled_dot_product_attention`` on q, k and v from one product. ``padding``: embedding and head with
            as many rows as make the vocabulary a multiple of 64, as the book does it.
    """

    def __init__(self, config: GPTConfig, techniques: Techniques) -> None:
        super().__init__()
        rows = config.vocab_size + (-config.vocab_size % TILE if "padding" in techniques else 0)
        self.tok_emb = nn.Embedding(rows, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.blocks = nn.ModuleList(LadderBlock(config, techniques) for _ in range(config.n_layers))
        self.final_norm = _norm(config.emb_dim, techniques)
        self.out_head = nn.Linear(config.emb_dim, rows, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, rows] of tokens [batch, time] int64; rows that pad the vocabulary included."""
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.out_head(self.final_norm(x))  # type: ignore[no-any-return]


def _norm(width: int, techniques: Techniques) -> nn.Module:
    return nn.LayerNorm(width, eps=_EPSILON) if "norm" in techniques else FormulaNorm(width)
