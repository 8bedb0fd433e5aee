"""Token streams as batches: shuffled windows to train on, windows in order to evaluate on.

Every batch has the same shape, the last one of an evaluation too (it is filled up with targets that do not count), so a
compiled model is compiled once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onym.data.order import window_numbers
from onym.data.tokens import TokenStream
from onym.errors import DataError

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, both [sequences, context_length] int64."""
IGNORED_TARGET = -100
"""A target that does not count in the loss; the default of PyTorch's cross-entropy."""


class TrainingBatches:
    """Batches of shuffled windows; batch ``i`` depends on ``(seed, i)`` alone.

    Args:
        stream: the training tokens.
        context_length: tokens in a window.
        batch_size: windows in a batch.
        seed: which order.
        description: what an error calls the corpus.
        share: of each batch that is wanted, as (which, of how many); the windows are the same however many share them.

    Raises:
        DataError: the stream is shorter than one batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        context_length: int,
        batch_size: int,
        seed: int,
        description: str = "The corpus",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._tokens = stream.tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        size = batch_size // share[1]
        self._share = slice(share[0] * size, (share[0] + 1) * size)
        self.windows = max(0, (len(stream) - 1) // context_length)
        if self.windows < batch_size:
            raise DataError(
                f"{description} has {len(stream):,} tokens to train on, fewer than one batch of {batch_size} x "
                f"{context_length} (and one more): add text to --data, or lower --batch-size or --context-length."
            )

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch, or of the share of it, both [sequences, context_length] int64."""
        numbers = window_numbers(batch, self.batch_size, self.windows, self.seed)[self._share]
        return _inputs_and_targets(self._tokens, numbers * self.context_length, self.context_length)


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
        yield _inputs_and_targets(stream.tokens, filled, context_length)


def _inputs_and_targets(
    tokens: NDArray[np.uint16] | NDArray[np.uint32], starts: NDArray[np.int64], context_length: int
) -> tuple[Tensor, Tensor]:
    windows = np.full((len(starts), context_length + 1), IGNORED_TARGET, dtype=np.int64)
    for row, start in zip(windows, starts, strict=True):
        window = tokens[start : start + context_length + 1]
        row[: len(window)] = window
    targets = windows[:, 1:].copy()
    inputs = windows[:, :-1]
    return torch.from_numpy(np.maximum(inputs, 0)), torch.from_numpy(targets)
