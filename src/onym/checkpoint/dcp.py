"""Our format behind ``torch.distributed.checkpoint``: a storage writer and reader for ``dcp.save`` and ``dcp.load``.

DCP's planner says which rank has which chunk; each rank writes its chunks into a file of its own, hashed, and fsyncs it; then
the coordinator writes the manifest and renames the folder. So a checkpoint exists completely or not at all, whichever rank
fails, and the one before stays. No pickle is written: values that are not tensors are stored as JSON.

    dcp.save(state, storage_writer=onym.DCPWriter("step-100"))
    dcp.load(state, storage_reader=onym.DCPReader("step-100"))
"""

from __future__ import annotations

import io
import itertools
import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from onym.errors import CheckpointError, ConfigError, StorageError, storage_error
from onym.format.chunk_index import ChunkIndex, ShardedTensor
from onym.format.layout import Layout, Shard
from onym.format.manifest import MANIFEST, MODEL, gc_paused
from onym.format.rank_files import ChunkOf, RankContent, RankReport, assemble, complete_folder, write_rank_files
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.safetensors import dtype_called, dtype_name
from onym.format.sharded_file import ShardedFile
from onym.format.tensors import TensorFile
from onym.format.writer import NOTHING, require_replaceable
from onym.state.chunks import Chunk
from onym.state.tree import flatten, unflatten
from onym.storage.local import LocalFolder, new_folder
from onym.storage.paths import as_path, is_local
from onym.storage.threads import WORKERS, run_in_threads

STATE = "state.safetensors"
"""The file of tensors outside of the model: an optimizer's, and those inside of other objects."""
_MODEL_KEY = "model"
_FOR_ONE_THREAD = 64 << 10  # bytes a tensor: of smaller ones Python itself is most of the work
_PLANNER_METHODS = ("resolve_tensor", "commit_tensor")


@dataclass(frozen=True)
class _Place:
    """What the coordinator sends to each rank: its number, and the folder that is being written."""

    rank: int
    folder: str


@dataclass(frozen=True)
class _Report:
    """What a rank sends to the coordinator, with the first item that it has written."""

    files: RankReport
    objects: Mapping[str, Any]
    """Values that are not tensors, as plain structures."""


@dataclass(slots=True)
class _Read:
    """A chunk of a stored tensor, and where it goes."""

    file: TensorFile
    name: str
    target: torch.Tensor
    item: ReadItem

    def run(self, verify: bool) -> None:
        chunk = Chunk(tuple(self.item.storage_offsets), tuple(self.item.lengths))
        self.file.read_into(self.name, self.target, chunk, verify=verify)


