"""Our format behind ``torch.distributed.checkpoint``: a storage writer for ``dcp.save``; onym.convert.dcp_reader reads.

DCP's planner says which rank has which chunk; each rank writes its chunks into a file of its own, hashed, and fsyncs it; then
the coordinator writes the manifest and renames the folder. So a checkpoint exists completely or not at all, whichever rank
fails, and the one before stays. No pickle is written: values that are not tensors are stored as JSON.

    dcp.save(state, storage_writer=onym.DCPWriter("step-100"))
    dcp.load(state, storage_reader=onym.DCPReader("step-100"))
"""

from __future__ import annotations

import itertools
import os
import secrets
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from onym.errors import CheckpointError, ConfigError, StorageError, storage_error
from onym.format.chunk_index import CHUNKS, ChunkIndex
from onym.format.layout import Shard, rank_folder, shard_file
from onym.format.manifest import MANIFEST, MODEL, gc_paused
from onym.format.provenance import ask_ahead
from onym.format.rank_files import ChunkOf, RankContent, RankReport, assemble, complete_folder, write_rank_files
from onym.format.writer import NOTHING, require_replaceable
from onym.names.model_keys import MODEL_KEYS
from onym.state.chunks import Chunk
from onym.state.tree import flatten
from onym.storage.local import LocalFolder, new_folder, unfinished
from onym.storage.paths import as_path, is_local

STATE = "state.safetensors"
"""The file of tensors outside of the model: an optimizer's, and those inside of other objects."""
_NO_MODELS = ("optim", "sched", "ema", "lr_", "rng", "random", "scaler", "train", "data", "loader", "sampler")

Keys = tuple[Any, ...]


@dataclass
class _Place:
    """What the coordinator sends to each rank."""

    rank: int
    folder: str
    """That is being written."""
    prefix: str | None
    """Of the names of the model's tensors; None where there is no model."""
    used: bool = False
    """A planner that caches plans gives this process the place of an earlier save again."""


