"""Windows of whole documents, instead of windows cut from the stream wherever they happen to end.

A document that is longer than a window is cut into pieces of a window's length first. What is left of it, and each shorter
document, is a segment; segments are put into windows by best-fit decreasing ("Fewer Truncations Improve Language Modeling",
Ding et al., 2024): the longest first, each into the window that it fills best. The rest of a window is padding.

A window holds inputs; their targets are the tokens that follow. A segment of n tokens gives n - 1 targets, because what follows
its last token belongs to another document, and n where its own document goes on. So a segment of one token that ends a document
teaches nothing, and is left out. Each target that is within a document is in exactly one window.

Segments end with the end-of-text token, or with their window, and padding is end-of-text tokens without targets: so
:func:`onym.gpt.documents.documents_of` finds the boundaries in the inputs alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from onym.data.batches import IGNORED_TARGET, Batch, Windows
from onym.data.tokens import TokenStream

# Planned together, in a tenth of a second. More would fill windows hardly better, and take memory as Python's numbers.
_BLOCK_DOCUMENTS = 100_000
_LEAST = 2  # tokens of a segment that teaches something


@dataclass(frozen=True)
class Plan:
    """Which tokens of a stream are in which window."""

    context_length: int
    starts: NDArray[np.int64]
    """[segments]: the first token of each, window by window."""
    stops: NDArray[np.int64]
    """[segments]: one past its last token."""
    goes_on: NDArray[np.bool_]
    """[segments]: whether its document goes on behind it, so that its last token has a target."""
    first_segment: NDArray[np.int64]
    """[windows + 1]: window w has the segments from ``first_segment[w]`` to before ``first_segment[w + 1]``."""

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.first_segment) - 1

    @property
    def padding_share(self) -> float:
        """Share of the windows' tokens that is padding."""
        size = self.windows * self.context_length
        return 1 - int((self.stops - self.starts).sum()) / size if size else 0.0


def plan_windows(document_starts: NDArray[np.uint64], total_tokens: int, context_length: int) -> Plan:
    """Plan the windows of a stream; the same for the same stream. O(n log n) for n documents.

    Args:
        document_starts: sorted, the first 0.
        total_tokens: of the stream.
        context_length: tokens in a window.
    """
    bounds = np.append(document_starts.astype(np.int64), total_tokens)
    segments, counts = [], []
    for first in range(0, max(1, len(document_starts)), _BLOCK_DOCUMENTS):
        begins, ends = bounds[:-1][first : first + _BLOCK_DOCUMENTS], bounds[1:][first : first + _BLOCK_DOCUMENTS]
        for part, count in (_long(begins, ends, context_length), _packed(begins, ends, context_length)):
            segments.append(part)
            counts.append(count)
    starts, stops, ends = np.concatenate(segments, axis=1)
    first_segment = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return Plan(context_length, starts, stops, stops < ends, first_segment)


Segments = NDArray[np.int64]
"""[3, segments]: where each starts, where it stops, and where its document ends."""


def _long(begins: NDArray[np.int64], ends: NDArray[np.int64], context_length: int) -> tuple[Segments, NDArray[np.int64]]:
    """The pieces of documents that fill a window; and how many segments each window has."""
    pieces = (ends - begins) // context_length
    document = np.repeat(np.arange(len(begins)), pieces)
    index = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece, within its document
    starts = begins[document] + index * context_length
    return np.stack([starts, starts + context_length, ends[document]]), np.ones(len(document), dtype=np.int64)


def _packed(begins: NDArray[np.int64], ends: NDArray[np.int64], context_length: int) -> tuple[Segments, NDArray[np.int64]]:
    """What is left of the documents, by best-fit decreasing; and how many segments each window has."""
    lengths = (ends - begins) % context_length
    kept = np.flatnonzero(lengths >= _LEAST)
    kept = kept[np.argsort(-lengths[kept], kind="stable")]
    window_of = _best_fit_decreasing(lengths[kept], context_length)
    windows = int(window_of.max()) + 1 if len(window_of) else 0
    kept = kept[np.argsort(window_of, kind="stable")]
    return np.stack([ends[kept] - lengths[kept], ends[kept], ends[kept]]), np.bincount(window_of, minlength=windows)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The window of each piece of text, by best-fit decreasing; windows are numbered from 0.

    Args:
        lengths: of each piece, at most ``capacity``.
        capacity: tokens of a window.
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    windows = 0
    for first in range(0, len(lengths), _BLOCK_DOCUMENTS):
        block = lengths[first : first + _BLOCK_DOCUMENTS]
        order = np.argsort(-block, kind="stable")
        window_of[first + order] = windows + _best_fit_decreasing(block[order], capacity, least=1)
        windows = int(window_of[: first + len(block)].max()) + 1
    return window_of


def _best_fit_decreasing(lengths: NDArray[np.int64], capacity: int, least: int = _LEAST) -> NDArray[np.int64]:
    """The window of each piece, the longest first: the one that it fills best. Space below ``least`` tokens is given up."""
    windows = 0
    window_of = np.empty(len(lengths), dtype=np.int64)
    open_windows: dict[int, list[int]] = {}  # by the space that is left in them
    spaces: list[int] = []  # the keys, sorted
    for number, length in enumerate(lengths.tolist()):
        place = bisect_left(spaces, length)
        if place == len(spaces):
            window, space = windows, capacity
            windows += 1
        else:
            space = spaces[place]
            window = open_windows[space].pop()
            if not open_windows[space]:
                del open_windows[space], spaces[place]
        window_of[number] = window
        left = space - length
        if left >= least:
            if left not in open_windows:
                open_windows[left] = []
                insort(spaces, left)
            open_windows[left].append(window)
    return window_of


class PackedWindows:
    """Windows of whole documents; see :class:`onym.data.batches.Windows`.

    Args:
        stream: the training tokens.
        context_length: tokens in a window.
        end_of_text: the token that pads a window.
    """

    def __init__(self, stream: TokenStream, context_length: int, end_of_text: int) -> None:
        self._stream, self._end_of_text = stream, end_of_text
        self.plan = plan_windows(stream.document_starts, len(stream), context_length)

    def __len__(self) -> int:
        return self.plan.windows

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        """Inputs and targets of these windows, both [windows, context_length] int64; of padding the targets are -100."""
        plan = self.plan
        inputs = np.full((len(numbers), plan.context_length), self._end_of_text, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED_TARGET)
        for row, window in enumerate(numbers):
            at = 0
            for segment in range(plan.first_segment[window], plan.first_segment[window + 1]):
                start, stop = int(plan.starts[segment]), int(plan.stops[segment])
                tokens = self._stream.read(start, stop + int(plan.goes_on[segment]))
                inputs[row, at : at + stop - start] = tokens[: stop - start]
                targets[row, at : at + len(tokens) - 1] = tokens[1:]
                at += stop - start
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def describe(windows: Sequence[Windows]) -> str:
    """How many windows there are, and how much of them is padding."""
    plans = [each.plan for each in windows if isinstance(each, PackedWindows)]
    count = sum(plan.windows for plan in plans)
    padding = sum(plan.windows * plan.padding_share for plan in plans) / max(1, count)
    return f"{count:,} windows of whole documents, {padding:.1%} padding"
