"""Our format behind ``torch.distributed.checkpoint``: what anybody's ``dcp.save`` and ``dcp.load`` write and read.

Its planner says which process has which piece; each writes its pieces into a file of its own, hashed, and flushes it; then the
first process writes the manifest and renames the folder. So a checkpoint is there as a whole or not at all, whichever process
fails, and the one before stays. No pickle is written: what is no tensor is kept as JSON.

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
from onym.format.manifest import MANIFEST, MODEL, gc_paused
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.safetensors import dtype_called, dtype_name
from onym.format.sharded_tensor import Layout, Part, Pieces, ShardedTensor, assemble
from onym.format.tensors import PiecedFile, TensorFile
from onym.format.writer import Box, Content, Share, complete_folder, require_replaceable, write_share
from onym.state.tree import flatten, unflatten
from onym.storage import object_store
from onym.storage.local import NewFolder, new_folder
from onym.storage.threads import WORKERS, run_in_threads

STATE = "state.safetensors"
"""What is no part of the model: an optimizer's tensors, and those inside of other objects."""
_MODEL_KEY = "model"
_FOR_ONE_THREAD = 64 << 10  # bytes a tensor: of smaller ones Python itself is most of the work
_OF_A_PLANNER = ("resolve_tensor", "commit_tensor")


@dataclass(frozen=True)
class _Place:
    """What the first process tells the others of the folder in the making."""

    number: int
    folder: str


@dataclass(frozen=True)
class _Told:
    """What one process tells the first one, with the first item that it has written."""

    share: Share
    objects: Mapping[str, Any]
    """What is no tensor, as plain structures."""


@dataclass(slots=True)
class _Read:
    """A piece, or a part of one, and where it goes."""

    file: TensorFile
    piece: str
    target: torch.Tensor
    item: ReadItem

    def run(self, verify: bool) -> None:
        starts, sizes = self.item.storage_offsets, self.item.lengths
        box = [(at, at + size) for at, size in zip(starts, sizes, strict=True)]
        self.file.read_into(self.piece, self.target, box, verify=verify)


