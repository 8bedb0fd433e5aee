"""``chunks.json``: the tensors of a checkpoint that several ranks wrote, and which rank has which chunk of each.

The chunks are tensors of ordinary files, one file for each rank, with their hashes in its header; so one chunk is read and
checked without the others. Tensors that are divided alike share a layout, so the index grows with the tensors plus the ranks,
not with their product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from blake3 import blake3

from onym.errors import CheckpointError
from onym.format.layout import MOST_COMPARED, Layout, Shard, shard_file, shard_name
from onym.format.manifest import MODEL, FileEntry, Manifest, are_counts, malformed_is_damaged, parse_json
from onym.state.chunks import Chunk, Shape

CHUNKS = "chunks.json"


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor that is in the files of one or more ranks."""

    dtype: str
    shape: Shape
    layout: Layout
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkIndex:
    """The content of a ``chunks.json``."""

    tensors: dict[str, dict[str, ShardedTensor]]
    """By the file that they would be in if one process had written them, then by name."""
    objects: dict[str, Any] = field(default_factory=dict)
    """Values that are not tensors, as plain structures (:mod:`onym.state.tree`)."""
    prefix: str = ""
    """The prefix of the model's names in the state dict that was saved."""
    paths: dict[str, list[Any]] = field(default_factory=dict)
    """Full names -> the keys that lead to them in nested dicts."""
    partial: bool = False
    """One rank saved it for itself alone: the chunks that other ranks have of a tensor are not in it."""

    @cached_property
    def files(self) -> dict[str, str]:
        """The files with shards -> the files that they are shards of."""
        layouts = {(file, id(entry.layout)): entry.layout for file, named in self.tensors.items() for entry in named.values()}
        return {shard_file(file, shard.rank): file for (file, _), layout in layouts.items() for shard in layout.shards}

    @property
    def keys(self) -> list[str]:
        """The first keys of the state that was saved."""
        full = [(self.prefix if file == MODEL else "") + name for file, entries in self.tensors.items() for name in entries]
        names = [*self.objects, *(name for name in full if not self.is_inside(name))]
        return sorted({str(self.paths.get(name, [name])[0]) for name in names})

    def is_inside(self, name: str) -> bool:
        """Whether a tensor, by its full name, belongs to a value that is none: it comes with that."""
        return name not in self.paths and (bool(self.paths) or f"{name}.".startswith(self._beginnings))

    @cached_property
    def _beginnings(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.objects)

    def to_json(self) -> str:
        """The text of a ``chunks.json``, one tensor or layout a line."""
        numbers: dict[str, int] = {}
        texts: dict[int, str] = {}
        files = []
        for file, entries in self.tensors.items():
            lines = []
            for name, entry in entries.items():
                if id(entry.layout) not in texts:  # they are long, and many tensors have the same
                    texts[id(entry.layout)] = entry.layout.to_json()
                number = numbers.setdefault(texts[id(entry.layout)], len(numbers))
                values: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape, "layout": number}
                if entry.aliases:
                    values["aliases"] = entry.aliases
                lines.append(f"{json.dumps(name)}: {json.dumps(values)}")
            files.append(f"{json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n}")
        rest: dict[str, Any] = {"objects": self.objects, "prefix": self.prefix, "paths": self.paths}
        rest |= {"partial": True} if self.partial else {}
        layouts = '"layouts": [\n' + ",\n".join(numbers) + "\n],\n"
        return "{" + layouts + '"tensors": {' + ",\n".join(files) + "},\n" + json.dumps(rest, allow_nan=False)[1:] + "\n"

    @classmethod
    def read(cls, text: str, manifest: Manifest, source: str) -> ChunkIndex:
        """Parse a ``chunks.json`` and check it against itself and against the files of the checkpoint.

        Raises:
            CheckpointError: a shard is in none of the files, or the chunks of a tensor do not cover it.
        """
        values = parse_json(text, f"'{source}'")
        with malformed_is_damaged(f"'{source}'"):
            layouts = [Layout(tuple(_shard(*entry) for entry in entries)) for entries in values["layouts"]]
            tensors = {
                file: {name: _sharded_tensor(entry, layouts) for name, entry in entries.items()}
                for file, entries in values["tensors"].items()
            }
            for entries in tensors.values():
                aliases = [alias for entry in entries.values() for alias in entry.aliases]
                if len(set(aliases)) != len(aliases) or not entries.keys().isdisjoint(aliases):
                    raise ValueError("a tensor has a name that is another's")
            partial = values.get("partial", False) is True
            index = cls(tensors, dict(values["objects"]), str(values["prefix"]), dict(values["paths"]), partial)
            index.require_complete(f"'{source}' is damaged")
            missing = next((file for file in index.files if file not in manifest.files), None)
            if missing is not None:
                raise ValueError(f"it has chunks in {missing!r}, which is missing")
            return index

    def require_complete(self, what: str) -> None:
        """Check that the chunks of each tensor cover it, and that no two shards have one name.

        Raises:
            CheckpointError: begins with ``what``.
        """
        problems: dict[tuple[int, Shape], str | None] = {}
        budget = [MOST_COMPARED]
        for entries in self.tensors.values():
            for name, entry in entries.items():
                key = (id(entry.layout), entry.shape)
                if key not in problems:
                    try:
                        problems[key] = entry.layout.problem(entry.shape, budget, partial=self.partial)
                    except ValueError as error:
                        raise CheckpointError(f"{what}: {error}.") from error
                if problems[key]:
                    raise CheckpointError(f"{what}: {name!r} {problems[key]}.")
                if "[" in name:
                    tensor = name.rpartition("[")[0]
                    other = entries.get(tensor)
                    if other and any(shard_name(tensor, other.shape, shard.chunk) == name for shard in other.layout.shards):
                        raise CheckpointError(f"{what}: {name!r} is also the name of a chunk of {tensor!r}.")

    def identity(self, files: Mapping[str, FileEntry]) -> str:
        """Of the model: each tensor's layout, and the hashes of the headers that have the hashes of the chunks."""
        if MODEL not in self.tensors:
            return ""
        lines = []
        for name, entry in self.tensors[MODEL].items():
            about = f"{entry.dtype} {','.join(map(str, entry.shape))} {entry.layout.digest}"
            lines += [f"{len(each.encode())} {each} {about}\n" for each in (name, *entry.aliases)]
        headers = [f"{file} {files[file].blake3}\n" for file, of in self.files.items() if of == MODEL]
        return blake3("".join([*sorted(lines), *sorted(headers)]).encode()).hexdigest()


def _shard(rank: Any, offsets: Any, sizes: Any) -> Shard:
    if not are_counts((rank, *offsets, *sizes)):
        raise ValueError("a layout has something else than numbers")
    return Shard(rank, Chunk(tuple(offsets), tuple(sizes)))


def _sharded_tensor(entry: Mapping[str, Any], layouts: list[Layout]) -> ShardedTensor:
    dtype, shape, number = entry["dtype"], tuple(entry["shape"]), entry["layout"]
    if type(dtype) is not str or not are_counts((number, *shape)):
        raise ValueError(f"a tensor is {str(dict(entry))[:200]}")
    return ShardedTensor(dtype, shape, layouts[number], tuple(entry.get("aliases", ())))
