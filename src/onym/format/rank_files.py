"""A folder that several ranks write: each writes its own tensor files and reports, and rank 0 completes the folder.

Two ways of reporting. Ranks that save the same objects know the same :class:`ShardTable`, and each reports one chunk for each
way in which tensors are divided, however many tensors there are. Everything else is reported chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from blake3 import blake3
from torch import Tensor

from onym.errors import CheckpointError
from onym.format.chunk_index import CHUNKS, ChunkIndex, ShardedTensor
from onym.format.layout import Layout, Shard, shard_file, shard_name
from onym.format.manifest import FileEntry, Manifest, gc_paused, require_bounded_json
from onym.format.safetensors import dtype_name
from onym.format.stored import gather
from onym.format.tensor_writing import Progress
from onym.format.writer import About, encode_texts, write_manifest, write_tensor_files, write_texts
from onym.state.chunks import Chunk, Shape
from onym.storage.protocol import NewFolder


@dataclass(frozen=True)
class ChunkOf:
    """The tensor that values are a chunk of."""

    name: str
    shape: Shape
    chunk: Chunk


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


@dataclass(frozen=True)
class RankContent:
    """What one rank has to write."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """By the file that they would be in if one process wrote all, and by name."""
    chunks: Mapping[str, Mapping[str, ChunkOf]] = field(default_factory=dict)
    """For values that are not a full tensor of that name, by the same file and name."""
    table: ShardTable = field(default_factory=ShardTable)
    """The tensors that all ranks save together; they need no report of their own."""


@dataclass(frozen=True)
class RankReport:
    """What one rank has written."""

    files: dict[str, FileEntry]
    written: list[WrittenChunk]
    """Chunks of tensors that are not in the table."""
    chunks: dict[int, Chunk] = field(default_factory=dict)
    """Of the table; see :attr:`ShardTable.chunks`."""
    table: str = ""
    """The digest of the table."""


def write_rank_files(folder: NewFolder, rank: int, content: RankContent, progress: Progress | None = None) -> RankReport:
    """Write the files of one rank, durably, with the hashes in their headers.

    Args:
        folder: the folder that all ranks fill.
        rank: this one.
        content: its tensors.
        progress: see :data:`onym.format.tensor_writing.Progress`.
    """
    written: dict[tuple[str, str], WrittenChunk] = {}
    named: dict[str, dict[str, Tensor]] = {}
    for file, tensors in content.tensors.items():
        for key, values in tensors.items():
            of = content.chunks.get(file, {}).get(key) or ChunkOf(key, tuple(values.shape), Chunk.full(tuple(values.shape)))
            own, name = shard_file(file, rank), shard_name(of.name, of.shape, of.chunk)
            if (own, name) in written:
                raise CheckpointError(f"{name!r} is a tensor's name, and also that of a chunk of another one: rename it.")
            named.setdefault(own, {})[name] = values
            written[own, name] = WrittenChunk(file, of.name, dtype_name(values.dtype), of.shape, Shard(rank, of.chunk))
    with gc_paused():
        gathered = {name: gather(state) for name, state in named.items()}
    jobs = write_tensor_files(folder, gathered, progress, describe=True)
    for file, job in jobs.items():
        for alias, name in job.stored.aliases.items():
            written[file, alias] = replace(written[file, alias], same_as=written[file, name].name)
    unlisted = [chunk for chunk in written.values() if chunk.name not in content.table.tensors.get(chunk.file, {})]
    files = {name: job.entry for name, job in jobs.items()}
    return RankReport(files, unlisted, content.table.chunks, content.table.digest)


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


def complete_folder(
    folder: NewFolder, path: Path, reports: list[RankReport], index: ChunkIndex, texts: Mapping[str, str], about: About
) -> Manifest:
    """Write the texts, ``chunks.json``, and the manifest of a folder that all ranks have written their files of.

    Args:
        folder: with all of their files, durable.
        path: its place.
        reports: of all ranks.
        index: the tensors that they make up.
        texts, about: as in :func:`onym.format.writer.write_folder`.
    """
    files = {name: entry for report in reports for name, entry in report.files.items()}
    index.require_complete(f"'{path}'")
    with gc_paused():
        contents = encode_texts(path, texts) | {CHUNKS: index.to_json().encode()}
        require_bounded_json(contents[CHUNKS], f"'{path / CHUNKS}'")  # else it could not be read again
        identity = index.identity(files)
    files |= write_texts(folder, contents)
    return write_manifest(folder, path, Manifest(files, {}, identity=identity), about)
