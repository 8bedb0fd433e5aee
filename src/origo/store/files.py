"""The tensors of a file, or of one in pieces: known from headers, read when asked for, checked before they are used."""

from __future__ import annotations

import functools
import math
import mmap
import os
import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from origo.errors import CheckpointError
from origo.state.model import describe
from origo.store import remote
from origo.store.layout import (
    TensorEntry,
)
from origo.store.pieces import PIECES, Part, Pieced, piece_file
from origo.store.tensorfile import (
    as_bytes,
    dtype_called,
    dtype_name,
    format_dtype,
    from_bytes,
    header_length,
    parse_header,
    torch_dtype,
)
from origo.store.threads import WORKERS, share

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    file: str
    tensor: str | None
    reason: str
    """A sentence, with the path."""


class TensorFile(ABC):
    """The tensors of one file: what they are is known, their values are read when they are asked for."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        aliases: Mapping[str, str],
        hashes: Mapping[str, str],
    ) -> None:
        self.path = path
        self.shapes = shapes
        """Of every stored tensor."""
        self.dtypes = dtypes
        """Of every stored tensor, under torch's names."""
        self.aliases = aliases
        """Further names of tied tensors -> the name they are stored under."""
        self.hashes = hashes
        """BLAKE3 of each tensor's bytes; a name without one cannot be checked."""
        self.versions: Mapping[str, Any] | None = None
        """The layout versions of the modules by their path, where the file keeps them (``.pth``)."""
        self._right: set[str] = set()  # names that were checked, and need not be again while the file is as it was

    @property
    def names(self) -> list[str]:
        """All names, aliases included."""
        return [*self.shapes, *self.aliases]

    def tensor(self, name: str, *, verify: bool = True) -> Any:
        """One tensor (or, from a .pth, whatever is stored under that name), on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or its bytes are not those that were written.
        """
        stored = self._stored_name(name)
        if verify:
            self._require_right([stored])
        return self._read(stored)

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """A slice of a tensor, as ``tensor(name)[index]``; of the rest nothing is kept in memory.

        Args:
            name: a name or alias.
            index: whatever a tensor can be indexed with.
            verify: check the tensor that it is a part of, all of it, the first time.
        """
        part: Tensor = self.tensor(name, verify=verify)[index].clone()
        return part

    def read_into(self, name: str, target: Tensor, *, verify: bool = True) -> None:
        """Read a tensor into one of the same shape and dtype. Where it is damaged, ``target`` has been changed.

        Raises:
            CheckpointError: as :meth:`tensor`.
        """
        target.copy_(self.tensor(name, verify=verify))

    def state(self, *, verify: bool = True) -> dict[str, Any]:
        """All tensors by name; tied ones are one object."""
        if verify:
            self._require_right(self.shapes)
        state: OrderedDict[str, Any] = OrderedDict((name, self._read(name)) for name in self.shapes)
        state.update({alias: state[name] for alias, name in self.aliases.items()})
        if self.versions is not None:
            state._metadata = self.versions  # type: ignore[attr-defined]
        return state

    def damages(self, share: tuple[int, int] = (0, 1)) -> Iterator[Damage]:
        """Check every tensor that has a hash.

        Args:
            share: of them, as (which process, of how many).
        """
        self._forget_if_changed()
        which, of_how_many = share
        mine = sorted(self.shapes, key=lambda name: -math.prod(self.shapes[name]))[which::of_how_many]
        return self._check([name for name in mine if name not in self._right], keep=False)

    def _require_right(self, names: Iterable[str]) -> None:
        self._forget_if_changed()
        for damage in self._check([name for name in names if name not in self._right]):
            raise CheckpointError(damage.reason)

    def _stored_name(self, name: str) -> str:
        stored = self.aliases.get(name, name)
        if stored not in self.shapes:
            raise CheckpointError(f"'{self.path}' holds no tensor {name!r}.")
        return stored

    def _forget_if_changed(self) -> None:  # noqa: B027
        """Where a file can be written over in place, what was checked is checked anew afterwards."""

    @abstractmethod
    def _read(self, name: str) -> Any: ...

    @abstractmethod
    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        """Those that are damaged. ``keep``: they are read next, so what was fetched for this need not be fetched again."""


