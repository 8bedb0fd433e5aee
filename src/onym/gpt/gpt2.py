"""GPT-2, from token ids to logits.

A decoder-only transformer as in "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): learned
positions, pre-norm blocks, GELU. Module and parameter names are those of the optimised ``GPTModel`` in "Build a Large
Language Model From Scratch", so a state dict saved by that code loads strictly, and one saved from here loads there:

    tok_emb pos_emb drop_emb trf_blocks.N.{norm1, att.{qkv, proj}, norm2, ff.layers.{0, 2}} final_norm out_head

What it shares with the other model is in :mod:`onym.gpt.causal_lm`.
"""

from __future__ import annotations

from torch import Tensor, nn

from onym.gpt.attention import Cache, attend
from onym.gpt.causal_lm import CausalLM, new_head
from onym.gpt.config import GPTConfig


class Attention(nn.Module):
    """Causal multi-head self-attention; q, k and v from one matrix product."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.emb_dim, config.emb_dim, bias=config.bias)

    def forward(  # [batch, time, emb] -> the same
        self, x: Tensor, cache: Cache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        batch, time, emb = x.shape
        # [batch, time, 3 * emb] -> three of [batch, heads, time, head_dim]
        q, k, v = self.qkv(x).view(batch, time, 3, self.n_heads, emb // self.n_heads).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.drop_rate if self.training else 0.0
        return self.proj(attend(q, k, v, self.layer, cache, documents, dropout))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim, bias=config.bias),
            nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none"),
            nn.Linear(4 * config.emb_dim, config.emb_dim, bias=config.bias),
        )

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> the same
        return self.layers(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim, bias=config.bias)
        self.att = Attention(config, layer)
        self.norm2 = nn.LayerNorm(config.emb_dim, bias=config.bias)
        self.ff = FeedForward(config)
        self.drop_resid = nn.Dropout(config.drop_rate)

    def forward(  # [batch, time, emb] -> the same
        self, x: Tensor, cache: Cache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        x = x + self.drop_resid(self.att(self.norm1(x), cache, documents))
        return x + self.drop_resid(self.ff(self.norm2(x)))  # type: ignore[no-any-return]


class GPT(CausalLM):
    """A GPT-2.

    Args:
        config: its shape; see :class:`GPTConfig`.

    >>> import torch
    >>> model = GPT(GPTConfig.preset("nano", vocab_size=100))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 100])
    """

    config: GPTConfig
    residual_outputs = ("att.proj", "ff.layers.2")

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim, bias=config.bias)
        self.out_head = new_head(config)
        self._complete()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [batch, time] at positions [time] or [batch, time] -> [batch, time, emb]."""
        return self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))  # type: ignore[no-any-return]
