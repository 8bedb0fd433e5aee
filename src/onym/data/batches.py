"""Token streams as batches: shuffled windows to train on, windows in order to evaluate on.

Every batch has the same shape, the last one of an evaluation too (it is filled up with targets that do not count), so a
compiled model is compiled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onym.data.order import UInt64Array, shares_of, source_at, windows_at
from onym.data.tokens import TokenStream

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, both [sequences, context_length] int64."""
IGNORED_TARGET = -100
"""A target that does not count in the loss; the default of PyTorch's cross-entropy."""


class Windows(Protocol):
    """A stream cut into pieces of one length, to be trained on in any order."""

    def __len__(self) -> int: ...

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        """Inputs and targets of these windows, both [windows, context_length] int64."""
        ...


class StreamWindows:
    """Windows that follow each other, whatever document they are of.

    Args:
        stream: the training tokens.
        context_length: tokens in a window.
    """

    def __init__(self, stream: TokenStream, context_length: int) -> None:
        self._stream, self._context_length = stream, context_length

    def __len__(self) -> int:
        return max(0, (len(self._stream) - 1) // self._context_length)

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        """See :class:`Windows`."""
        return _inputs_and_targets(self._stream, numbers * self._context_length, self._context_length)


class TrainingBatches:
    """Batches of shuffled windows; batch ``i`` depends on ``(seed, i)`` alone.

    Args:
        sources: the windows of each source.
        batch_size: windows in a batch.
        seed: which order.
        weights: of the sources, by tokens; they have them exactly in every 4096 windows.
        share: of each batch that is wanted, as (which, of how many); the windows are the same however many share them.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (1.0,),
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._sources, self._shares = sources, shares_of(weights)
        self._batch_size, self._seed = batch_size, seed
        size = batch_size // share[1]
        self._share = slice(share[0] * size, (share[0] + 1) * size)

    def __getitem__(self, batch: int) -> Batch:
        """Inputs and targets of a batch, or of the share of it, both [sequences, context_length] int64."""
        positions = np.arange(batch * self._batch_size, (batch + 1) * self._batch_size, dtype=np.uint64)[self._share]
        if len(self._sources) == 1:
            return self._read(0, positions, self._seed)
        sources, before = source_at(positions, self._shares, self._seed)
        chosen = [np.flatnonzero(sources == source) for source in range(len(self._sources))]
        parts = [self._read(source, before[rows], self._seed + source) for source, rows in enumerate(chosen) if len(rows)]
        back = torch.from_numpy(np.argsort(np.concatenate(chosen)))
        inputs, targets = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return inputs, targets

    def _read(self, source: int, positions: UInt64Array, seed: int) -> Batch:
        windows = self._sources[source]
        return windows.read(windows_at(positions, len(windows), seed))


def evaluation_batches(
    stream: TokenStream, context_length: int, batch_size: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """At most ``limit`` batches, covering every token once where the limit allows, else windows spread evenly over the stream.

    Each is inputs and targets as in :class:`TrainingBatches`; targets past the end of the stream are -100.
    """
    starts = np.arange(0, max(len(stream) - 1, 0), context_length, dtype=np.int64)
    if len(starts) > limit * batch_size:
        starts = starts[np.arange(limit * batch_size) * len(starts) // (limit * batch_size)]
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        # Rows that fill up the last batch start at the end of the stream: nothing of them counts.
        filled = np.concatenate([chosen, np.full(batch_size - len(chosen), len(stream), dtype=np.int64)])
        yield _inputs_and_targets(stream, filled, context_length)


def _inputs_and_targets(stream: TokenStream, starts: NDArray[np.int64], context_length: int) -> tuple[Tensor, Tensor]:
    windows = np.full((len(starts), context_length + 1), IGNORED_TARGET, dtype=np.int64)
    for row, start in zip(windows, starts.tolist(), strict=True):
        window = stream.read(start, start + context_length + 1)
        row[: len(window)] = window
    targets = windows[:, 1:].copy()
    inputs = windows[:, :-1]
    return torch.from_numpy(np.maximum(inputs, 0)), torch.from_numpy(targets)
