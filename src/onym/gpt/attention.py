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


class Cache(Protocol):
    """The keys and values of the tokens before those that a forward pass is given."""

    def positions(self, time: int) -> Tensor:
        """Where ``time`` new tokens stand: [time], or [batch, time] where that differs from sequence to sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store one layer's new keys and values, both [batch, kv groups, time, head_dim], and attend to all up to each query.

        Args:
            layer: its number.
            q: [batch, heads, time, head_dim].

        Returns:
            [batch, heads, time, head_dim].
        """

    def advance(self, time: int) -> None:
        """The forward pass is complete: its tokens are read."""


class KVCache:
    """The keys and values of sequences of equal length, in buffers allocated once.

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
        self.length = 0  # tokens held

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, length: int) -> KVCache:
        """A cache in buffers that are there, both [layers, batch, kv groups, capacity, head_dim], with ``length`` tokens."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.length = keys, values, length
        return cache

    def positions(self, time: int) -> Tensor:
        """The next ones: [time]."""
        if (end := self.length + time) > (capacity := self.keys.shape[3]):
            raise ValueError(
                f"{end} tokens do not fit a cache of {capacity}: pass the last ones only, or use onym.generate, which slides."
            )
        return torch.arange(self.length, end, device=self.keys.device)

    def advance(self, time: int) -> None:
        """The forward pass is complete: its tokens are read."""
        self.length += time

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new entries and return all of that layer's so far, both [batch, kv groups, length, head_dim]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :meth:`Cache.attend`."""
        time, mask = q.shape[2], None
        k, v = self.append(layer, k.to(self.keys.dtype), v.to(self.values.dtype))
        if 1 < time < k.shape[2]:  # several new tokens behind cached ones: each sees all up to itself
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - time)
        k, v = for_each_head(k, v, q.shape[1])
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=time == k.shape[2])


def for_each_head(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, kv groups, …] repeated for the heads that read them: [batch, heads, …]."""
    if k.shape[1] == heads:
        return k, v
    return k.repeat_interleave(heads // k.shape[1], dim=1), v.repeat_interleave(heads // v.shape[1], dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    cache: Cache | None = None,
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
    if cache is not None:
        return cache.attend(layer, q, k, v).transpose(1, 2).reshape(batch, time, heads * head_dim)
    k, v = for_each_head(k, v, heads)
    compiling, masked = torch.compiler.is_compiling(), documents is not None
    kernel = kernel_for(q.device.type, time, head_dim, dropout, compiling=compiling, documents=masked)
    if kernel == "squares":
        x = _by_formula(q, k, v, dropout, documents)
    elif kernel == "flex":
        assert documents is not None
        x = flex_attend(q, k, v, documents)
    elif documents is not None:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_in_documents(documents), dropout_p=dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
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
