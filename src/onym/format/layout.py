"""How a tensor is divided among the ranks that wrote it: which rank has which chunk."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from blake3 import blake3

from onym.state.chunks import Chunk, Shape

MOST_COMPARED = 50_000_000
"""Pairs of chunks that are tested for an overlap, in one file."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A chunk of a tensor, and the rank that wrote it."""

    rank: int
    chunk: Chunk


def shard_name(tensor: str, shape: Shape, chunk: Chunk) -> str:
    """What a chunk is called in its file: ``weight[0:128,0:64]``; a full tensor has the tensor's name."""
    if chunk.sizes == shape:
        return tensor
    return f"{tensor}[{','.join(f'{start}:{end}' for start, end in zip(chunk.offsets, chunk.ends, strict=True))}]"


def rank_folder(rank: int) -> str:
    """Where a rank saves that saves for itself alone (``use_collectives=False``)."""
    return f"rank-{rank:05d}"


def shard_file(file: str, rank: int) -> str:
    """The file with a rank's shards of the tensors of ``file``."""
    return f"{file.removesuffix('.safetensors')}-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Layout:
    """The shards of a tensor, sorted by their offsets."""

    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: list[Shard]) -> Layout:
        """From shards in any order."""
        return cls(tuple(sorted(shards, key=lambda shard: (shard.chunk.offsets, shard.rank))))

    @cached_property
    def digest(self) -> str:
        """Equal for equal layouts."""
        return blake3(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """A list of ``[rank, [offsets], [sizes]]``."""
        return json.dumps([[shard.rank, shard.chunk.offsets, shard.chunk.sizes] for shard in self.shards])

    def overlapping(self, chunk: Chunk) -> Iterator[Shard]:
        """The shards that have elements of a chunk."""
        if not chunk.offsets:
            yield from self.shards
            return
        end = bisect_left(self._starts, chunk.offsets[0] + chunk.sizes[0])
        begin = bisect_left(self._starts, chunk.offsets[0] - self._longest)
        for shard in self.shards[begin:end]:
            if not shard.chunk.intersection(chunk).is_empty:
                yield shard

    @cached_property
    def _starts(self) -> list[int]:
        return [shard.chunk.offsets[0] for shard in self.shards]

    @cached_property
    def _longest(self) -> int:
        return max((shard.chunk.sizes[0] for shard in self.shards), default=0)

    def problem(self, shape: Shape, budget: list[int] | None = None, *, partial: bool = False) -> str | None:
        """Why the chunks do not make up a tensor of this shape: each has to be inside, none may overlap, none may be missing.

        Args:
            partial: some may be missing.
            budget: how many pairs may be compared yet, as a list of one number; it is counted down.

        Raises:
            ValueError: more pairs would have to be compared.
        """
        if not self.shards:
            return "has no chunks"
        for shard in self.shards:
            if len(shard.chunk.offsets) != len(shape) or len(shard.chunk.sizes) != len(shape):
                return "has a chunk with another number of dimensions"
            if not shard.chunk.is_within(shape):
                return "has a chunk that is outside of it"
        chunks = [shard.chunk for shard in self.shards if not shard.chunk.is_empty]
        covered, volume = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
        if covered < volume and not partial:
            return "is incomplete: its chunks do not cover it"
        return "has chunks that overlap" if covered > volume or _overlap(chunks, budget or [MOST_COMPARED]) else None


def _overlap(chunks: list[Chunk], budget: list[int]) -> bool:
    """Whether two chunks have an element in common.

    The chunks are sorted by the dimension with the most different offsets; each is compared with those that begin before it
    ends.
    """
    if len(chunks) < 2:
        return False
    if not chunks[0].offsets:
        return True  # a scalar has one chunk
    starts = np.array([chunk.offsets for chunk in chunks], dtype=np.int64)
    ends = starts + np.array([chunk.sizes for chunk in chunks], dtype=np.int64)
    sweep = max(range(starts.shape[1]), key=lambda dimension: len(np.unique(starts[:, dimension])))
    order = np.argsort(starts[:, sweep], kind="stable")
    starts, ends = starts[order], ends[order]
    until = np.searchsorted(starts[:, sweep], ends[:, sweep], side="left")
    numbers = np.arange(len(chunks))
    budget[0] -= int((until - numbers - 1).sum())
    if budget[0] < 0:
        raise ValueError("more chunks lie beside each other than are compared")
    for number in numbers[until > numbers + 1]:
        beside = slice(number + 1, until[number])
        if ((starts[beside] < ends[number]) & (ends[beside] > starts[number])).all(axis=1).any():
            return True
    return False
