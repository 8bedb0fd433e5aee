"""Tensors that several ranks wrote chunks of; each is assembled when it is asked for, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onym.errors import CheckpointError
from onym.format.chunk_index import CHUNKS, ShardedTensor
from onym.format.layout import Shard, shard_file, shard_name
from onym.format.safetensors import dtype_called
from onym.format.tensors import Damage, TensorFile
from onym.state.chunks import Chunk

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ShardedFile(TensorFile):
    """The tensors that would be in one file if one process had written them.

    Args:
        path: of that file, which does not exist.
        entries: its tensors.
        open_file: opens a rank's file by its name.
    """

    def __init__(self, path: Path, entries: Mapping[str, ShardedTensor], open_file: Callable[[str], TensorFile]) -> None:
        super().__init__(
            path,
            {name: entry.shape for name, entry in entries.items()},
            {name: entry.dtype for name, entry in entries.items()},
            {alias: name for name, entry in entries.items() for alias in entry.aliases},
            {},
        )
        self._entries, self._open = entries, open_file

    def read_into(self, name: str, target: Tensor, chunk: Chunk | None = None, *, verify: bool = True) -> None:
        """As of any file; only the shards that have elements of the chunk are read and verified."""
        stored = self._stored_name(name)
        entry = self._entries[stored]
        chunk = Chunk.full(entry.shape) if chunk is None else chunk
        for shard in self._shards_of(stored, chunk):
            file, name_there = self.find(stored, shard)
            common = chunk.intersection(shard.chunk)
            place = target[common.relative_to(chunk).slices]
            file.read_into(name_there, place, common.relative_to(shard.chunk), verify=verify)

    def read_chunk(self, name: str, chunk: Chunk, dtype: torch.dtype, *, verify: bool = True) -> Tensor:
        """As of any file; before memory is taken, the files are checked to have shards of that size."""
        for shard in self._shards_of(name, chunk):
            self.find(name, shard)
        return super().read_chunk(name, chunk, dtype, verify=verify)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if len(entry.layout.shards) == 1 and entry.layout.shards[0].chunk.sizes == entry.shape:
            file, name_there = self.find(name, entry.layout.shards[0])
            full: Tensor = file.tensor(name_there, verify=False)
            return full
        dtype = dtype_called(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {entry.dtype}, which torch does not have.")
        return self.read_chunk(name, Chunk.full(entry.shape), dtype, verify=False)

    def _shards_of(self, name: str, chunk: Chunk) -> list[Shard]:
        """The shards with elements of a chunk, which have to be all of its elements."""
        shards = list(self._entries[name].layout.overlapping(chunk))
        if sum(math.prod(shard.chunk.intersection(chunk).sizes) for shard in shards) != math.prod(chunk.sizes):
            raise CheckpointError(
                f"'{self.path.parent}' holds only a part of {name}: one rank saved it for itself (use_collectives=False). "
                "dcp.load with onym.DCPReader loads it, on as many ranks."
            )
        return shards

    def find(self, name: str, shard: Shard) -> tuple[TensorFile, str]:
        """The file with a shard, and the shard's name in it.

        Raises:
            CheckpointError: the file does not have it as it is described.
        """
        entry = self._entries[name]
        file = self._open(shard_file(self.path.name, shard.rank))
        stored = shard_name(name, entry.shape, shard.chunk)
        stored = file.aliases.get(stored, stored)
        if file.shapes.get(stored) != shard.chunk.sizes or file.dtypes.get(stored) != entry.dtype:
            raise CheckpointError(
                f"'{file.path}' is damaged: it does not hold the chunk {stored!r} as '{CHUNKS}' describes it."
            )
        return file, stored

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        wanted: dict[str, tuple[TensorFile, dict[str, None]]] = {}
        for name in names:
            for shard in self._entries[name].layout.shards:
                file, name_there = self.find(name, shard)
                wanted.setdefault(file.path.name, (file, {}))[1][name_there] = None
        for file, shards in wanted.values():  # each file knows which were verified, and whether it has changed since
            yield from file.unverified(list(shards), reused=reused)