class SafetensorsFile(TensorFile):
    """A .safetensors file: mapped, or fetched in ranges from remote storage."""

    def __init__(self, path: Path) -> None:
        self._remote = remote.is_remote(path)
        self._mapped: Tensor | None = None
        self._fetched: dict[str, bytes] = {}
        self._stamp = (0, 0)
        try:
            if self._remote:
                self._size, self._descriptor = remote.size(path), -1
            else:
                self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                self._size = os.fstat(self._descriptor).st_size
            self.data_start = header_length(self._raw(path, 0, 8), self._size, path)
            self.start = self._raw(path, 0, self.data_start)
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error
        self.placed, self.metadata = parse_header(self.start[8:], self._size - self.data_start, path)
        # Stock safetensors records a tied tensor's further names as metadata entries: further name -> stored name.
        aliases = {
            alias: name
            for alias, name in self.metadata.items()
            if name in self.placed and alias not in self.placed and alias != "format"
        }
        self._kinds = {name: torch_dtype(placed.dtype) for name, placed in self.placed.items()}
        super().__init__(
            path,
            {name: placed.shape for name, placed in self.placed.items()},
            {name: dtype_name(kind) if kind else self.placed[name].dtype for name, kind in self._kinds.items()},
            aliases,
            {},
        )

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def adopt(self, entries: Mapping[str, TensorEntry]) -> None:
        """Take dtypes, shapes, aliases, hashes and order from what Origo wrote of the tensors, held against the file's header.

        Raises:
            CheckpointError: they do not agree.
        """
        for name, entry in entries.items():
            placed, dtype = self.placed.get(name), dtype_called(entry.dtype)
            if dtype is None:
                raise CheckpointError(
                    f"{name} in '{self.path}' has the dtype {entry.dtype}, which torch {torch.__version__} does not have: "
                    "pip install --upgrade torch."
                )
            kept, more = format_dtype(dtype)
            if placed is None or (placed.dtype, placed.shape) != (kept, (*entry.shape, *more)):
                raise CheckpointError(f"'{self.path}' is damaged: it holds other tensors than were written.")
        further = [alias for entry in entries.values() for alias in entry.aliases]
        if len(set(further)) != len(further) or not entries.keys().isdisjoint(further):
            raise CheckpointError(f"'{self.path}' is damaged: a tensor has a name that is another's.")
        if len(entries) != len(self.placed):
            raise CheckpointError(f"'{self.path}' is damaged: it holds other tensors than were written.")
        self.shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}
        self._kinds = {name: dtype_called(entry.dtype) for name, entry in entries.items()}
        self.aliases = {alias: name for name, entry in entries.items() for alias in entry.aliases}
        self.hashes = {name: entry.blake3 for name, entry in entries.items()}

    def read_into(self, name: str, target: Tensor, *, verify: bool = True) -> None:
        """As of any file; into memory in one piece what is read is hashed while it is in the processor's cache."""
        stored = self._stored_name(name)
        self._forget_if_changed()
        if self._remote or not (target.is_cpu and target.is_contiguous()) or target.dtype != self._kinds[stored]:
            super().read_into(name, target, verify=verify)
            return
        placed, to_check = self.placed[stored], verify and stored in self.hashes and stored not in self._right
        if target.nbytes != placed.end - placed.start:
            raise CheckpointError(f"{name} in '{self.path}' has the shape {self.shapes[stored]}, not {tuple(target.shape)}.")
        view, hasher, position = as_bytes(target).numpy().data, blake3(), 0
        while position < len(view):
            part = view[position : position + _CHUNK]
            try:
                done = os.preadv(self._descriptor, [part], self.data_start + placed.start + position)
            except OSError as error:
                raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
            if not done:
                raise CheckpointError(f"'{self.path}' is damaged: it ends before {name!r} does.")
            if to_check:
                hasher.update(view[position : position + done])
            position += done
        if to_check and hasher.hexdigest() != self.hashes[stored]:
            raise CheckpointError(self._damage(stored).reason)
        if to_check:
            self._right.add(stored)

    def _read(self, name: str) -> Tensor:
        dtype = self._kinds[name]
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {self.dtypes[name]}, which torch does not have.")
        placed = self.placed[name]
        start, end = self.data_start + placed.start, self.data_start + placed.end
        try:
            return from_bytes(self._bytes(name, start, end), dtype, self.shapes[name])
        except RuntimeError as error:  # a shape whose strides no machine can count
            raise CheckpointError(f"{name} in '{self.path}' cannot be a tensor: {error}.") from error

    def _bytes(self, name: str, start: int, end: int) -> Tensor:
        if self._remote:
            # What was checked is what is used.
            fetched = self._fetched.pop(name) if name in self._fetched else self._fetch(name)
            data = fetched if start < end else b""
            return (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if data
                else torch.empty(0, dtype=torch.uint8, device="cpu")
            )
        return self._map()[start:end]

    def _forget_if_changed(self) -> None:
        if not self._remote:
            status = os.fstat(self._descriptor)
            stamp = (status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                self._right, self._stamp = set(), stamp

    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        checkable = sorted((name for name in names if name in self.hashes), key=lambda name: -self._nbytes(name))
        total = sum(map(self._nbytes, checkable))
        threads = WORKERS if total > 4 * _CHUNK else 1
        shares: list[list[str]] = [checkable[number::threads] for number in range(threads)]
        wrong: set[str] = set()
        try:
            share(lambda number: wrong.update(self._wrong(shares[number], keep)), threads)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
        if not self._remote:
            self._right |= set(checkable) - wrong
        for name in self.shapes:
            if name in wrong:
                yield self._damage(name)

    def _damage(self, name: str) -> Damage:
        return Damage(
            self.path.name,
            name,
            f"'{self.path}' is damaged: the bytes of {name!r} are not those that were written. Use another checkpoint, "
            "or fetch the file again.",
        )

    def _wrong(self, names: list[str], keep: bool) -> list[str]:
        """Those whose bytes have another hash; read in pieces, so that nothing is kept."""
        buffer = memoryview(bytearray(_CHUNK))
        wrong = []
        for name in names:
            placed = self.placed[name]
            if self._remote:
                self._fetched[name] = self._fetch(name)
                found = blake3(self._fetched[name]).hexdigest()
                if not keep:
                    del self._fetched[name]
            elif placed.end - placed.start <= _CHUNK:
                found = blake3(
                    os.pread(self._descriptor, placed.end - placed.start, self.data_start + placed.start)
                ).hexdigest()
            else:
                hasher, position, end = blake3(), self.data_start + placed.start, self.data_start + placed.end
                while position < end:
                    piece = buffer[: min(_CHUNK, end - position)]
                    done = os.preadv(self._descriptor, [piece], position)
                    if not done:
                        break
                    hasher.update(piece[:done])
                    position += done
                found = hasher.hexdigest()
            if found != self.hashes[name]:
                wrong.append(name)
        return wrong

    def _nbytes(self, name: str) -> int:
        return self.placed[name].end - self.placed[name].start

    def _fetch(self, name: str) -> bytes:
        """The bytes of a tensor on remote storage."""
        placed = self.placed[name]
        return self._raw(self.path, self.data_start + placed.start, self.data_start + placed.end)

    def _raw(self, path: Path, start: int, end: int) -> bytes:
        if self._remote:
            return remote.read_range(path, start, end)
        return os.pread(self._descriptor, end - start, start)

    def _map(self) -> Tensor:
        """The whole file as memory of this process's own: read when it is touched, and never changed by a write to it."""
        if self._mapped is None:
            self._mapped = torch.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        return self._mapped


class PickledFile(TensorFile):
    """A state dict that ``torch.save`` wrote, opened by torch's machinery that runs nothing."""

    def __init__(self, path: Path, state: Mapping[str, Any], is_zip: bool) -> None:
        try:
            described = describe(state)
        except RuntimeError as error:  # nested tensors have no shape
            raise CheckpointError(f"'{path}' holds a tensor that is none of the usual ones: {error}.") from error
        shapes = {name: shape for name, (shape, _) in described.items()}
        super().__init__(path, shapes, {name: dtype for name, (_, dtype) in described.items()}, {}, {})
        versions = getattr(state, "_metadata", None)
        self.versions = versions if isinstance(versions, Mapping) else None
        self._state, self.is_mapped = state, is_zip

    def _read(self, name: str) -> Any:
        value = self._state[name]
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(f"{name} in '{self.path}' has no values: it was on the meta device when it was saved.")
        return value

    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        reason = self._damage
        if reason is not None:
            yield Damage(self.path.name, None, reason)

    @functools.cached_property
    def _damage(self) -> str | None:
        """What the zip's checksums say, which torch writes and does not read."""
        try:
            damaged = zipfile.ZipFile(self.path).testzip() if self.is_mapped else None
        except Exception as error:  # zipfile does not keep to BadZipFile
            return f"'{self.path}' is damaged ({error})."
        if damaged is None:
            return None
        return f"'{self.path}' is damaged: the bytes of its part {damaged!r} are not those that were written."


class PiecedFile(TensorFile):
    """Tensors that several processes wrote their pieces of; put together when they are asked for, one at a time."""

    def __init__(self, path: Path, entries: Mapping[str, Pieced], opened: Callable[[str], TensorFile]) -> None:
        super().__init__(
            path,
            {name: entry.shape for name, entry in entries.items()},
            {name: entry.dtype for name, entry in entries.items()},
            {alias: name for name, entry in entries.items() for alias in entry.aliases},
            {},
        )
        self._entries, self._open = entries, opened

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """As of any file; of a box of slices, the pieces alone that have something of it are read and checked."""
        stored = self._stored_name(name)
        shape = self._entries[stored].shape
        if not _is_box(index, len(shape)):
            return super().part(name, index, verify=verify)
        bounds = [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]
        return self._box(stored, bounds, verify)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if len(entry.layout.parts) == 1:
            file, piece = self.piece(name, entry.layout.parts[0])
            whole: Tensor = file.tensor(piece, verify=False)
            return whole
        return self._box(name, [(0, size) for size in entry.shape], False)

    def _box(self, name: str, bounds: list[tuple[int, int]], verify: bool) -> Tensor:
        entry = self._entries[name]
        dtype = dtype_called(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {entry.dtype}, which torch does not have.")
        parts = list(entry.layout.overlapping(bounds))
        pieces = [self.piece(name, part) for part in parts]  # what is there has that size: nobody's word is taken for it
        box = torch.empty([max(end - start, 0) for start, end in bounds], dtype=dtype, device="cpu")
        if len(parts) == 1 and tuple(box.shape) == parts[0].size:
            file, piece = pieces[0]
            file.read_into(piece, box, verify=verify)
            return box
        for part, (file, piece) in zip(parts, pieces, strict=True):
            source, target = [], []
            for (start, end), at, size in zip(bounds, part.start, part.size, strict=True):
                first, last = max(start, at), min(end, at + size)
                source.append(slice(first - at, last - at))
                target.append(slice(first - start, last - start))
            box[tuple(target)] = file.tensor(piece, verify=verify)[tuple(source)]
        return box

    def piece(self, name: str, part: Part) -> tuple[TensorFile, str]:
        """The file with a piece, and the name it has there."""
        entry = self._entries[name]
        file = self._open(piece_file(self.path.name, part.process))
        stored = part.name(name, entry.shape)
        stored = file.aliases.get(stored, stored)
        if file.shapes.get(stored) != part.size or file.dtypes.get(stored) != entry.dtype:
            raise CheckpointError(
                f"'{file.path}' is damaged: it does not hold the piece {stored!r} as '{PIECES}' describes it."
            )
        return file, stored

    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        wanted: dict[str, tuple[TensorFile, list[str]]] = {}
        for name in names:
            for part in self._entries[name].layout.parts:
                file, piece = self.piece(name, part)
                wanted.setdefault(file.path.name, (file, []))[1].append(piece)
        for file, pieces in wanted.values():  # each file knows what of it was checked, and whether it has changed since
            file._forget_if_changed()
            yield from file._check([piece for piece in dict.fromkeys(pieces) if piece not in file._right], keep=keep)


def _is_box(index: Any, dimensions: int) -> bool:
    """Whether an index is a slice of each dimension, of consecutive places."""
    return (
        isinstance(index, tuple)
        and len(index) == dimensions
        and all(isinstance(each, slice) and each.step in (None, 1) for each in index)
    )
