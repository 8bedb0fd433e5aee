"""Examples to fine-tune on: tokens, and for each of them the target that counts there, if any.

A conversation's targets are the tokens of its replies and what ends them; those of everything else do not count. A labelled
text has one target, at its last token: the label's number. So both are trained on by the loop that trains on text, and a window
holds as many examples as fit, which do not see each other.

    <cache>/tokens/<key>/   tokens.npy targets.npy    int32, of all examples one after the other
                            starts.npy                int64 [examples + 1]
                            held_out.npy              bool [examples]
                            tokens.json               what made them; written last
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onym.data.batches import IGNORED_TARGET, Batch
from onym.data.order import epoch_key, permute
from onym.data.packing import best_fit
from onym.data.tokens import USED, new_folder
from onym.errors import DataError
from onym.storage.lock import lock
from onym.units import plural

_DESCRIPTION = "tokens.json"  # as beside tokenised text, so that the cache's list shows both
_FORMAT = 1
_SHORT_WINDOW = 256  # tokens; windows are not made shorter than this for packing


@dataclass(frozen=True)
class Example:
    """Tokens and their targets."""

    tokens: Sequence[int]
    targets: Sequence[int]
    """As many; -100 where none counts."""


@dataclass(frozen=True)
class ExampleSet:
    """All examples of a file."""

    path: Path
    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    starts: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    description: Mapping[str, Any] = field(default_factory=dict)
    """What tokens.json says: the source, and how many rows were cut or skipped."""

    def __len__(self) -> int:
        return len(self.held_out)

    def example(self, number: int) -> Example:
        """One of them."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return Example(self.tokens[part].tolist(), self.targets[part].tolist())

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return np.diff(self.starts)


class ExampleWindows:
    """Windows of whole examples; see :class:`onym.data.batches.Windows`.

    A window's inputs have the first token of each example, and of the padding behind the last, as its complement (``~token``):
    see :func:`onym.gpt.documents.unmarked`.

    Args:
        examples: all of them.
        numbers: those that are put into windows.
        window: tokens in a window.
        pack: as many as fit; else one a window.
    """

    def __init__(self, examples: ExampleSet, numbers: NDArray[np.int64], window: int, *, pack: bool) -> None:
        self._examples, self._window = examples, window
        lengths = examples.lengths[numbers]
        placed = best_fit(lengths, window) if pack else np.arange(len(numbers))
        self._numbers = numbers[np.argsort(placed, kind="stable")]
        count = int(placed.max()) + 1 if len(placed) else 0
        self._first = np.concatenate([[0], np.cumsum(np.bincount(placed, minlength=count))]).astype(np.int64)
        self.padding_share = 1 - int(lengths.sum()) / (count * window) if count else 0.0

    def __len__(self) -> int:
        return len(self._first) - 1

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        """See :class:`onym.data.batches.Windows`; windows beyond the last are all padding."""
        inputs = np.zeros((len(numbers), self._window), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED_TARGET)
        for row, window in enumerate(numbers):
            at = 0
            for number in self._numbers[self._first[window] : self._first[window + 1]] if window < len(self) else ():
                part = slice(int(self._examples.starts[number]), int(self._examples.starts[number + 1]))
                stop = at + part.stop - part.start
                inputs[row, at:stop] = self._examples.tokens[part]
                targets[row, at:stop] = self._examples.targets[part]
                inputs[row, at] = ~inputs[row, at]
                at = stop
            if at < self._window:
                inputs[row, at] = ~inputs[row, at]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


@dataclass(frozen=True)
class Examples:
    """What a run is fine-tuned on, in the place of :class:`onym.data.sources.Sources`.

    Args:
        name: of the source, in run.json.
        data: the examples.
        window: tokens in a window.
        pack: whether a window holds several.
    """

    name: str
    data: ExampleSet
    window: int
    pack: bool

    mixed = False
    weights = (1.0,)

    @property
    def key(self) -> str:
        """A hash of the rows, the tokenizer, and how they were made."""
        return self.data.path.name

    @property
    def training_tokens(self) -> int:
        """Tokens of the examples that are trained on."""
        return int(self.data.lengths[~self.data.held_out].sum())

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the others."""
        return int(self.data.lengths[self.data.held_out].sum())

    @property
    def skipped_files(self) -> list[dict[str, str]]:
        """None: there is one file, and it was read."""
        return []

    @cached_property
    def windows(self) -> ExampleWindows:
        """What to train on."""
        return ExampleWindows(self.data, np.flatnonzero(~self.data.held_out), self.window, pack=self.pack)

    @cached_property
    def held_out_windows(self) -> ExampleWindows:
        """What to evaluate on; planned once, and read at each evaluation."""
        return ExampleWindows(self.data, np.flatnonzero(self.data.held_out), self.window, pack=self.pack)

    def held_out_batches(self, context_length: int, batch_size: int, limit: int) -> list[tuple[str, Iterator[Batch]]]:
        """At most ``limit`` batches of windows with the held-out examples, the same each time; of more windows, some that are
        spread evenly over them, because the first have the longest examples."""
        windows = self.held_out_windows
        chosen = np.arange(len(windows))
        if len(windows) > (most := limit * batch_size):
            chosen = np.arange(most) * len(windows) // most
        padding = np.full(-len(chosen) % batch_size, len(windows))
        numbers = np.concatenate([chosen, padding]).reshape(-1, batch_size)
        return [(self.name, (windows.read(each) for each in numbers))]

    def first_held_out(self) -> Example:
        """An example that is not trained on."""
        return self.data.example(int(np.flatnonzero(self.data.held_out)[0]))

    def relink(self, tokenizer_json: str) -> None:
        """Write the examples again if they were deleted while they are mapped.

        Raises:
            StorageError: they cannot be written.
        """
        if open_examples(self.data.path) is None:
            data = self.data
            _write(data.path, data.tokens, data.targets, data.starts, data.held_out, data.description)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON values, for run.json and for another process."""
        return [{"name": self.name, "weight": 1.0, "examples": str(self.data.path), "window": self.window, "pack": self.pack}]

    @classmethod
    def open(cls, values: Sequence[Mapping[str, Any]]) -> Examples:
        """What :meth:`to_list` gave; the examples are there."""
        (value,) = values
        data = open_examples(Path(value["examples"]))
        assert data is not None, "the examples are gone"
        return cls(value["name"], data, value["window"], value["pack"])