class DCPWriter(StorageWriter):
    """For ``dcp.save(state, storage_writer=DCPWriter(path))``: durable, hashed, atomic, without pickle.

    Where the state is ``{"model": …, "optimizer": …}``, or a model's own state dict, ``onym.load(path, into=model)``,
    ``onym.open_checkpoint``, ``onym inspect``, ``verify`` and ``convert`` open what it writes, in one process and without
    torch.distributed.

    Args:
        path: the checkpoint's folder, on a disk that all ranks share; ``checkpoint_id`` of ``dcp.save`` by default. One that
            is there is replaced, when the new one is complete.

    Raises:
        CheckpointError: a value in the state is neither a tensor nor made of plain values; nothing is written.
        StorageError: a disk refused, on any rank. ``dcp.save`` raises its own ``CheckpointException`` with it, on all.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._path = None if path is None else _on_a_disk(path)
        self._folder: LocalFolder | None = None
        """The folder that is being written, in the coordinator."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save."""
        if checkpoint_id is not None and checkpoint_id != "":
            self._path = _on_a_disk(checkpoint_id)
        if self._path is None:
            raise ConfigError("Where shall it be? DCPWriter(path), or dcp.save(…, checkpoint_id=path).")
        self._discard()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the rank that plans for all is the one that commits."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add to the planner's."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, in the coordinator, and tell the other ranks where it is."""
        path = self._required_path()
        require_replaceable(path)
        commit = ExitStack()
        items = [item for plan in plans for item in plan.items if item.tensor_data is not None]
        needed = sum(_nbytes(item) for item in items)
        folder = commit.enter_context(new_folder(path, MANIFEST, needed))
        self._folder, self._commit = folder, commit
        # If a rank fails nothing is called here any more: the folder is deleted with this object.
        self._finalizer = weakref.finalize(self, _discard, commit)
        return [replace(plan, storage_data=_Place(rank, str(folder.path))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the chunks of this rank, durably."""
        place: _Place = plan.storage_data
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        chunks: dict[str, dict[str, ChunkOf]] = {}
        objects: dict[str, Any] = {}
        paths = getattr(planner, "mappings", None) or {}
        in_model = _names_in_model([*(item.index.fqn for item in plan.items), *paths], paths)
        for item in plan.items:
            fqn = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                found, objects[fqn] = flatten(_object(item, planner), fqn)
                tensors.setdefault(STATE, {}).update(found)
                continue
            assert item.tensor_data is not None
            value = planner.resolve_data(item)
            assert isinstance(value, torch.Tensor)
            file, name = (MODEL, in_model[fqn]) if fqn in in_model else (STATE, fqn)
            chunk = Chunk(tuple(item.tensor_data.chunk.offsets), tuple(value.shape))
            key = f"{name}@{chunk.offsets}"  # one rank may have several
            tensors.setdefault(file, {})[key] = value.detach()
            chunks.setdefault(file, {})[key] = ChunkOf(name, tuple(item.tensor_data.size), chunk)
        if not Path(place.folder).is_dir():
            raise StorageError(
                f"'{self._required_path()}' is not seen by all ranks as the same folder: choose one on a disk that all "
                "machines share, and leave enable_plan_caching off."
            )
        folder = self._folder or LocalFolder(Path(place.folder))
        try:
            files = write_rank_files(folder, place.rank, RankContent(tensors, chunks))
        except OSError as error:
            raise storage_error("write", self._required_path(), error) from error
        finally:
            if folder is not self._folder:
                folder.close()
        reports = itertools.chain([_Report(files, objects)], itertools.repeat(None))
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(item.index, _nbytes(item) if item.tensor_data else 0, report)
                for item, report in zip(plan.items, reports, strict=False)
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, in the coordinator, after all ranks have written."""
        folder = self._folder
        assert folder is not None
        reports: list[_Report] = [each.storage_data for result in results for each in result if each.storage_data is not None]
        paths = {name: list(path) for name, path in (metadata.planner_data or {}).items()}
        in_model = _names_in_model(list(metadata.state_dict_metadata), paths)
        tensors = assemble(chunk for report in reports for chunk in report.files.written)
        if MODEL not in tensors:
            raise CheckpointError(
                "There is no model in what is to be saved: pass its state dict itself, or as {'model': …} beside the others."
            )
        objects = {name: structure for report in reports for name, structure in report.objects.items()}
        prefix = f"{_MODEL_KEY}." if any(fqn != name for fqn, name in in_model.items()) else ""
        index = ChunkIndex(tensors, objects, prefix, paths)
        try:
            complete_folder(folder, self._required_path(), [report.files for report in reports], index, {}, NOTHING)
            self._folder = None
            self._finalizer.detach()
            self._commit.close()
        except OSError as error:
            raise storage_error("write", self._required_path(), error) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a folder on a disk."""
        return is_local(as_path(checkpoint_id))

    def _required_path(self) -> Path:
        assert self._path is not None
        return self._path

    def _discard(self) -> None:
        if self._folder is not None:
            self._finalizer()
            self._folder = None


