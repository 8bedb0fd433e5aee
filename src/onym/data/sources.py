"""What a run is trained on: one tokenised corpus, or several in fixed shares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from onym.data.batches import Batch, StreamWindows, Windows, evaluation_batches
from onym.data.packing import PackedWindows
from onym.data.tokens import TokenData, open_tokens, relink_cache
from onym.errors import DataError


@dataclass(frozen=True)
class Source:
    """A tokenised corpus, and how much of a run comes from it."""

    name: str
    weight: float
    tokens: TokenData
    skipped: tuple[tuple[str, str], ...] = ()
    """Files that could not be read, and why."""


@dataclass(frozen=True)
class Sources:
    """All of a run, in order."""

    sources: tuple[Source, ...]

    @property
    def mixed(self) -> bool:
        """Whether there are several."""
        return len(self.sources) > 1

    @cached_property
    def key(self) -> str:
        """A hash of the text, the tokenizer and the shares."""
        return key_of([(source.name, source.weight, source.tokens.path.name) for source in self.sources])

    @property
    def training_tokens(self) -> int:
        """Of all sources together."""
        return sum(len(source.tokens.train) for source in self.sources)

    @property
    def held_out_tokens(self) -> int:
        """Of all sources together."""
        return sum(len(source.tokens.held_out) for source in self.sources)

    @property
    def weights(self) -> list[float]:
        """Of the sources; together 1."""
        return [weight for _, weight in self._shared()]

    @property
    def shares(self) -> dict[str, float]:
        """Of the tokens that are trained on, by the names of the sources."""
        return {source.name: weight for source, weight in self._shared()}

    def windows(self, context_length: int, batch_size: int, description: str, padding: int | None = None) -> list[Windows]:
        """What to train on.

        Args:
            context_length: tokens in a window.
            batch_size: the fewest windows that are of use.
            description: what an error calls the text.
            padding: the token that pads windows of whole documents; None for windows cut from the stream.

        Raises:
            DataError: a source is too short.
        """
        windows: list[Windows] = []
        for source in self.sources:
            stream = source.tokens.train
            windows.append(
                StreamWindows(stream, context_length) if padding is None else PackedWindows(stream, context_length, padding)
            )
            needed = 1 if self.mixed else batch_size
            if len(windows[-1]) < needed:
                name = f"The source '{source.name}' of --mix" if self.mixed else description
                size = f"one window of {context_length}" if self.mixed else f"one batch of {batch_size} x {context_length}"
                if padding is not None:
                    size += f", packed as {len(windows[-1]):,} windows of whole documents"
                raise DataError(
                    f"{name} has {len(source.tokens.train):,} tokens to train on, fewer than {size} (and one more): add text "
                    f"to {'it' if self.mixed else '--data'}, or lower --batch-size or --context-length."
                )
        return windows

    def held_out_batches(self, context_length: int, batch_size: int, limit: int) -> list[tuple[str, Iterator[Batch]]]:
        """Of each source, by name: at most its part of ``limit`` batches of its held-out text, the same each time."""
        each = max(1, limit // len(self.sources))
        return [
            (source.name, evaluation_batches(source.tokens.held_out, context_length, batch_size, each))
            for source in self.sources
        ]

    def epochs(self, sequences: int, windows: Sequence[Windows]) -> dict[str, float]:
        """How often a run of so many sequences goes through each source."""
        return {
            source.name: sequences * weight / len(its_windows)
            for (source, weight), its_windows in zip(self._shared(), windows, strict=True)
        }

    @property
    def skipped_files(self) -> list[dict[str, str]]:
        """Those that could not be read, each with its name and the reason."""
        return [{"name": name, "reason": reason} for source in self.sources for name, reason in source.skipped]

    def relink(self, tokenizer_json: str) -> None:
        """Write tokens again that were deleted while they are mapped.

        Raises:
            StorageError: they cannot be written.
        """
        for source in self.sources:
            relink_cache(source.tokens, tokenizer_json)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON values, for run.json and for another process."""
        return [{"name": s.name, "weight": s.weight, "token_cache": str(s.tokens.path)} for s in self.sources]

    @classmethod
    def open(cls, values: Sequence[Mapping[str, Any]]) -> Sources:
        """What :meth:`to_list` gave; the tokens are there."""
        sources = []
        for value in values:
            tokens = open_tokens(Path(value["token_cache"]))
            assert tokens is not None, "the token cache is gone"
            sources.append(Source(value["name"], value["weight"], tokens))
        return cls(tuple(sources))

    def _shared(self) -> list[tuple[Source, float]]:
        total = sum(source.weight for source in self.sources)
        return [(source, source.weight / total) for source in self.sources]


def key_of(parts: Sequence[tuple[str, float, str]]) -> str:
    """:attr:`Sources.key` of sources by their names, weights and the names of their token folders."""
    if len(parts) == 1:
        return parts[0][2]
    total = sum(weight for _, weight, _ in parts)
    shared = [[name, weight / total, folder] for name, weight, folder in parts]
    return blake3(json.dumps(shared).encode()).hexdigest()[:32]
