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

from onym.errors import CheckpointError
from onym.format.chunks import Bounds, all_of, box_of, size_of, slices, span, strides_of
from onym.format.hashing import BLOCK, TensorHash, blocks_of
from onym.format.manifest import TensorEntry, gc_paused
from onym.format.safetensors import (
    as_bytes,
    dtype_called,
    dtype_name,
    format_dtype,
    from_bytes,
    header_length,
    is_plain,
    parse_header,
    torch_dtype,
)
from onym.format.sharded_tensor import PIECES, Part, ShardedTensor, piece_file
from onym.state.model import describe
from onym.storage import object_store
from onym.storage.threads import WORKERS, run_in_threads

_CHUNK = 1 << 20
_UNIT = 16 * BLOCK  # of a large tensor, what a thread checks at a time


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
        hashes: Mapping[str, TensorHash],
    ) -> None:
        self.path = path
        self.shapes = shapes
        """Of every stored tensor."""
        self.dtypes = dtypes
        """Of every stored tensor, under torch's names."""
        self.aliases = aliases
        """Further names of tied tensors -> the name they are stored under."""
        self.hashes = hashes
        """What each tensor's bytes must hash to; a name without one cannot be checked."""
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
            index: whatever a tensor can be indexed with. Of slices without a step, and numbers, what is needed is read alone.
            verify: check the blocks of the tensor that have something of it, the first time.
        """
        stored = self._stored_name(name)
        found, dtype = box_of(index, self.shapes[stored]), dtype_called(self.dtypes[stored])
        if found is None or dtype is None:
            part: Tensor = self.tensor(name, verify=verify)[index].clone()
            return part
        box, dropped = found
        return self._box(stored, box, dtype, verify)[dropped]

    def read_into(self, name: str, target: Tensor, box: Bounds | None = None, *, verify: bool = True) -> None:
        """Read a tensor, or a box of one, into a tensor of that shape. Where it is damaged, ``target`` has been changed.

        Raises:
            CheckpointError: as :meth:`tensor`.
        """
        value = self.tensor(name, verify=verify)
        target.copy_(value if box is None else value[slices(box)])

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

    def _box(self, name: str, box: Bounds, dtype: torch.dtype, verify: bool) -> Tensor:
        """A part of a tensor, in memory of its own."""
        try:
            values = torch.empty(size_of(box), dtype=dtype, device="cpu")
        except RuntimeError as error:  # a shape whose strides no machine can count
            raise CheckpointError(f"{name} in '{self.path}' cannot be a tensor: {error}.") from error
        self.read_into(name, values, box, verify=verify)
        return values

    @abstractmethod
    def _read(self, name: str) -> Any: ...

    @abstractmethod
    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        """Those that are damaged. ``keep``: they are read next, so what was fetched for this need not be fetched again."""


class SafetensorsFile(TensorFile):
    """A .safetensors file: mapped, or fetched in ranges from remote storage."""

    def __init__(self, path: Path) -> None:
        self._remote = object_store.is_remote(path)
        self._mapped: Tensor | None = None
        self._fetched: dict[str, bytes] = {}
        self._stamp = (0, 0)
        self._right_blocks: dict[str, set[int]] = {}  # likewise of large tensors, of which parts were checked
        try:
            if self._remote:
                self._size, self._descriptor = object_store.size(path), -1
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
        """Take dtypes, shapes, aliases, hashes and order from what Onym wrote of the tensors, held against the file's header.

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
            right = placed is not None and (placed.dtype, placed.shape) == (kept, (*entry.shape, *more))
            if placed is None or not right or len(entry.blocks) not in (0, 64 * blocks_of(placed.end - placed.start)):
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
        self.hashes = {name: entry.hash for name, entry in entries.items()}

    def read_into(self, name: str, target: Tensor, box: Bounds | None = None, *, verify: bool = True) -> None:
        """As of any file; into memory in one piece what is read is hashed while it is in the processor's cache."""
        stored = self._stored_name(name)
        self._forget_if_changed()
        shape, dtype = self.shapes[stored], self._dtype(stored)
        wanted = tuple(target.shape)
        if wanted == shape and (box is None or not any(start for start, _ in box)):
            first, end = 0, self._nbytes(stored)
        else:
            box = all_of(shape) if box is None else box
            inside = len(box) == len(shape) and all(0 <= at <= stop <= n for (at, stop), n in zip(box, shape, strict=True))
            if wanted != size_of(box) or not inside:
                raise CheckpointError(f"{name} in '{self.path}' has the shape {shape}, of which not {wanted} is read.")
            first, end = (at * dtype.itemsize for at in span(box, shape))
        if first == end:
            return
        verify = verify and stored in self.hashes and stored not in self._right
        try:
            if self._remote:
                data = self._fetch_part(stored, first, end, verify)
            elif end - first == target.nbytes and target.dtype == dtype and is_plain(target):
                self._require_pass(stored, first, end, as_bytes(target).numpy().data, verify)
                return
            else:
                if verify:
                    self._require_pass(stored, first, end)
                start = self.data_start + self.placed[stored].start
                data = self._map()[start + first : start + end]
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
        target.copy_(from_bytes(data, dtype, ((end - first) // dtype.itemsize,)).as_strided(wanted, strides_of(shape)))

    def _require_pass(self, name: str, start: int, end: int, target: memoryview | None = None, verify: bool = True) -> None:
        if not self._pass(name, start, end, target, verify):
            raise CheckpointError(self._damage(name).reason)

    def _pass(self, name: str, start: int, end: int, target: memoryview | None = None, verify: bool = True) -> bool:
        """Go through a part of a tensor's bytes: check the blocks that it is in, and read it into ``target``.

        Returns:
            Whether all is there, and as it was written.
        """
        data_start, nbytes = self.data_start + self.placed[name].start, self._nbytes(name)
        expected, right = self.hashes.get(name), self._right_blocks.setdefault(name, set())
        block = _block(expected, nbytes)
        buffer: memoryview | None = None
        for number in range(start // block, -(-end // block)):
            position, stop = number * block, min((number + 1) * block, nbytes)
            to_check = verify and expected is not None and number not in right
            if not to_check:  # of this one only what is wanted
                position, stop = (max(position, start), min(stop, end)) if target is not None else (stop, stop)
            hasher = blake3()
            while position < stop:
                size = min(_CHUNK, stop - position)
                if target is not None and start <= position and position + size <= end:
                    piece = target[position - start : position - start + size]
                else:
                    buffer = buffer or memoryview(bytearray(_CHUNK))
                    piece = buffer[:size]
                done = os.preadv(self._descriptor, [piece], data_start + position)
                if not done:
                    return False
                if to_check:
                    hasher.update(piece[:done])  # while it is in the processor's cache
                if target is not None and piece.obj is not target.obj:
                    low, high = max(position, start), min(position + done, end)
                    if low < high:
                        target[low - start : high - start] = piece[low - position : high - position]
                position += done
            if to_check:
                assert expected is not None
                if hasher.hexdigest() != expected.block(number):
                    return False
                right.add(number)
        return True

    def _read(self, name: str) -> Tensor:
        dtype, placed = self._dtype(name), self.placed[name]
        start, end = self.data_start + placed.start, self.data_start + placed.end
        try:
            return from_bytes(self._bytes(name, start, end), dtype, self.shapes[name])
        except RuntimeError as error:  # a shape whose strides no machine can count
            raise CheckpointError(f"{name} in '{self.path}' cannot be a tensor: {error}.") from error

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self._kinds[name]
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {self.dtypes[name]}, which torch does not have.")
        return dtype

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
                self._right, self._right_blocks, self._stamp = set(), {}, stamp

    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        checkable = [name for name in names if name in self.hashes]
        units, total = self._units(checkable)
        threads = WORKERS if total > 4 * _CHUNK else 1
        wrong, stamp = set[str](), self._stamp
        try:
            run_in_threads(lambda number: wrong.update(self._wrong(units[number::threads], keep)), threads)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
        if not self._remote and self._stamp == stamp:  # else another thread has seen that the file is another one now
            self._right |= set(checkable) - wrong
        for name in self.shapes if wrong else ():
            if name in wrong:
                yield self._damage(name)

    @gc_paused()
    def _units(self, names: list[str]) -> tuple[list[tuple[str, int, int]], int]:
        """What a thread checks at a time (name, and where in its bytes it begins and ends), largest first; and how much."""
        units, total = list[tuple[str, int, int]](), 0
        for name in names:
            nbytes = self._nbytes(name)
            total += nbytes
            if nbytes <= _UNIT or self._remote or not self.hashes[name].blocks:
                units.append((name, 0, nbytes))
            else:
                units += [(name, start, min(start + _UNIT, nbytes)) for start in range(0, nbytes, _UNIT)]
        return sorted(units, key=lambda unit: unit[1] - unit[2]), total

    def _damage(self, name: str) -> Damage:
        return Damage(
            self.path.name,
            name,
            f"'{self.path}' is damaged: the bytes of {name!r} are not those that were written. Use another checkpoint, "
            "or fetch the file again.",
        )

    def _wrong(self, units: list[tuple[str, int, int]], keep: bool) -> Iterator[str]:
        """The tensors whose bytes are others; read in pieces, so that nothing is kept."""
        for name, start, end in units:
            if self._remote:
                fetched = self._fetch(name)
                right = self._agrees(name, fetched)
                if keep:
                    self._fetched[name] = fetched
            elif end <= _CHUNK:  # there may be a great many
                data = os.pread(self._descriptor, end, self.data_start + self.placed[name].start)
                right = blake3(data).hexdigest() == self.hashes[name].blake3
            else:
                right = self._pass(name, start, end)
            if not right:
                yield name

    def _agrees(self, name: str, data: bytes, first: int = 0) -> bool:
        """Whether these are a tensor's bytes, from block ``first`` on."""
        expected = self.hashes[name]
        block = _block(expected, len(data))
        return all(
            blake3(data[number * block : (number + 1) * block]).hexdigest() == expected.block(first + number)
            for number in range(max(-(-len(data) // block), 1))
        )

    def _nbytes(self, name: str) -> int:
        return self.placed[name].end - self.placed[name].start

    def _fetch(self, name: str) -> bytes:
        """The bytes of a tensor on remote storage."""
        placed = self.placed[name]
        return self._raw(self.path, self.data_start + placed.start, self.data_start + placed.end)

    def _fetch_part(self, name: str, start: int, end: int, verify: bool) -> Tensor:
        """Bytes of a tensor on remote storage, and no more of it than they are checked by."""
        data_start, nbytes = self.data_start + self.placed[name].start, self._nbytes(name)
        block = _block(self.hashes[name], nbytes) if verify else 1
        first, stop = start // block * block, min(-(-end // block) * block, nbytes)
        data = self._raw(self.path, data_start + first, data_start + stop)
        if len(data) < stop - first or (verify and not self._agrees(name, data, first // block)):
            raise CheckpointError(self._damage(name).reason)
        return torch.frombuffer(bytearray(data[start - first : end - first]), dtype=torch.uint8)

    def _raw(self, path: Path, start: int, end: int) -> bytes:
        if self._remote:
            return object_store.read_range(path, start, end)
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

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """As of any file; the tensor itself is asked: it may be sparse."""
        part: Tensor = self.tensor(name, verify=verify)[index].clone()
        return part

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

    def __init__(self, path: Path, entries: Mapping[str, ShardedTensor], opened: Callable[[str], TensorFile]) -> None:
        super().__init__(
            path,
            {name: entry.shape for name, entry in entries.items()},
            {name: entry.dtype for name, entry in entries.items()},
            {alias: name for name, entry in entries.items() for alias in entry.aliases},
            {},
        )
        self._entries, self._open = entries, opened

    def read_into(self, name: str, target: Tensor, box: Bounds | None = None, *, verify: bool = True) -> None:
        """As of any file; of a box, the pieces alone that have something of it are read and checked."""
        stored = self._stored_name(name)
        entry = self._entries[stored]
        box = all_of(entry.shape) if box is None else box
        for part in entry.layout.overlapping(box):
            file, piece = self.piece(stored, part)
            source, place = [], []
            for (start, end), at, size in zip(box, part.start, part.size, strict=True):
                first, last = max(start, at), min(end, at + size)
                source.append((first - at, last - at))
                place.append((first - start, last - start))
            file.read_into(piece, target[slices(place)], source, verify=verify)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if len(entry.layout.parts) == 1:
            file, piece = self.piece(name, entry.layout.parts[0])
            whole: Tensor = file.tensor(piece, verify=False)
            return whole
        dtype = dtype_called(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {entry.dtype}, which torch does not have.")
        return self._box(name, all_of(entry.shape), dtype, False)

    def _box(self, name: str, box: Bounds, dtype: torch.dtype, verify: bool) -> Tensor:
        for part in self._entries[name].layout.overlapping(box):
            self.piece(name, part)  # what is there has that size: nobody's word is taken for it
        return super()._box(name, box, dtype, verify)

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


def _block(expected: TensorHash | None, nbytes: int) -> int:
    """How many bytes of a tensor are checked together."""
    return BLOCK if expected is not None and expected.blocks else max(nbytes, 1)
