"""A storage reader for ``dcp.load``: what ``onym.DCPWriter`` wrote, other folders of Onym's, and those of torch's own writer.

It is here and not beside the writer because it reads another program's files too: so a run switches to Onym in mid-flight.
Nothing of a folder is executed: a ``.metadata`` is read with stand-ins, objects with ``weights_only``.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from onym.checkpoint.dcp import StoredChunk, stored_chunks
from onym.convert.dcp_folder import METADATA, open_distributed
from onym.errors import CheckpointError, ConfigError
from onym.format.chunk_index import ChunkIndex, ShardedTensor
from onym.format.layout import Layout, Shard, rank_folder
from onym.format.manifest import MANIFEST, MODEL, gc_paused
from onym.format.reader import read_checkpoint
from onym.format.safetensors import dtype_called, dtype_name
from onym.format.sharded_file import ShardedFile
from onym.state.chunks import Chunk
from onym.state.tree import unflatten
from onym.storage.paths import as_path
from onym.storage.threads import WORKERS, run_in_threads

_FOR_ONE_THREAD = 64 << 10  # bytes a tensor: of smaller ones Python itself is most of the work
_PLANNER_METHODS = ("resolve_tensor", "commit_tensor")

ReadInto = Callable[[Tensor, Chunk], None]
"""Reads a region of a stored chunk into a tensor of its size."""


class _Folder:
    """A folder of Onym's."""

    def __init__(self, path: Path, verify: bool) -> None:
        self._verify, self._opened = verify, read_checkpoint(path)
        if self._opened.manifest is None:
            raise CheckpointError(f"'{path}' is one file, not a folder: onym.load(path, into=model) loads it.")

    @cached_property
    def _index(self) -> ChunkIndex:
        """In a checkpoint of one process each tensor has one chunk."""
        if self._opened.chunk_index is not None:
            return self._opened.chunk_index
        model = self._opened.model
        aliases = {name: tuple(alias for alias, stored in model.aliases.items() if stored == name) for name in model.shapes}
        tensors = {
            name: ShardedTensor(model.dtypes[name], shape, Layout((Shard(0, Chunk.full(shape)),)), aliases[name])
            for name, shape in model.shapes.items()
        }
        return ChunkIndex({MODEL: tensors})

    @cached_property
    def _names(self) -> dict[str, tuple[str, str]]:
        """Full names of tensors, as in the state that was saved -> their file and name there."""
        return {
            (self._index.prefix if file == MODEL else "") + each: (file, name)
            for file, entries in self._index.tensors.items()
            for name, entry in entries.items()
            for each in (name, *entry.aliases)
        }

    @property
    def is_partial(self) -> bool:
        """Whether other ranks saved other parts of the tensors."""
        return self._index.partial

    def metadata(self) -> Metadata:
        """What is in it, for a planner. Tensors inside of objects are not listed: they come with those."""
        index, described = self._index, dict[str, Any]()
        for full, (file, name) in self._names.items():
            if not index.is_inside(full):
                entry = index.tensors[file][name]
                chunks = [shard.chunk for shard in entry.layout.shards]
                described[full] = _described(f"{name} in '{self._opened.path}'", entry.dtype, entry.shape, chunks)
        described |= {name: BytesStorageMetadata() for name in index.objects}
        paths = {name: tuple(path) for name, path in index.paths.items()}
        return Metadata(described, paths or {name: (name,) for name in described}, stored_chunks(index))

    def reads(self, stored: StoredChunk, index: MetadataIndex) -> tuple[str, ReadInto]:
        """The dtype of a chunk, and what reads of it."""
        file, name = self._opened.tensors(stored.file), stored.name
        if isinstance(file, ShardedFile):
            assert stored.shard is not None
            file, name = file.find(name, stored.shard)
        return file.dtypes[name], lambda target, chunk: file.read_into(name, target, chunk, verify=self._verify)

    def value(self, name: str) -> Any:
        """An object."""

        def read(_: str, place: Any) -> Tensor:
            value: Tensor = self._opened.tensors(place[0]).tensor(place[1], verify=self._verify).clone()
            return value

        names: Any = self._names
        return unflatten(self._index.objects[name], names, read)


