"""Tensors of an opened file on their way to another file: made one by one, or mapped where torch.save wants all of them."""

from __future__ import annotations

import mmap
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
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


def lazily(tensors: TensorFile) -> dict[str, Any]:
    """Tensors to be written, each materialised on demand; tied ones are stored once."""
    state: dict[str, Any] = {}
    for name in tensors.shapes:
        kind = dtype_called(tensors.dtypes[name])
        if kind is None:
            raise CheckpointError(
                f"{name} in '{tensors.path}' has the dtype {tensors.dtypes[name]}, which torch does not have."
            )
        state[name] = LazyTensor(kind, tuple(tensors.shapes[name]), _maker(tensors, name), _further(tensors, name))
    return state


def _further(tensors: TensorFile, name: str) -> tuple[str, ...]:
    return tuple(alias for alias, stored in tensors.aliases.items() if stored == name)


def _maker(tensors: TensorFile, name: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        value = tensors.tensor(name, verify=False)
        assert isinstance(value, Tensor)
        return value

    return make


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
            descriptor = os.open(scratch, os.O_RDONLY)
            try:
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("read", scratch, error) from error
        values: OrderedDict[str, Tensor] = OrderedDict()
        for name in tensors.names:
            stored = tensors.aliases.get(name, name)
            if stored in values:
                values[name] = values[stored]
                continue
            placed = opened.placed[stored]
            count = placed.end - placed.start
            data = (
                torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=opened.data_start + placed.start)
                if count
                else torch.empty(0, dtype=torch.uint8, device="cpu")
            )
            kind = dtype_called(tensors.dtypes[stored])
            assert kind is not None
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
    """Hold every tensor of the source against what can be read from the result; one of each is in memory at a time."""
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


def _equal_bytes(one: Tensor, other: Tensor, rows: int = 1 << 20) -> bool:
    """Whether two tensors are bitwise identical, compared in chunks, so that no copy of either is made."""
    if one.dim() == 0 or one.numel() <= rows:
        return torch.equal(as_bytes(one.contiguous()), as_bytes(other.contiguous()))
    step = max(1, rows // max(1, one[0].numel()))
    return all(
        _equal_bytes(left.contiguous(), right.contiguous(), max(rows, left.numel()))
        for left, right in zip(one.split(step), other.split(step), strict=True)
    )
