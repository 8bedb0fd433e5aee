"""The GPT, from token ids to logits, readable top to bottom.

A decoder-only transformer as in "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): learned
positions, pre-norm blocks, GELU. Module and parameter names are those of the optimised ``GPTModel`` in "Build a Large
Language Model From Scratch", so a state dict saved by that code loads strictly, and one saved from here loads there:

    tok_emb pos_emb drop_emb trf_blocks.N.{norm1, att.{qkv, proj}, norm2, ff.layers.{0, 2}} final_norm out_head

This file knows nothing of training, files or devices: parameters stay in whatever dtype they were made (fp32 when
training), and the caller chooses the compute dtype with ``torch.autocast``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onym.gpt.config import GPTConfig
from onym.gpt.documents import causal_in_documents, flex_attend, kernel_for, positions_of
from onym.gpt.head_loss import IGNORED_TARGET, chunk_rows, head_loss
from onym.gpt.meta import no_values

# Matrix units work on tiles: on an A100 a head of 50304 rows instead of 50257 trains 14 % faster (the book's ladder).
HEAD_MULTIPLE = 64


class KVCache:
    """The keys and values of the tokens read so far, in buffers allocated once.

    Args:
        config: the model's shape; the buffers hold ``context_length`` tokens.
        batch_size: sequences decoded side by side.
        device, dtype: of the buffers; the model's parameters' by default in :meth:`GPT.new_cache`.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, batch_size, config.n_heads, config.context_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model moves it on once a forward pass is complete

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new entries and return all of that layer's so far, both [batch, heads, length, head_dim]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


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
        self, x: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        batch, time, emb = x.shape
        # [batch, time, 3 * emb] -> three of [batch, heads, time, head_dim]
        q, k, v = self.qkv(x).view(batch, time, 3, self.n_heads, emb // self.n_heads).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
            q = q.to(k.dtype)
            if 1 < time < k.shape[2]:  # several new tokens behind cached ones: each sees all up to itself
                mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - time)
        dropout = self.drop_rate if self.training else 0.0
        compiling, masked = torch.compiler.is_compiling() and cache is None, documents is not None
        kernel = kernel_for(x.device.type, time, q.shape[-1], dropout, compiling=compiling, documents=masked)
        if kernel == "squares":
            x = _attend(q, k, v, dropout, documents)
        elif kernel == "flex":
            assert documents is not None
            x = flex_attend(q, k, v, documents)
        elif documents is not None:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_in_documents(documents), dropout_p=dropout)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=time == k.shape[2], dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(batch, time, emb))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, documents: Tensor | None = None) -> Tensor:
    """Causal attention by its formula; each of [batch, heads, time, head_dim], the softmax in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [batch, heads, time, time]
    positions = torch.arange(q.shape[2], device=q.device)
    hidden = positions[None, :] > positions[:, None]
    if documents is not None:
        hidden = hidden | (documents[:, None, None, :] != documents[:, None, :, None])
    weights = scores.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return F.dropout(weights.to(v.dtype), dropout, training=dropout > 0) @ v


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
        self, x: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        x = x + self.drop_resid(self.att(self.norm1(x), cache, documents))
        return x + self.drop_resid(self.ff(self.norm2(x)))  # type: ignore[no-any-return]


class Head(nn.Linear):
    """The output head: a linear layer that computes with its rows padded to a multiple of ``HEAD_MULTIPLE``.

    The padding exists only inside the product. The parameter, its gradient, the optimizer's state and every file have one
    row a token, so nothing downstream needs to know of it; compiled, it is part of the cast to the compute dtype.
    """

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> [batch, time, vocab]
        padding = self.padded_to - self.out_features
        if not padding:
            return super().forward(x)
        return F.linear(x, F.pad(self.weight, (0, 0, 0, padding)))[..., : self.out_features]

    @property
    def padded_to(self) -> int:
        """Rows in the product."""
        return -(-self.out_features // HEAD_MULTIPLE) * HEAD_MULTIPLE


class GPT(nn.Module):
    """A GPT-2.

    Args:
        config: its shape; see :class:`GPTConfig`.

    >>> model = GPT(GPTConfig.preset("nano", vocab_size=100))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 100])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        """Whether blocks store their inputs alone for the backward pass: less memory, a third more work."""
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim, bias=config.bias)
        self.out_head = Head(config.emb_dim, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight
            self.register_load_state_dict_pre_hook(_complete_tie)  # type: ignore[no-untyped-call]

    @classmethod
    def without_values(cls, config: GPTConfig) -> GPT:
        """A model on the meta device: names and shapes without values, to load into or to count."""
        with no_values():
            return cls(config)

    def reset_parameters(self, part: nn.Module | None = None) -> None:
        """GPT-2's initialisation: N(0, 0.02), biases 0, and the layers that write to the residual stream scaled down by
        the square root of their number, so that its variance does not grow with depth.

        Args:
            part: one of the modules alone, by default all.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, module in (part or self).named_modules():
            if isinstance(module, nn.Linear):
                writes_to_residual = name.endswith(("att.proj", "ff.layers.2"))
                nn.init.normal_(module.weight, std=residual_std if writes_to_residual else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            tokens: [batch, time] int64, time at most ``context_length`` (with a cache: less what it already holds).
            targets: [batch, time] int64, the token that follows each; -100 where it does not count.
            cache: keys and values of the tokens before these; extended in place.
            documents: [batch, time] int64, the number of the document that each token belongs to within its row,
                non-decreasing (:func:`onym.gpt.documents.documents_of`): a token attends to its own document alone, at its
                position in that. Not together with a cache, which holds one document.

        Returns:
            Logits [batch, time, vocab] in the compute dtype; with targets, the mean cross-entropy in nats, a 0-d fp32
            tensor.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"{end} tokens do not fit a context of {self.config.context_length}: "
                "pass the last ones only, or use onym.generate.engine, which slides."
            )
        if documents is None:
            positions = torch.arange(start, end, device=tokens.device)
        elif cache is None:
            positions = positions_of(documents)
        else:
            raise ValueError("A cache holds one document: pass documents, or a cache, not both.")
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))  # [batch, time, emb]
        for block in self.trf_blocks:
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, None, documents, use_reentrant=False)
            else:
                x = block(x, cache, documents)
        x = self.final_norm(x)
        if cache is not None:
            cache.length = end
        if targets is None:
            return self.out_head(x)  # type: ignore[no-any-return]
        return self._loss(x.flatten(0, 1), targets.flatten())

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:  # [tokens, emb], [tokens] -> []
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        head = self.out_head  # which somebody may have replaced, by a classifier's
        if isinstance(head, Head) and chunk_rows(x.shape[0], head.padded_to, x.dtype, x.device) < x.shape[0]:
            return head_loss(x, head.weight, targets, head.padded_to)
        return F.cross_entropy(head(x).float(), targets, ignore_index=IGNORED_TARGET)

    def new_cache(self, batch_size: int = 1, device: torch.device | None = None) -> KVCache:
        """An empty cache for ``batch_size`` sequences, in the dtype of the parameters, and where they are by default."""
        weight = self.tok_emb.weight
        return KVCache(self.config, batch_size, device or weight.device, weight.dtype)


def _complete_tie(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A tied matrix is stored once, under either name; let a strict load find it under both."""
    embedding, head = f"{prefix}tok_emb.weight", f"{prefix}out_head.weight"
    if embedding in state:
        state.setdefault(head, state[embedding])
    elif head in state:
        state[embedding] = state[head]


_complete_tie.changes_the_dict_alone = True  # type: ignore[attr-defined]  # see onym.state.model