class _TorchsFolder:
    """One of torch's own writer."""

    def __init__(self, path: Path, rank: int | None) -> None:
        self.is_partial = rank is not None
        self._file = open_distributed(path, METADATA if rank is None else f"__{rank}{METADATA}", partial=self.is_partial)

    def metadata(self) -> Metadata:
        """As of Onym's own."""
        file = self._file
        described: dict[str, Any] = {
            name: _described(f"{name} in '{file.path}'", file.dtypes[name], file.shapes[name], [each.chunk for each in chunks])
            for name, chunks in file.chunks.items()
        }
        where = {
            MetadataIndex(name, each.chunk.offsets): StoredChunk(each.file) for name, of in file.chunks.items() for each in of
        }
        where |= {MetadataIndex(name): StoredChunk(each.file) for name, each in file.objects.items()}
        return Metadata(described | {name: BytesStorageMetadata() for name in file.objects}, file.paths, where)

    def reads(self, stored: StoredChunk, index: MetadataIndex) -> tuple[str, ReadInto]:
        """As of Onym's own."""

        def read(target: Tensor, chunk: Chunk) -> None:
            target.copy_(self._file.chunk(index.fqn, tuple(index.offset or (0,) * target.dim()))[chunk.slices])

        return self._file.dtypes[index.fqn], read

    def value(self, name: str) -> Any:
        """An object: plain values and tensors, or of a class that torch.serialization.safe_globals allows."""
        return self._file.value(name)


@dataclass(slots=True)
class _Read:
    """A region of a stored chunk, and where it goes."""

    into: ReadInto
    target: Tensor
    item: ReadItem
    casts_from: str | None

    def run(self) -> str | None:
        """Read it; returns its name if values became infinite in a smaller dtype."""
        chunk = Chunk(tuple(self.item.storage_offsets), tuple(self.item.lengths))
        self.into(self.target, chunk)
        if self.casts_from is None or not self.target.is_floating_point() or not self.target.isinf().any():
            return None
        source = torch.empty_like(self.target, dtype=dtype_called(self.casts_from), device="cpu")
        self.into(source, chunk)
        overflows = source.is_floating_point() and bool((source.isfinite() & self.target.cpu().isinf()).any())
        return self.item.dest_index.fqn if overflows else None


