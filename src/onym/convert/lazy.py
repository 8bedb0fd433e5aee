"""Tensors of an opened file on their way to another: materialised one by one, or mapped where torch.save wants all of them."""

from __future__ import annotations

import functools
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.convert.mapping import UNCHANGED, View
from onym.convert.sources import as_json
from onym.errors import CheckpointError, storage_error
from onym.format.manifest import MODEL
from onym.format.pth import PickledFile
from onym.format.safetensors import as_bytes, dtype_called, from_bytes
from onym.format.safetensors_file import open_safetensors
from onym.format.stored import LazyTensor
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile
from onym.format.writer import write_safetensors
from onym.storage.local import MappedFile

_CHUNK = 1 << 20  # elements that are compared at a time


def lazily(tensors: TensorFile) -> dict[str, Any]:
    """Tensors to be written, each materialised on demand; tied ones are stored once."""
    state: dict[str, Any] = {}
    for name, shape in tensors.shapes.items():
        kind = dtype_called(tensors.dtypes[name])
        if kind is None:
            raise CheckpointError(
                f"{name} in '{tensors.path}' has the dtype {tensors.dtypes[name]}, which torch does not have."
            )
        aliases = tuple(alias for alias, stored in tensors.aliases.items() if stored == name)
        state[name] = LazyTensor(kind, tuple(shape), functools.partial(tensors.tensor, name, verify=False), aliases)
    return state


@contextmanager
def mapped_on_disk(tensors: TensorFile, path: Path, progress: Progress | None) -> Iterator[OrderedDict[str, Tensor]]:
    """All tensors at once, as ``torch.save`` wants them, in memory that is mapped from a temporary file."""
    if _is_mapped(tensors):
        yield OrderedDict((name, tensors.tensor(name, verify=False)) for name in tensors.names)
        return
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.safetensors")
    try:
        write_safetensors(scratch, lazily(tensors), progress=progress)
        opened = open_safetensors(scratch)
        try:
            mapped = MappedFile(scratch).map()
        except OSError as error:
            raise storage_error("read", scratch, error) from error
        values: OrderedDict[str, Tensor] = OrderedDict()
        for name in tensors.names:
            stored = tensors.aliases.get(name, name)
            if stored in values:
                values[name] = values[stored]
                continue
            placed, kind = opened.placed[stored], dtype_called(tensors.dtypes[stored])
            assert kind is not None
            data = torch.empty(0, dtype=torch.uint8, device="cpu")
            if count := placed.end - placed.start:  # each with a storage of its own, because torch.save writes all of a storage
                data = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=opened.data_start + placed.start)
            values[name] = from_bytes(data, kind, tuple(tensors.shapes[stored]))
        yield values
    finally:
        scratch.unlink(missing_ok=True)


def _is_mapped(tensors: TensorFile) -> bool:
    """Whether every tensor is one of a mapped file of ``torch.save``'s, as it is, and all of its storage."""
    if isinstance(tensors, View):
        return all(recipe.change is UNCHANGED for recipe in tensors.recipes.values()) and _is_mapped(tensors.source)
    if not isinstance(tensors, PickledFile) or not tensors.is_mapped:
        return False
    values = [tensors.tensor(name, verify=False) for name in tensors.names]
    return all(value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in values)


def sharded(tensors: TensorFile, shard_bytes: int | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The files that tensors go to, and the index where there are several."""
    state = lazily(tensors)
    total = sum(value.nbytes for value in state.values())
    if shard_bytes is None or total <= shard_bytes:
        return {MODEL: state}, {}
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
    placed = {name: file for file, shard in files.items() for name in shard}
    placed |= {alias: placed[stored] for alias, stored in tensors.aliases.items()}
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    return files, {f"{MODEL}.index.json": as_json(index)}


def compare(source: TensorFile, written: TensorFile, path: Path) -> int:
    """Compare every tensor of the source with what can be read from the result; one of each is in memory at a time."""
    names = set(written.names)
    for name in source.names:
        if name not in names:
            raise CheckpointError(f"'{path}' was written and removed again: it does not hold {name}")
        if name in source.aliases:
            continue
        one, other = source.tensor(name, verify=False), written.tensor(name)
        if one.dtype != other.dtype or one.shape != other.shape or not _equal_bytes(one, other):
            raise CheckpointError(f"'{path}' was written and removed again: its {name} is not the source's")
    further = names - set(source.names)
    if unequal := [name for name in further if bool(written.tensor(name).any())]:
        raise CheckpointError(f"'{path}' was written and removed again: it holds {unequal[0]}, which the source has not")
    return len(source.shapes)


def _equal_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bitwise identical, compared in chunks of rows, so that no copy of either is made."""
    rows = max(1, _CHUNK // max(1, one[0].numel())) if one.dim() and len(one) else 1
    pairs = zip(one.split(rows), other.split(rows), strict=True) if one.dim() else [(one, other)]
    return all(torch.equal(as_bytes(left.contiguous()), as_bytes(right.contiguous())) for left, right in pairs)