class DCPWriter(StorageWriter):
    """For ``dcp.save(state, storage_writer=DCPWriter(path))``: durable, hashed, without pickle, and there only as a whole.

    Where the state is ``{"model": …, "optimizer": …}``, or a model's own state dict, ``onym.load(path, into=model)``,
    ``onym.open_checkpoint``, ``onym inspect``, ``verify`` and ``convert`` open what it writes, in one process and without
    torch.distributed.

    Args:
        path: the checkpoint's folder, on a disk that all processes see; ``checkpoint_id`` of ``dcp.save`` by default. One that
            is there is replaced, when the new one is complete.

    Raises:
        CheckpointError: the state has something that is neither a tensor nor plain values; nothing is written.
        StorageError: a disk refused, in any process. ``dcp.save`` raises its own ``CheckpointException`` with it, in all.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._path = None if path is None else _on_a_disk(path)
        self._folder: NewFolder | None = None
        """In the making, in the process that commits."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save."""
        if checkpoint_id is not None and checkpoint_id != "":
            self._path = _on_a_disk(checkpoint_id)
        if self._path is None:
            raise ConfigError("Where shall it be? DCPWriter(path), or dcp.save(…, checkpoint_id=path).")
        self._give_up()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the process that plans for all is the one that commits."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add: what a process has is what its planner says."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, in the first process, and tell the others where."""
        path = self._required_path()
        require_replaceable(path)
        making = ExitStack()
        items = [item for plan in plans for item in plan.items if item.tensor_data is not None]
        needed = sum(_nbytes(item) for item in items)
        folder = making.enter_context(new_folder(path, MANIFEST, needed))
        assert isinstance(folder, NewFolder)
        self._folder, self._making = folder, making
        # A process that fails calls nothing here any more: what was begun is deleted with this object.
        self._finalizer = weakref.finalize(self, _abandon, making)
        return [replace(plan, storage_data=_Place(number, str(folder.path))) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces, and return when they are on the disk."""
        place: _Place = plan.storage_data
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        boxes: dict[str, dict[str, Box]] = {}
        objects: dict[str, Any] = {}
        in_model = _model_names([item.index.fqn for item in plan.items], planner)
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
            box = Box(name, tuple(item.tensor_data.size), tuple(item.tensor_data.chunk.offsets))
            kept_as = f"{name}@{box.start}"  # one process may have several
            tensors.setdefault(file, {})[kept_as] = value.detach()
            boxes.setdefault(file, {})[kept_as] = box
        if not Path(place.folder).is_dir():
            raise StorageError(
                f"'{self._required_path()}' is not seen by all processes as the same folder: choose one on a disk that all "
                "machines share, and leave enable_plan_caching off."
            )
        folder = self._folder or NewFolder(Path(place.folder))
        try:
            written = write_share(folder, place.number, Content(tensors, boxes))
        except OSError as error:
            raise storage_error("write", self._required_path(), error) from error
        finally:
            if folder is not self._folder:
                folder.close()
        told = itertools.chain([_Told(written, objects)], itertools.repeat(None))
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(item.index, _nbytes(item) if item.tensor_data else 0, said)
                for item, said in zip(plan.items, told, strict=False)
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, in the first process, once all have written."""
        folder = self._folder
        assert folder is not None
        told = [each.storage_data for result in results for each in result if each.storage_data is not None]
        paths = {name: list(path) for name, path in (metadata.planner_data or {}).items()}
        in_model = _names_in_model(list(metadata.state_dict_metadata), paths)
        if not any(written.file == MODEL for each in told for written in each.share.written):
            raise CheckpointError(
                "There is no model in what is to be kept: pass its state dict itself, or as {'model': …} beside the others."
            )
        about = Pieces(
            {},
            {name: structure for each in told for name, structure in each.objects.items()},
            f"{_MODEL_KEY}." if any(fqn != name for fqn, name in in_model.items()) else "",
            paths,
        )
        try:
            files = {name: entry for each in told for name, entry in each.share.files.items()}
            tensors = assemble(written for each in told for written in each.share.written)
            complete_folder(folder, self._required_path(), files, replace(about, tensors=tensors), {})
            self._folder = None
            self._finalizer.detach()
            self._making.close()
        except OSError as error:
            raise storage_error("write", self._required_path(), error) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a folder on a disk."""
        return not object_store.is_remote(object_store.as_path(checkpoint_id))

    def _required_path(self) -> Path:
        assert self._path is not None
        return self._path

    def _give_up(self) -> None:
        if self._folder is not None:
            self._finalizer()
            self._folder = None


