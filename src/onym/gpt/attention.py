"""Causal attention as both models compute it, and the keys and values of the tokens read so far."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from onym.gpt.documents import causal_in_documents, flex_attend, kernel_for


class CacheShape(Protocol):
    """What the buffers of a :class:`KVCache` are made by: a model's configuration."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_kv_groups(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache:
    """The keys and values of the tokens read so far, in buffers allocated once.

    Args:
        config: the model's shape.
        batch_size: sequences decoded side by side.
        device, dtype: of the buffers; the model's parameters' by default in :meth:`CausalLM.new_cache`.
        capacity: tokens that the buffers hold, ``context_length`` by default.
    """

    def __init__(
        self,
        config: CacheShape,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_groups, capacity or config.context_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model moves it on once a forward pass is complete

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new entries and return all of that layer's so far, both [batch, kv groups, length, head_dim]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    cache: KVCache | None = None,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of one layer.

    Args:
        q: [batch, heads, time, head_dim], of the new tokens.
        k, v: [batch, kv groups, time, head_dim]; each is read by heads / groups query heads that follow each other.
        layer: the number of the layer, whose part of the cache is extended.
        cache: keys and values of the tokens before these.
        documents: [batch, time] int64, see :mod:`onym.gpt.documents`.
        dropout: probability, for the weights.

    Returns:
        [batch, time, heads * head_dim].
    """
    batch, heads, time, head_dim = q.shape
    mask = None
    if cache is not None:
        k, v = cache.append(layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
        q = q.to(k.dtype)
        if 1 < time < k.shape[2]:  # several new tokens behind cached ones: each sees all up to itself
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - time)
    if k.shape[1] != heads:
        k, v = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (k, v))
    compiling, masked = torch.compiler.is_compiling() and cache is None, documents is not None
    kernel = kernel_for(q.device.type, time, head_dim, dropout, compiling=compiling, documents=masked)
    if kernel == "squares":
        x = _by_formula(q, k, v, dropout, documents)
    elif kernel == "flex":
        assert documents is not None
        x = flex_attend(q, k, v, documents)
    elif documents is not None:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_in_documents(documents), dropout_p=dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=time == k.shape[2], dropout_p=dropout)
    return x.transpose(1, 2).reshape(batch, time, heads * head_dim)


def _by_formula(q: Tensor, k: Tensor, v: Tensor, dropout: float, documents: Tensor | None = None) -> Tensor:
    """Each of [batch, heads, time, head_dim], the softmax in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [batch, heads, time, time]
    positions = torch.arange(q.shape[2], device=q.device)
    hidden = positions[None, :] > positions[:, None]
    if documents is not None:
        hidden = hidden | (documents[:, None, None, :] != documents[:, None, :, None])
    weights = scores.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return F.dropout(weights.to(v.dtype), dropout, training=dropout > 0) @ v
