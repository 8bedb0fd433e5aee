"""The keys and values of texts that are written side by side: a slot for each, which a text takes and leaves at any time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onym.errors import ConfigError
from onym.gpt.attention import CacheShape, KVCache
from onym.units import format_size, plural

ROUND = 16
"""A step attends to a multiple of this many positions: whole vectors, so that sums are the same for any number of them."""

_LEAST_TOKENS = 256


class Slots:
    """Buffers for ``slots`` texts of up to ``capacity`` tokens.

    fp32 on a CPU, whatever the weights are: attention of one query is 5 to 8 times slower there in bf16 (docs/performance.md).
    On a GPU, which reads all of them for each token, they are as narrow as the weights.
    Positions come first, so that those that are held are one piece of memory.
    """

    def __init__(self, config: CacheShape, slots: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.capacity = -(-capacity // ROUND) * ROUND
        shape = (config.n_layers, self.capacity, slots, config.n_kv_groups, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def fitting(config: CacheShape, slots: int, device: torch.device, dtype: torch.dtype) -> int:
        """The most positions that half of a GPU's free memory holds; the other half is left to the weights.

        Main memory is taken page by page when it is written to, so there all of the context may be asked for.

        Raises:
            ConfigError: they are too few for a text.
        """
        if device.type != "cuda":
            return config.context_length
        bytes_a_position = 2 * config.n_layers * slots * config.n_kv_groups * config.head_dim * dtype.itemsize
        torch.cuda.empty_cache()  # what torch keeps for later is not free to others
        free, _ = torch.cuda.mem_get_info(device)
        fitting = min(config.context_length, free // 2 // bytes_a_position)
        if fitting < min(config.context_length, _LEAST_TOKENS):
            raise ConfigError(
                f"The GPU has {format_size(free)} left, too little for {plural(slots, 'text')} of {_LEAST_TOKENS} tokens: "
                "write fewer at once, end what else uses it, or take --device cpu."
            )
        return fitting

    def of_slot(self, slot: int, length: int) -> KVCache:
        """One slot's, for a forward pass over several tokens of one text, of which ``length`` are held."""
        keys, values = (
            each[:, :, slot : slot + 1].permute(0, 2, 3, 1, 4)  # [layers, 1, groups, capacity, head_dim]
            for each in (self.keys, self.values)
        )
        return KVCache.of(keys, values, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Take over the first tokens of another slot."""
        for each in (self.keys, self.values):
            each[:, :length, target] = each[:, :length, source]

    def held(self, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first ``length`` positions and more, of each layer [positions, slots, groups, head_dim]."""
        end = -(-length // ROUND) * ROUND
        return [each[:end] for each in self.keys], [each[:end] for each in self.values]

    @property
    def slots(self) -> int:
        """How many."""
        return self.keys.shape[2]

    @property
    def bytes_a_position(self) -> int:
        """Of one text, in all layers."""
        return 2 * self.keys[:, 0, 0].numel() * self.keys.dtype.itemsize


class OneStep:
    """What one step of decoding sees: a token for each slot, at its own position.

    Args:
        keys, values: of each layer [positions, slots, groups, head_dim].
        positions: [slots] int64, where the new tokens stand.
        lengths: tokens of each slot, the new one included, 0 where it writes nothing; without them (compiled or captured), a
            mask over all positions does the same.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor, lengths: Sequence[int] | None = None
    ) -> None:
        self.keys, self.values, self.at, self.lengths = keys, values, positions, lengths

    def positions(self, time: int) -> Tensor:
        """[slots, 1]."""
        assert time == 1
        return self.at[:, None]

    def advance(self, time: int) -> None:
        """The engine knows."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :meth:`onym.gpt.attention.Cache.attend`; one new token of each slot."""
        slots, heads, _, head_dim = q.shape
        keys, values = self.keys[layer], self.values[layer]
        if self.lengths is None:
            return self._masked(keys, values, q, k, v)
        y = torch.zeros(slots, heads, 1, head_dim, device=q.device, dtype=keys.dtype)
        grouped = q.to(keys.dtype).view(slots, keys.shape[2], -1, head_dim)  # the queries that read the same keys
        for slot, length in enumerate(self.lengths):
            if length:
                keys[length - 1, slot], values[length - 1, slot] = k[slot, :, 0], v[slot, :, 0]
                # Of its own length, so that a text is the same whatever is written beside it.
                part = F.scaled_dot_product_attention(
                    grouped[slot : slot + 1],
                    keys[:length, slot : slot + 1].permute(1, 2, 0, 3),
                    values[:length, slot : slot + 1].permute(1, 2, 0, 3),
                )
                y[slot] = part.reshape(heads, 1, head_dim)  # whose memory is in another order on a GPU
        return y

    def _masked(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, heads, _, head_dim = q.shape
        each = torch.arange(slots, device=q.device)
        keys[self.at, each] = k[:, :, 0].to(keys.dtype)
        values[self.at, each] = v[:, :, 0].to(values.dtype)
        keys, values = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)  # [slots, groups, positions, head_dim]
        hidden = torch.arange(keys.shape[2], device=q.device) > self.at[:, None, None, None]
        grouped = q.view(slots, keys.shape[1], -1, head_dim)  # [slots, groups, heads / groups, head_dim]
        if not torch.compiler.is_compiling():
            seen = F.scaled_dot_product_attention(grouped.to(keys.dtype), keys, values, attn_mask=~hidden)
            return seen.reshape(slots, heads, 1, head_dim).to(q.dtype)
        # The formula: the compiler makes loops of it that read keys and values once.
        scores = (grouped.float()[:, :, :, None] * head_dim**-0.5 * keys.float()[:, :, None]).sum(-1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)  # [slots, groups, heads / groups, positions]
        y: Tensor = (weights[..., None] * values.float()[:, :, None]).sum(-2)  # [slots, groups, heads / groups, head_dim]
        return y.reshape(slots, heads, 1, head_dim)
