"""Which chunks this rank writes of the tensors that several ranks save together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from onym.format.rank_files import ChunkOf, ShardTable
from onym.format.safetensors import dtype_name
from onym.state.chunks import Chunk
from onym.state.collectives import all_gather_object, get_rank, get_world_size
from onym.state.dtensor import full_tensor, has_chunks, local, local_chunk, sharding_key, writes_chunk
from onym.state.model import tensor_identity


class ShardPlan:
    """Each rank finds the same table, without asking another."""

    def __init__(self) -> None:
        self.chunks: dict[str, dict[str, ChunkOf]] = {}
        """Of the tensors that are a chunk of one, by file and name."""
        self.table = ShardTable()
        self._numbers: dict[Any, int] = {}
        self._meshes: dict[Any, int] = {}
        self._has_partial_meshes = False

    def add(self, file: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Add the tensors of a file; returns what this rank writes of them. Rank 0 writes what is not sharded."""
        own: dict[str, Any] = {}
        first: dict[Any, tuple[int, str]] = {}
        rows = self.table.tensors.setdefault(file, {})
        for at, (name, value) in enumerate(tensors.items()):
            turn, stored = first.setdefault(_memory_of(value) or name, (at, name))  # one rank writes all of a tied tensor
            if stored != name:
                self.table.aliases.setdefault(file, {})[name] = stored
            shape = tuple(value.shape)
            key = sharding_key(value, turn)
            if key is None:
                value = full_tensor(value)  # of what is sharded in another way; a collective
            else:
                self._has_partial_meshes |= key[0].size() != get_world_size()
                # Meshes by the order in which they appear: another rank may be in another one, at the same place.
                key = (self._meshes.setdefault(key[0], len(self._meshes)), *key[1:])
            number = self._numbers.setdefault((shape, key), len(self._numbers))
            rows[name] = (dtype_name(value.dtype), shape, number)
            chunk = self.table.chunks.get(number) or _own_chunk(value, key is not None, turn)
            if chunk is None:
                continue
            self.table.chunks[number] = chunk
            own[name] = local(value)
            if chunk.sizes != shape:
                self.chunks.setdefault(file, {})[name] = ChunkOf(name, shape, chunk)
        return own

    def drop_duplicates(self, own: Mapping[str, dict[str, Any]]) -> None:
        """Drop from ``own`` what a lower rank writes too: ranks of different meshes do not know of each other."""
        if not self._has_partial_meshes:
            return
        lower = all_gather_object(self.table.chunks)[: get_rank()]
        for number, chunk in list(self.table.chunks.items()):
            if any(chunks.get(number) == chunk for chunks in lower):
                del self.table.chunks[number]
                for file, rows in self.table.tensors.items():
                    for name, (_, _, of) in rows.items():
                        if of == number:
                            own[file].pop(name, None)


def _own_chunk(value: Tensor, is_sharded: bool, turn: int) -> Chunk | None:
    if not is_sharded or value.numel() == 0:
        return Chunk.full(tuple(value.shape)) if get_rank() == 0 else None
    chunk = local_chunk(value)
    return None if chunk.is_empty or not writes_chunk(value, turn) else chunk


def _memory_of(value: Tensor) -> Any:
    """Equal for tied tensors, also in a rank that has no elements of them; None where it cannot be known."""
    own = local(value)
    if own.numel() == 0 and has_chunks(value):
        return own.untyped_storage()._cdata, tuple(value.shape)
    return tensor_identity(value)
