"""From what each rank reports of a save -> the tensors of the checkpoint.

Two ways of reporting. Ranks that save the same objects know the same :class:`ShardTable`, and each reports one chunk for each
way in which tensors are divided, however many tensors there are. Everything else is reported chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from blake3 import blake3

from onym.format.chunk_index import ShardedTensor
from onym.format.layout import Layout, Shard
from onym.state.chunks import Chunk, Shape


@dataclass(frozen=True, slots=True)
class WrittenChunk:
    """A chunk that one rank has written, and the tensor it belongs to."""

    file: str
    """The file that the tensor would be in if one process had written it."""
    name: str
    dtype: str
    shape: Shape
    """Of the full tensor."""
    shard: Shard
    same_as: str = ""
    """The name of another tensor whose chunk is the same memory."""


@dataclass(frozen=True)
class ShardTable:
    """The tensors that several ranks save together, as each of them knows it by itself, and this rank's chunks."""

    tensors: dict[str, dict[str, tuple[str, Shape, int]]] = field(default_factory=dict)
    """By file and name: dtype, shape, and the number of the way in which it is divided."""
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    """By file: a further name of a tied tensor -> its first name."""
    chunks: dict[int, Chunk] = field(default_factory=dict)
    """By number: the chunk that this rank writes, if it writes one."""

    @cached_property
    def digest(self) -> str:
        """Equal where the tensors are equal."""
        return blake3(json.dumps(self.tensors).encode()).hexdigest()

    def assemble(self, chunks_of_ranks: Iterable[Mapping[int, Chunk]]) -> dict[str, dict[str, ShardedTensor]]:
        """The tensors, by file and name, from the chunks of rank 0, rank 1, …"""
        shards: dict[int, list[Shard]] = {}
        for rank, chunks in enumerate(chunks_of_ranks):
            for number, chunk in chunks.items():
                shards.setdefault(number, []).append(Shard(rank, chunk))
        layouts = {number: Layout.of(each) for number, each in shards.items()}
        tensors: dict[str, dict[str, ShardedTensor]] = {}
        for file, entries in self.tensors.items():
            aliases: dict[str, list[str]] = {}
            for alias, name in self.aliases.get(file, {}).items():
                aliases.setdefault(name, []).append(alias)
            tensors[file] = {
                name: ShardedTensor(dtype, shape, layouts.get(number, Layout(())), tuple(aliases.get(name, ())))
                for name, (dtype, shape, number) in entries.items()
                if name not in self.aliases.get(file, {})
            }
        return tensors


def assemble(written: Iterable[WrittenChunk]) -> dict[str, dict[str, ShardedTensor]]:
    """The tensors, by file and name. One whose chunks are all another tensor's memory is a further name of that one."""
    found: dict[tuple[str, str], list[WrittenChunk]] = {}
    for chunk in written:
        found.setdefault((chunk.file, chunk.name), []).append(chunk)
    layouts: dict[Layout, Layout] = {}
    tensors: dict[str, dict[str, ShardedTensor]] = {}
    aliases: dict[tuple[str, str], list[str]] = {}
    for (file, name), chunks in found.items():
        layout = Layout.of([chunk.shard for chunk in chunks])
        layout = layouts.setdefault(layout, layout)
        same_as = {chunk.same_as for chunk in chunks}
        first = tensors.get(file, {}).get(same_as.pop()) if len(same_as) == 1 else None
        if first is not None and first.layout is layout:
            aliases.setdefault((file, chunks[0].same_as), []).append(name)
        else:
            tensors.setdefault(file, {})[name] = ShardedTensor(chunks[0].dtype, chunks[0].shape, layout)
    for (file, name), names in aliases.items():
        entry = tensors[file][name]
        tensors[file][name] = ShardedTensor(entry.dtype, entry.shape, entry.layout, tuple(names))
    return tensors