class DCPReader(StorageReader):
    """For ``dcp.load(state, storage_reader=DCPReader(path))``: what :class:`DCPWriter` wrote, with any number of ranks.

    Checkpoints of one process (``onym.save``, ``onym train``) are read too: the model's tensors, under their names.

    Args:
        path: the checkpoint's folder.
        dtype: ``"exact"`` refuses a tensor of another dtype than the stored one, ``"cast"`` converts.
        verify: check each chunk against its hash before it is used.

    Raises:
        CheckpointError: it is missing or damaged. ``dcp.load`` raises its own ``CheckpointException`` with it, everywhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, dtype: str = "exact", verify: bool = True) -> None:
        super().__init__()
        if dtype not in ("exact", "cast"):
            raise ConfigError(f'dtype is "exact" or "cast", not {dtype!r}.')
        self._path = None if path is None else as_path(path)
        self._cast, self._verify = dtype == "cast", verify
        self._checkpoint: Checkpoint | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load."""
        if checkpoint_id is not None and checkpoint_id != "":
            self._path = as_path(checkpoint_id)
        if self._path is None:
            raise ConfigError("Where is it? DCPReader(path), or dcp.load(…, checkpoint_id=path).")
        self._checkpoint = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and objects of the checkpoint, for a planner."""
        opened, index = self._opened(), self._index()
        described: dict[str, Any] = {}
        for file, entries in index.tensors.items():
            for name, entry in entries.items():
                dtype = dtype_called(entry.dtype)
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in '{opened.path}' has the dtype {entry.dtype}, which torch {torch.__version__} does not have."
                    )
                chunks = [
                    ChunkStorageMetadata(torch.Size(shard.chunk.offsets), torch.Size(shard.chunk.sizes))
                    for shard in entry.layout.shards
                ]
                for each in (name, *entry.aliases):
                    full = index.prefix + each if file == MODEL else each
                    properties = TensorProperties(dtype=dtype)
                    described[full] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        described |= {name: BytesStorageMetadata() for name in index.objects}
        paths = {name: tuple(path) for name, path in index.paths.items()}
        return Metadata(described, planner_data=paths or {name: (name,) for name in described})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: each rank opens the files that it needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    @gc_paused()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, from the shards that have it."""
        index = self._index()
        shards = {
            ((index.prefix if file == MODEL else "") + each, shard.chunk.offsets): (file, name, shard)
            for file, entries in index.tensors.items()
            for name, entry in entries.items()
            for each in (name, *entry.aliases)
            for shard in entry.layout.shards
        }
        reads: dict[int, list[_Read]] = {}
        plain = not any(getattr(type(planner), each) is not getattr(DefaultLoadPlanner, each) for each in _PLANNER_METHODS)
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._pickled(index.objects[name]))
                continue
            target = planner.resolve_tensor(item).detach()
            offsets = tuple(item.storage_index.offset) if item.storage_index.offset is not None else (0,) * target.dim()
            file, stored = self._find(*shards[name, offsets])
            if not self._cast and file.dtypes[stored] != dtype_name(target.dtype):
                raise CheckpointError(
                    f"{name} is {file.dtypes[stored]} in '{self._opened().path}' and {dtype_name(target.dtype)} here: "
                    'DCPReader(path, dtype="cast") converts it.'
                )
            read = _Read(file, stored, target, item)
            if plain:
                # Targets that share memory are read in order.
                reads.setdefault(target.untyped_storage().data_ptr(), []).append(read)
            else:  # it may give the same memory for each
                read.run(self._verify)
                planner.commit_tensor(item, target)
        self._read_in_threads(list(reads.values()))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _pickled(self, structure: Any) -> io.BytesIO:
        """A stored object as a planner takes it: as a pickle, in memory. Its tensors are read when they are asked for."""
        opened = self._opened()
        names: dict[str, Any] = {name: name for name in (opened.tensors(STATE).names if STATE in opened.holds else ())}

        def read(_: str, name: Any) -> torch.Tensor:
            value: torch.Tensor = opened.tensors(STATE).tensor(name, verify=self._verify).clone()
            return value

        content = io.BytesIO()
        torch.save(unflatten(structure, names, read), content)
        content.seek(0)
        return content

    def _read_in_threads(self, groups: list[list[_Read]]) -> None:
        """Each thread a group at a time, if there is enough to read."""
        inference = torch.is_inference_mode_enabled()
        mean = sum(read.target.nbytes for group in groups for read in group) // max(len(groups), 1)
        threads = min(WORKERS, len(groups)) if mean > _FOR_ONE_THREAD else 1

        def work(number: int) -> None:
            with torch.inference_mode(inference):  # each thread has its own
                for group in groups[number::threads]:
                    for read in group:
                        read.run(self._verify)

        run_in_threads(work, threads)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path may be one."""
        return True

    def _opened(self) -> Checkpoint:
        if self._checkpoint is None:
            assert self._path is not None
            self._checkpoint = read_checkpoint(self._path)
            if self._checkpoint.manifest is None:
                raise CheckpointError(f"'{self._path}' is one file, not a folder: onym.load(path, into=model) loads it.")
        return self._checkpoint

    def _find(self, file: str, name: str, shard: Shard) -> tuple[TensorFile, str]:
        """The file with a shard, and the shard's name in it."""
        opened = self._opened().tensors(file)
        return opened.find(name, shard) if isinstance(opened, ShardedFile) else (opened, name)

    def _index(self) -> ChunkIndex:
        """In a checkpoint of one process each tensor has one chunk."""
        opened = self._opened()
        if opened.chunk_index is not None:
            return opened.chunk_index
        model = opened.model
        aliases = {name: tuple(alias for alias, stored in model.aliases.items() if stored == name) for name in model.shapes}
        tensors = {
            name: ShardedTensor(model.dtypes[name], shape, Layout((Shard(0, Chunk.full(shape)),)), aliases[name])
            for name, shape in model.shapes.items()
        }
        return ChunkIndex({MODEL: tensors})


def _names_in_model(names: list[str], paths: Mapping[str, Any]) -> dict[str, str]:
    """Full names of a model's tensors -> their names in it: those under ``model``, or those that are in no dict."""
    under = {name: name.removeprefix(f"{_MODEL_KEY}.") for name in names if paths.get(name, (name,))[0] == _MODEL_KEY}
    if any(len(paths.get(name, ())) > 1 for name in under):
        return under
    return {name: name for name in names if len(paths.get(name, (name,))) == 1}


def _object(item: WriteItem, planner: SavePlanner) -> Any:
    """An object itself; the planner offers its pickle, which is not written."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise ConfigError(
            f"{type(planner).__name__} gives {item.index.fqn} as a pickle alone: derive it from DefaultSavePlanner."
        )
    return lookup(item.index)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _on_a_disk(path: str | os.PathLike[str]) -> Path:
    local = as_path(path)
    if not is_local(local):
        raise ConfigError(f"DCPWriter writes to a folder on a disk that all ranks share, not to '{path}'.")
    return local.absolute()


def _discard(commit: ExitStack) -> None:
    """Delete the folder that is being written."""
    error = StorageError("The save was given up.")
    commit.__exit__(StorageError, error, None)