class DCPReader(StorageReader):
    """For ``dcp.load(state, storage_reader=DCPReader(path))``: what :class:`DCPWriter` wrote, by as many processes or others.

    What one process wrote (``onym.save``, ``onym train``) is read too: the model's tensors, under their names.

    Args:
        path: the checkpoint's folder.
        dtype: ``"exact"`` refuses a tensor of another dtype than the stored one, ``"cast"`` converts.
        verify: check each piece against its hash before it is used.

    Raises:
        CheckpointError: it is missing or damaged. ``dcp.load`` raises its own ``CheckpointException`` with it, everywhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, dtype: str = "exact", verify: bool = True) -> None:
        super().__init__()
        if dtype not in ("exact", "cast"):
            raise ConfigError(f'dtype is "exact" or "cast", not {dtype!r}.')
        self._path = None if path is None else object_store.as_path(path)
        self._cast, self._verify = dtype == "cast", verify
        self._checkpoint: Checkpoint | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load."""
        if checkpoint_id is not None and checkpoint_id != "":
            self._path = object_store.as_path(checkpoint_id)
        if self._path is None:
            raise ConfigError("Where is it? DCPReader(path), or dcp.load(…, checkpoint_id=path).")
        self._checkpoint = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is there, for a planner."""
        opened, pieces = self._opened(), self._pieces()
        described: dict[str, Any] = {}
        for file, entries in pieces.tensors.items():
            for name, entry in entries.items():
                dtype = dtype_called(entry.dtype)
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in '{opened.path}' has the dtype {entry.dtype}, which torch {torch.__version__} does not have."
                    )
                chunks = [ChunkStorageMetadata(torch.Size(part.start), torch.Size(part.size)) for part in entry.layout.parts]
                for each in (name, *entry.aliases):
                    full = pieces.prefix + each if file == MODEL else each
                    properties = TensorProperties(dtype=dtype)
                    described[full] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        described |= {name: BytesStorageMetadata() for name in pieces.objects}
        paths = {name: tuple(path) for name, path in pieces.paths.items()}
        return Metadata(described, planner_data=paths or {name: (name,) for name in described})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: each process opens the files that it needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    @gc_paused()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this process needs, from the pieces that have it."""
        pieces = self._pieces()
        where = {
            ((pieces.prefix if file == MODEL else "") + each, part.start): (file, name, part)
            for file, entries in pieces.tensors.items()
            for name, entry in entries.items()
            for each in (name, *entry.aliases)
            for part in entry.layout.parts
        }
        reads: dict[int, list[_Read]] = {}
        plain = not any(getattr(type(planner), each) is not getattr(DefaultLoadPlanner, each) for each in _OF_A_PLANNER)
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                tensors = self._opened().tensors(STATE) if STATE in self._opened().holds else None
                held = _Held(tensors, self._verify)
                content = io.BytesIO()
                torch.save(unflatten(pieces.objects[name], held), content)  # in memory: a planner takes it so
                content.seek(0)
                planner.load_bytes(item, content)
                continue
            target = planner.resolve_tensor(item).detach()
            start = tuple(item.storage_index.offset) if item.storage_index.offset is not None else (0,) * target.dim()
            file, piece = self._piece(*where[name, start])
            if not self._cast and file.dtypes[piece] != dtype_name(target.dtype):
                raise CheckpointError(
                    f"{name} is {file.dtypes[piece]} in '{self._opened().path}' and {dtype_name(target.dtype)} here: "
                    'DCPReader(path, dtype="cast") converts it.'
                )
            read = _Read(file, piece, target, item)
            if plain:
                # What shares memory is read in its order.
                reads.setdefault(target.untyped_storage().data_ptr(), []).append(read)
            else:  # it may give the same memory for each, and take what was read out of it
                read.run(self._verify)
                planner.commit_tensor(item, target)
        self._read_together(list(reads.values()))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_together(self, groups: list[list[_Read]]) -> None:
        """By several threads, each a group at a time, where there is enough to read."""
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

    def _piece(self, file: str, name: str, part: Part) -> tuple[TensorFile, str]:
        """The file with a piece, and the name it has there."""
        opened = self._opened().tensors(file)
        return opened.piece(name, part) if isinstance(opened, PiecedFile) else (opened, name)

    def _pieces(self) -> Pieces:
        """Of what one process wrote each tensor is one piece."""
        opened = self._opened()
        if opened.pieces is not None:
            return opened.pieces
        model = opened.model
        further = {name: tuple(a for a, stored in model.aliases.items() if stored == name) for name in model.shapes}
        whole = {
            name: ShardedTensor(model.dtypes[name], shape, Layout((Part(0, (0,) * len(shape), shape),)), further[name])
            for name, shape in model.shapes.items()
        }
        return Pieces({MODEL: whole})


class _Held(dict[str, torch.Tensor]):
    """The tensors inside of objects, read when they are asked for, in memory of their own."""

    def __init__(self, file: TensorFile | None, verify: bool) -> None:
        super().__init__()
        self._file, self._verify = file, verify

    def __missing__(self, name: str) -> torch.Tensor:
        if self._file is None:
            raise KeyError(name)
        value: torch.Tensor = self._file.tensor(name, verify=self._verify).clone()
        return value


def _names_in_model(names: list[str], paths: Mapping[str, Any]) -> dict[str, str]:
    """Which tensors are a model's, by full name, and their names in it: those under ``model``, or those that are in no dict."""
    under = {name: name.removeprefix(f"{_MODEL_KEY}.") for name in names if paths.get(name, (name,))[0] == _MODEL_KEY}
    if any(len(paths.get(name, ())) > 1 for name in under):
        return under
    return {name: name for name in names if len(paths.get(name, (name,))) == 1}


def _model_names(names: list[str], planner: SavePlanner) -> dict[str, str]:
    paths = getattr(planner, "mappings", None) or {}
    return _names_in_model([*names, *paths], paths)


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
    found = object_store.as_path(path)
    if object_store.is_remote(found):
        raise ConfigError(f"DCPWriter writes to a folder on a disk that all processes see, not to '{path}'.")
    return found.absolute()


def _abandon(making: ExitStack) -> None:
    """End what was begun without putting it in place."""
    error = StorageError("A save was given up.")
    making.__exit__(StorageError, error, None)