def window_for(examples: ExampleSet, context_length: int, *, pack: bool) -> int:
    """How long windows are: no longer than is of use, because attention costs the square of it."""
    longest = int(examples.lengths.max())
    wanted = max(_SHORT_WINDOW, -(-2 * longest // 64) * 64) if pack else -(-longest // 8) * 8
    return min(context_length, wanted)


def chosen_to_hold_out(rows: int, share: float) -> NDArray[np.bool_]:
    """Which rows are held out: at least one, at most all but one, spread over the file; the same for the same number."""
    count = min(max(1, round(rows * share)), rows - 1)
    order = permute(np.arange(rows, dtype=np.uint64), rows, epoch_key(0, 0))
    held_out: NDArray[np.bool_] = order < count
    return held_out


def keep_examples(
    folder: Path, examples: Iterable[Example], held_out: Sequence[bool] | NDArray[np.bool_], description: Mapping[str, Any]
) -> ExampleSet:
    """Write examples to the cache, and open them.

    Args:
        folder: named by a hash of all that they depend on.
        examples: at least two.
        held_out: of each.
        description: for ``onym inspect``.

    Raises:
        StorageError: they cannot be written.
    """
    kept = list(examples)
    starts = np.cumsum([0, *(len(example.tokens) for example in kept)]).astype(np.int64)
    tokens, targets = (
        np.concatenate([np.asarray(getattr(example, what), dtype=np.int32) for example in kept])
        for what in ("tokens", "targets")
    )
    chosen = np.asarray(held_out, dtype=bool)
    lengths = np.diff(starts)
    counted = {"train": int(lengths[~chosen].sum()), "held_out": int(lengths[chosen].sum())}
    _write(folder, tokens, targets, starts, chosen, {**description, "tokens": counted})
    opened = open_examples(folder)
    assert opened is not None
    return opened


def open_examples(folder: Path) -> ExampleSet | None:
    """The examples in this folder, or None where there are none or they are not whole.

    They are in use, and :mod:`.cache` does not delete them, as long as what is returned lives.
    """
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "targets", "starts", "held_out")]
        tokens, targets, starts, held_out = arrays
        found = ExampleSet(folder, tokens, targets, starts, held_out, description)
        if description["format"] != _FORMAT or found.starts[-1] != len(found.tokens):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError):
        return None
    with suppress(OSError):
        (folder / USED).touch()
        if (descriptor := lock(folder / USED, os.O_RDWR, shared=True)) is not None:
            weakref.finalize(found, os.close, descriptor)
    return found


def _write(
    folder: Path,
    tokens: NDArray[np.int32],
    targets: NDArray[np.int32],
    starts: NDArray[np.int64],
    held_out: NDArray[np.bool_],
    description: Mapping[str, Any],
) -> None:
    with new_folder(folder) as temporary:
        for name, array in (("tokens", tokens), ("targets", targets), ("starts", starts), ("held_out", held_out)):
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        (temporary / _DESCRIPTION).write_text(json.dumps({"format": _FORMAT, **description}, indent=2) + "\n")


def require_enough(examples: int, path: Path, context_length: int, too_long: int) -> None:
    """Raise a DataError where there are too few examples to hold one out."""
    if examples >= 2:
        return
    if too_long:
        raise DataError(
            f"'{path}' has {plural(examples, 'row')} to train on: in {too_long:,} nothing that counts is within the context of "
            f"{context_length} tokens. Shorten them, or take a model with a longer context."
        )
    raise DataError(f"'{path}' has {plural(examples, 'row')} to train on: at least two are needed, one is held out.")