class DCPReader(StorageReader):
    """For ``dcp.load(state, storage_reader=DCPReader(path))``: what :class:`onym.DCPWriter` wrote, with any number of ranks.

    Checkpoints of one process (``onym.save``, ``onym train``) are read too: the model's tensors, under their names. So are
    folders of torch's own writer, without executing any of their content.

    Args:
        path: the checkpoint's folder.
        dtype: ``"exact"`` refuses a tensor of another dtype than the stored one, ``"cast"`` converts.
        verify: check each chunk against its hash before it is used, where it has one.

    Raises:
        CheckpointError: it is missing or damaged. ``dcp.load`` raises its own ``CheckpointException`` with it, everywhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, dtype: str = "exact", verify: bool = True) -> None:
        super().__init__()
        if dtype not in ("exact", "cast"):
            raise ConfigError(f'dtype is "exact" or "cast", not {dtype!r}.')
        self.path = None if path is None else as_path(path)
        self.load_id = secrets.token_hex(8)
        self.storage_data: dict[MetadataIndex, StoredChunk] = {}
        self._cast, self._verify = dtype == "cast", verify
        self._source: _Folder | _TorchsFolder | None = None

    @property
    def checkpoint_id(self) -> Path | None:
        """Where it is read."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load."""
        if checkpoint_id is not None and checkpoint_id != "":
            self.path = as_path(checkpoint_id)
        self.load_id, self.storage_data, self._source = secrets.token_hex(8), {}, None

    @gc_paused()
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and objects of the checkpoint as it is now, for a planner; of one rank's own, given ``rank=``."""
        self._source = self._open(kwargs.get("rank"))
        metadata = self._source.metadata()
        metadata.storage_meta = StorageMeta(self.path, load_id=self.load_id)
        self.storage_data = metadata.storage_data
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Each rank opens the files that it needs."""
        self.storage_data = metadata.storage_data or self.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    @gc_paused()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, from the shards that have it."""
        source = self._source
        assert source is not None
        if source.is_partial:
            self._require_all(plan, planner)
        reads: dict[int, list[_Read]] = {}
        overflowed: list[str | None] = []
        plain = not any(getattr(type(planner), each) is not getattr(DefaultLoadPlanner, each) for each in _PLANNER_METHODS)
        for item in plan.items:
            name, offset = item.storage_index.fqn, item.storage_index.offset
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _pickled(source.value(name)))
                continue
            target = planner.resolve_tensor(item).detach()
            index = MetadataIndex(name, (0,) * target.dim() if offset is None else offset)
            dtype, into = source.reads(self.storage_data[index], index)
            other = dtype != dtype_name(target.dtype)
            if other and not self._cast:
                raise CheckpointError(
                    f"{name} is {dtype} in '{self.path}' and {dtype_name(target.dtype)} here: "
                    'DCPReader(path, dtype="cast") converts it.'
                )
            read = _Read(into, target, item, dtype if other else None)
            if plain:
                # Targets that share memory are read in order.
                reads.setdefault(target.untyped_storage().data_ptr(), []).append(read)
            else:  # it may give the same memory for each
                overflowed.append(read.run())
                planner.commit_tensor(item, target)
        overflowed += _read_in_threads(list(reads.values()))
        if names := sorted({name for name in overflowed if name is not None}):
            warnings.warn(
                f"Values became infinite in the smaller dtype of {len(names)} tensors ({', '.join(names[:3])}): load into "
                "bfloat16 or float32.",
                stacklevel=2,
            )
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path may be one."""
        return True

    def _open(self, rank: int | None) -> _Folder | _TorchsFolder:
        path = self.path
        if path is None:
            raise ConfigError("Where is it? DCPReader(path), or dcp.load(…, checkpoint_id=path).")
        if rank is not None:
            if (path / f"__{rank}{METADATA}").is_file():
                return _TorchsFolder(path, rank)
            if not (path / rank_folder(rank) / MANIFEST).is_file():
                raise CheckpointError(f"'{path}' holds nothing that rank {rank} saved for itself.")
            return _Folder(path / rank_folder(rank), self._verify)
        if (path / rank_folder(0)).is_dir() and not (path / MANIFEST).exists():
            raise CheckpointError(f"'{path}' holds what each rank saved for itself (use_collectives=False).")
        if (path / METADATA).is_file() and not (path / MANIFEST).exists():
            return _TorchsFolder(path, None)
        return _Folder(path, self._verify)

    def _require_all(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Refuse tensors of which this rank asks for more than it had saved: the rest would be what it was."""
        planned: dict[str, int] = {}
        for item in plan.items:
            planned[item.dest_index.fqn] = planned.get(item.dest_index.fqn, 0) + math.prod(item.lengths)
        for name, value in getattr(planner, "state_dict", {}).items():
            if isinstance(value, Tensor):
                wanted = sum(math.prod(chunk.sizes) for chunk in _create_chunk_list(value))
                if planned.get(name, 0) != wanted:
                    raise CheckpointError(
                        f"'{self.path}' has of {name} on this rank another part than is asked for: each rank saved for itself "
                        "(use_collectives=False), so load with as many ranks and the same sharding."
                    )


def _described(what: str, dtype: str, shape: tuple[int, ...], chunks: list[Chunk]) -> TensorStorageMetadata:
    known = dtype_called(dtype)
    if known is None:
        raise CheckpointError(f"{what} has the dtype {dtype}, which torch {torch.__version__} does not have.")
    places = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=known), torch.Size(shape), places)


def _pickled(value: Any) -> io.BytesIO:
    """An object as a planner takes it: as a pickle, in memory."""
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return content


def _read_in_threads(groups: list[list[_Read]]) -> list[str | None]:
    """Each thread a group at a time, if there is enough to read; returns what each read returns."""
    inference = torch.is_inference_mode_enabled()
    mean = sum(read.target.nbytes for group in groups for read in group) // max(len(groups), 1)
    threads = min(WORKERS, len(groups)) if mean > _FOR_ONE_THREAD else 1
    overflowed: list[str | None] = []

    def work(number: int) -> None:
        with torch.inference_mode(inference):  # each thread has its own
            for group in groups[number::threads]:
                overflowed.extend([read.run() for read in group])

    run_in_threads(work, threads)
    return overflowed