@dataclass(frozen=True)
class _Report:
    """What a rank sends to the coordinator, with the first item that it has written."""

    files: RankReport
    objects: Mapping[str, Any]
    """Values that are not tensors, as plain structures."""
    prefix: str | None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where something that was saved is."""

    relative_path: str
    file: str = ""
    """The file that a tensor would be in if one process had written it, and its name there."""
    name: str = ""
    shard: Shard | None = None


def stored_chunks(index: ChunkIndex) -> dict[MetadataIndex, StoredChunk]:
    """Where each chunk and each object is, by the names of the state that was saved."""
    found = {
        MetadataIndex((index.prefix if file == MODEL else "") + each, shard.chunk.offsets): StoredChunk(
            shard_file(file, shard.rank), file, name, shard
        )
        for file, entries in index.tensors.items()
        for name, entry in entries.items()
        for each in (name, *entry.aliases)
        for shard in entry.layout.shards
        if not index.is_inside((index.prefix if file == MODEL else "") + each)
    }
    return found | {MetadataIndex(name): StoredChunk(CHUNKS) for name in index.objects}


class DCPWriter(StorageWriter):
    """For ``dcp.save(state, storage_writer=DCPWriter(path))``: durable, hashed, atomic, without pickle.

    The state may hold tensors, plain values, ``bytes`` and ``BytesIO`` in dicts, lists and tuples. Where a model is recognised
    (under ``model`` or another usual name, in an ``AppState``, or a model's own state dict),
    ``onym.load(path, into=model)``, ``onym.open_checkpoint``, ``onym inspect``, ``verify`` and ``convert`` open what it writes,
    in one process and without torch.distributed.

    Args:
        path: the checkpoint's folder, on a disk that all ranks share; ``checkpoint_id`` of ``dcp.save`` by default. One that
            is there is replaced, when the new one is complete.
        overwrite: False refuses a path where something is.

    Raises:
        CheckpointError: a value in the state is neither a tensor nor made of plain values; nothing is written.
        StorageError: a disk refused, on any rank. ``dcp.save`` raises its own ``CheckpointException`` with it, on all.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = True) -> None:
        super().__init__()
        self.path = None if path is None else _on_a_disk(path)
        self.overwrite, self.save_id = overwrite, secrets.token_hex(8)
        ask_ahead()
        self._alone: int | None = None
        """The rank, where each saves for itself."""
        self._folder: LocalFolder | None = None
        """The folder that is being written, in the coordinator; and what deletes it."""
        self._finalizer: weakref.finalize[[ExitStack], DCPWriter] | None = None

    @property
    def checkpoint_id(self) -> Path | None:
        """Where it is saved."""
        return self.path

    def storage_meta(self) -> StorageMeta:
        """What a planner gets to know."""
        return StorageMeta(checkpoint_id=self.path, save_id=self.save_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save."""
        if checkpoint_id is not None and checkpoint_id != "":
            self.path = _on_a_disk(checkpoint_id)
        self.save_id = secrets.token_hex(8)
        self._discard()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The rank that plans for all is the one that commits, unless each rank saves for itself."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self._alone = kwargs.get("rank", 0) if several and not kwargs.get("use_collectives", True) else None
        self._discard()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add to the planner's."""
        target = self._target()
        if not self.overwrite and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
            raise StorageError(f"Checkpoint already exists at '{target}', and overwrite=False: choose another folder.")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, in the coordinator, and tell the other ranks where it is."""
        target = self._target()
        require_replaceable(target)
        if self._alone is not None and (target.parent / MANIFEST).exists():
            raise StorageError(
                f"'{target.parent}' holds a checkpoint that all ranks wrote together, which use_collectives=False does not "
                "replace: choose another folder, or remove it."
            )
        items = [item for plan in plans for item in plan.items]
        needed = sum(_nbytes(item) for item in items if item.tensor_data is not None)
        prefix = _model_prefix(items, _merged(plan.planner_data for plan in plans))
        commit = ExitStack()
        folder = commit.enter_context(new_folder(target, MANIFEST, needed))
        self._folder = folder
        # A rank whose own part fails deletes the folder. Where nothing is called here any more, it goes with this object.
        self._finalizer = weakref.finalize(self, _discard, commit)
        return [replace(plan, storage_data=_Place(rank, str(folder.path), prefix)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the chunks of this rank, durably. If that fails, the folder is deleted at once, also from another rank."""
        place: _Place = plan.storage_data
        folder = self._folder or self._shared_folder(place)
        place.used = True
        try:
            content, objects = _content_of(plan, planner, place.prefix)
            files = write_rank_files(folder, place.rank, content)
        except BaseException as error:
            gone = not folder.path.is_dir()
            self._discard()
            folder.discard()
            if isinstance(error, OSError):
                raise (self._unseen() if gone else storage_error("write", self._target(), error)) from error
            raise
        if folder is not self._folder:
            folder.close()
        reports = itertools.chain([_Report(files, objects, place.prefix)], itertools.repeat(None))
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(item.index, _nbytes(item) if item.tensor_data else 0, report)
                for item, report in zip(plan.items, reports, strict=False)
            ]
        )
        return future

    @gc_paused()
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, in the coordinator, after all ranks have written."""
        folder, target = self._folder, self._target()
        assert folder is not None and self._finalizer is not None  # noqa: PT018
        try:
            reports: list[_Report] = [each.storage_data for result in results for each in result if each.storage_data]
            tensors = assemble(chunk for report in reports for chunk in report.files.written)
            objects = {name: structure for report in reports for name, structure in report.objects.items()}
            prefix = next((report.prefix for report in reports if report.prefix), "")
            planned = metadata.planner_data or {}
            paths = {name: list(planned.get(name, (name,))) for name in metadata.state_dict_metadata}
            index = ChunkIndex(tensors, objects, prefix, paths, self._alone is not None)
            complete_folder(folder, target, [report.files for report in reports], index, {}, NOTHING)
            detached = self._finalizer.detach()
            self._folder = self._finalizer = None
            assert detached is not None
            detached[2][0].close()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise storage_error("write", target, error) from error
            raise
        metadata.storage_data, metadata.storage_meta = stored_chunks(index), self.storage_meta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a folder on a disk."""
        return is_local(as_path(checkpoint_id))

    def _target(self) -> Path:
        """The folder that is replaced."""
        if self.path is None:
            raise ConfigError("Where shall it be? DCPWriter(path), or dcp.save(…, checkpoint_id=path).")
        return self.path if self._alone is None else self.path / rank_folder(self._alone)

    def _shared_folder(self, place: _Place) -> LocalFolder:
        """The folder that the coordinator made, on another rank."""
        folder = unfinished(self._target()) if place.used else Path(place.folder)
        if folder is None or not folder.is_dir():
            raise self._unseen()
        return LocalFolder(folder)

    def _unseen(self) -> StorageError:
        return StorageError(
            f"'{self._target()}' is not seen by all ranks as the same folder: choose one on a disk that all machines share; "
            "or another rank has failed, whose reason is in the same message."
        )

    def _discard(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._folder = self._finalizer = None


def _content_of(plan: SavePlan, planner: SavePlanner, prefix: str | None) -> tuple[RankContent, dict[str, Any]]:
    """What a rank writes: its tensors, and its values that are none, as plain structures."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    chunks: dict[str, dict[str, ChunkOf]] = {}
    objects: dict[str, Any] = {}
    paths = getattr(planner, "mappings", None) or {}
    names = {*paths, *(item.index.fqn for item in plan.items)}
    for item in plan.items:
        fqn = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            value = _object(item, planner)
            found, objects[fqn] = flatten(value, fqn)
            if not names.isdisjoint(found):  # {"x": (tensor, 1), "x.0": …}: what is in it has the name of another
                found, objects[fqn] = flatten(value, f"{fqn}.(inside)")
            is_model = prefix == f"{fqn}." and isinstance(value, Mapping)
            for name, tensor in found.items():
                if isinstance(tensor, DTensor):
                    raise CheckpointError(f"{name} is sharded, and inside of an object: save with flatten_state_dict=True.")
                short = name.removeprefix(prefix or "")
                file, name = (MODEL, short) if is_model and value.get(short) is not None else (STATE, name)
                tensors.setdefault(file, {})[name] = tensor
            continue
        assert item.tensor_data is not None
        value = planner.resolve_data(item)
        assert isinstance(value, torch.Tensor)
        file, name = _place_of(fqn, paths.get(fqn, (fqn,)), prefix)
        chunk = Chunk(tuple(item.tensor_data.chunk.offsets), tuple(value.shape))
        key = f"{name}@{chunk.offsets}"  # one rank may have several
        tensors.setdefault(file, {})[key] = value.detach()
        chunks.setdefault(file, {})[key] = ChunkOf(name, tuple(item.tensor_data.size), chunk)
    return RankContent(tensors, chunks), objects


def _place_of(fqn: str, path: Keys, prefix: str | None) -> tuple[str, str]:
    """The file of a tensor, and its name there."""
    if prefix is None or not (fqn.startswith(prefix) if prefix else len(path) == 1):
        return STATE, fqn
    return MODEL, fqn.removeprefix(prefix)


def _merged(mappings: Iterable[Any]) -> dict[str, Keys]:
    return {name: path for each in mappings if isinstance(each, Mapping) for name, path in each.items()}


def _model_prefix(items: Iterable[WriteItem], paths: Mapping[str, Keys]) -> str | None:
    """What the names of the model's tensors begin with; None where no model is recognised.

    Args:
        items: all that is saved.
        paths: full names -> the keys that lead to them in nested dicts.
    """
    items = list(items)
    tensors = {paths.get(item.index.fqn, (item.index.fqn,)) for item in items if item.type != WriteItemType.BYTE_IO}
    nested, loose = {path for path in tensors if len(path) > 1}, {path[0] for path in tensors if len(path) == 1}
    if not paths:  # flatten_state_dict=False: a dict is one item
        objects = {item.index.fqn for item in items if item.type == WriteItemType.BYTE_IO}
        nested |= {(name, "") for name in objects.intersection(MODEL_KEYS)}
    firsts = {str(path[0]) for path in nested}
    if "model" in firsts:
        return "model."
    if len(found := firsts & set(MODEL_KEYS)) == 1:
        return f"{found.pop()}."
    if not found and any("." in name for name in loose):
        return ""  # torchtitan: the model's tensors under their own names, beside dicts
    inner = {f"{path[0]}.{path[1]}." for path in nested if len(path) > 2 and path[1] in MODEL_KEYS}
    inner = {name for name in inner if not name.startswith(_NO_MODELS[:3])}
    if not found and len(inner) == 1:
        return inner.pop()
    if len(firsts) == 1 and not loose and not next(iter(firsts)).lower().startswith(_NO_MODELS):
        return f"{firsts.pop()}."
    return "" if loose and not firsts else None


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
