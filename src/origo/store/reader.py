"""Files -> named tensors: lazily, mapped, and each checked before it is used. Opening a file executes none of its content.

What a path is, is told from its content: a folder with a manifest, a .safetensors file (of Origo or not), or a state dict
that ``torch.save`` wrote.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pickle
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
    CONFIG,
    HEADER_KEY,
    MANIFEST,
    MODEL,
    FileEntry,
    Header,
    Manifest,
    TensorEntry,
    identity_of,
    is_file_name,
    many_objects,
    parse_json,
)
from origo.store.pickles import called, require_bounded
from origo.store.pieces import PIECES, Part, Pieced, Pieces, piece_file
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


class _TensorFiles:
    """The tensor files of a folder, each opened when it is asked for. What is in pieces holds this, not the checkpoint."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._opened: dict[str, TensorFile] = {}

    def open(self, file: str) -> TensorFile:
        if file not in self._opened:
            entry = self._manifest.files[file]
            with many_objects():
                opened = SafetensorsFile(self._path / file)
                if opened.data_start != entry.hashed or blake3(opened.start).hexdigest() != entry.blake3:
                    raise CheckpointError(f"'{self._path / file}' is damaged: its header is not what was written.")
                if file in self._manifest.tensors:
                    opened.adopt(self._manifest.tensors[file])
                else:
                    opened.adopt(Header.from_json(opened.metadata.get(HEADER_KEY, ""), str(opened.path)).tensors)
            self._opened[file] = opened
        return self._opened[file]


_NONE = Pieces({})


class Checkpoint:
    """Something with a model's weights in it, opened but not read; see :func:`read_checkpoint`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None = None,
        model: TensorFile | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        """Of a folder."""
        self._opened: dict[str, TensorFile] = {MODEL: model} if model is not None else {}
        self._files: _TensorFiles | None = None
        self._texts: dict[str, str] = dict(texts or {})
        self.config: Mapping[str, Any] | None = None
        """The model's configuration, where it is stored."""
        self.architecture: str | None = manifest.architecture if manifest else None
        """The name of the model class, where it is stored."""
        self.provenance: Mapping[str, Any] = manifest.provenance if manifest else {}
        """When, where and with which versions it was written, where that is stored."""
        self.origin: Any = None
        """Where somebody else's program wrote it, how that was understood (``origo.interop.opening.Origin``)."""
        self._identity = manifest.identity if manifest else ""

    @functools.cached_property
    def pieces(self) -> Pieces | None:
        """Which tensors are in pieces, where several processes wrote them; None where one did."""
        text = self.text(PIECES) if self.manifest is not None else None
        if text is None or self.manifest is None:
            return None
        return Pieces.read(text, self.manifest, str(self.path / PIECES))

    @property
    def holds(self) -> list[str]:
        """The files that it has; those in pieces under the name of the whole."""
        files = dict.fromkeys(self.manifest.files if self.manifest else ())
        if self.pieces is None:
            return list(files)
        return [*self.pieces.tensors, *(file for file in files if file not in self.pieces.files and file != PIECES)]

    @property
    def model(self) -> TensorFile:
        """The model's tensors."""
        return self.tensors(MODEL)

    @property
    def names(self) -> list[str]:
        """Canonical names of the model's tensors, aliases included."""
        return self.model.names

    @property
    def identity(self) -> str | None:
        """Equal for equal weights: a hash over the model's names, dtypes, shapes and bytes. None where no hashes are stored."""
        return self._identity or None

    def tensor(self, name: str, *, verify: bool = True) -> Tensor:
        """One of the model's tensors, read now, on the CPU, checked against its hash."""
        value = self.model.tensor(name, verify=verify)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} in '{self.path}' is a {type(value).__name__}, not a tensor.")
        return value

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """A slice of one of the model's tensors, as ``tensor(name)[index]``, without keeping the rest of it in memory."""
        return self.model.part(name, index, verify=verify)

    def text(self, file: str) -> str | None:
        """The content of one of the folder's other files (``"tokenizer.json"``), checked; None where there is none."""
        if file not in self._texts:
            if self.manifest is None or file not in self.manifest.files:
                return None
            content = self._checked(file)
            try:
                self._texts[file] = content.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"'{self.path / file}' is no text.") from error
        return self._texts[file]

    def tensors(self, file: str) -> TensorFile:
        """The tensors of another file of the folder (``"optimizer.safetensors"``)."""
        if file not in self._opened:
            if self.manifest is None or (file not in self._tensor_files and file not in (self.pieces or _NONE).tensors):
                raise CheckpointError(f"'{self.path}' holds no {file}: it has the model only.")
            self._files = self._files or _TensorFiles(self.path, self.manifest)
            if self.pieces is not None and file in self.pieces.tensors:
                self._opened[file] = PiecedFile(self.path / file, self.pieces.tensors[file], self._files.open)
            else:
                self._opened[file] = self._files.open(file)
        return self._opened[file]

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Read every byte and check it.

        Args:
            files: of a folder, these alone.

        Raises:
            CheckpointError: the first file or tensor that is not as it was written.
        """
        for damage in self.damages(files):
            raise CheckpointError(damage.reason)

    def damages(self, files: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)) -> Iterator[Damage]:
        """Everything that is not as it was written, found by reading every byte.

        Args:
            files: of a folder, these alone.
            share: of the tensors, as (which process, of how many); for what several processes check together.
        """
        if self.manifest is None:
            yield from self.model.damages()
            return
        names = list(self.manifest.files if files is None else files)
        if len(pieces := [name for name in names if self.pieces and name in self.pieces.files]) >= share[1] > 1:
            names = [name for name in names if name not in pieces] + self._share_of(pieces, *share)
            share = (0, 1)
        for file in names:
            try:
                if file in self._tensor_files or (self.pieces and file in self.pieces.tensors):
                    yield from self.tensors(file).damages(share)
                else:
                    self.text(file)
            except CheckpointError as error:
                yield Damage(file, None, str(error))
        if MODEL in self.manifest.tensors:
            identity = identity_of(self.manifest.tensors[MODEL])
        elif self.pieces is not None:
            identity = self.pieces.identity(self.manifest.files)
            yield from self._misfits(set(names))
        if identity != self._identity:
            yield Damage(MANIFEST, None, f"'{self.path / MANIFEST}' is damaged: its identity is not that of its tensors.")

    def _share_of(self, files: list[str], which: int, of_how_many: int) -> list[str]:
        """The files that one of several processes is to check: each as many bytes, about."""
        assert self.manifest is not None
        sizes = {file: self.manifest.files[file].bytes for file in files}
        loads, shares = [0] * of_how_many, [list[str]() for _ in range(of_how_many)]
        for file in sorted(files, key=lambda file: (-sizes[file], file)):
            least = loads.index(min(loads))
            loads[least] += sizes[file]
            shares[least].append(file)
        return shares[which]

    def _misfits(self, files: set[str]) -> Iterator[Damage]:
        """Of tensors in pieces: what these files hold otherwise than ``pieces.json`` says."""
        assert self.pieces is not None
        here: dict[tuple[str, int], list[Part]] = {}  # of each layout the parts in these files, found once
        for file, entries in self.pieces.tensors.items():
            opened = self.tensors(file)
            assert isinstance(opened, PiecedFile)
            for name, entry in entries.items():
                key = (file, id(entry.layout))
                if key not in here:
                    here[key] = [part for part in entry.layout.parts if piece_file(file, part.process) in files]
                for part in here[key]:
                    try:
                        opened.piece(name, part)
                    except CheckpointError as error:
                        yield Damage(piece_file(file, part.process), name, str(error))

    @property
    def _tensor_files(self) -> Iterable[str]:
        """Those with tensors of their own, those with pieces too."""
        assert self.manifest is not None
        return self.manifest.tensors if self.pieces is None else self.pieces.files

    def _checked(self, file: str) -> bytes:
        assert self.manifest is not None
        entry, path = self.manifest.files[file], self.path / file
        _check_size(path, entry)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
        if blake3(content).hexdigest() != entry.blake3:
            raise CheckpointError(f"'{path}' is damaged: its content is not what was written.")
        return content


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder, a checkpoint, a .safetensors file or a .pth state dict, lazily.

    Raises:
        CheckpointError: it is none of these, or its structure is damaged. Tensor bytes are checked when they are read.
    """
    path = remote.as_path(path)
    require_path(path)
    remote.refresh(path)
    if (path / MANIFEST).is_file() or path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}': check the path.")
    if remote.is_remote(path):
        start = remote.read_range(path, 0, 9)
    else:
        if not path.is_file():
            raise CheckpointError(f"'{path}' is neither a file nor a folder.")
        try:
            with path.open("rb") as file:
                start = file.read(9)
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if len(start) == 9 and start[8:] == b"{":
        return _open_single(path)
    if remote.is_remote(path):
        raise CheckpointError(
            f"'{path}' is no .safetensors file; files of other kinds are read from this machine: copy it here."
        )
    return Checkpoint(path, model=_open_pth(path))


def require_path(path: Path) -> None:
    """Refuse what no system can have: a name too long, or with a zero in it."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if not remote.is_remote(path):
            raise CheckpointError(f"'{str(path)[:80]!r}' cannot be read: {error}.") from error


@many_objects()
def _open_folder(path: Path) -> Checkpoint:
    manifest_path = path / MANIFEST
    manifest = Manifest.read(path)
    for file, entry in manifest.files.items():
        if not is_file_name(file):
            raise CheckpointError(f"The manifest '{manifest_path}' names a file outside its folder: {file!r}.")
        _check_size(path / file, entry)
    if not set(manifest.tensors) <= set(manifest.files):
        raise CheckpointError(f"The manifest '{manifest_path}' is damaged: it describes files that it does not list.")
    checkpoint = Checkpoint(path, manifest)
    if MODEL not in manifest.tensors and (checkpoint.pieces is None or MODEL not in checkpoint.pieces.tensors):
        raise CheckpointError(f"'{path}' holds no {MODEL}.")
    config = checkpoint.text(CONFIG)
    if config is not None:
        checkpoint.config = parse_json(config, f"'{path / CONFIG}'")
        if not isinstance(checkpoint.config, dict):
            raise CheckpointError(f"'{path / CONFIG}' is no configuration: it holds a {type(checkpoint.config).__name__}.")
    return checkpoint


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        if remote.is_remote(path):
            size = remote.size(path)
        else:
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"'{path}' is listed in the manifest but is no file of its folder's own.")
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"'{path}' is listed in the manifest but cannot be read: {error.strerror or error}.") from error
    if size != entry.bytes:
        raise CheckpointError(f"'{path}' is damaged: it has {size:,} bytes, {entry.bytes:,} were written.")


@many_objects()
def _open_single(path: Path) -> Checkpoint:
    opened = SafetensorsFile(path)
    checkpoint = Checkpoint(path, model=opened)
    if HEADER_KEY in opened.metadata:
        header = Header.from_json(opened.metadata[HEADER_KEY], str(path))
        opened.adopt(header.tensors)
        if identity_of(header.tensors) != header.identity:
            raise CheckpointError(f"'{path}' is damaged: its identity is not that of its tensors.")
        checkpoint.config, checkpoint.architecture = header.config, header.architecture
        checkpoint.provenance, checkpoint._identity = header.provenance, header.identity
    return checkpoint


_OLD_PICKLES = 4  # of a file from before torch 1.6: a magic number, a version, the system, and the object


def _open_pth(path: Path) -> TensorFile:
    state, is_zip = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}, not a state dict of named tensors.")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"'{path}' has no tensors at its top level; it has {', '.join(list(state)[:6])}.")
    return PickledFile(path, state, is_zip)


def read_pickle(path: Path) -> tuple[Any, bool]:
    """What ``torch.save`` wrote, by torch's machinery that runs nothing, and whether it is a zip, whose tensors are mapped.

    Raises:
        CheckpointError: it is damaged, out of all proportion, or asks for classes and functions; then it says which.
    """
    is_zip = False
    try:
        is_zip = zipfile.is_zipfile(path)  # since torch 1.6; files from before cannot be mapped
        if is_zip:
            _require_plain_zip(path)
        else:
            with path.open("rb") as file:
                require_bounded(file, path, _OLD_PICKLES)
        return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True), is_zip
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can make torch raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # the pickle asks for a class or function
            raise CheckpointError(
                f"'{path}' is not a plain state dict: reading it would run code that is stored in it"
                f"{_wanted(path, is_zip)}, so it was not read. Where it was made, save again with origo.save(model, path)."
            ) from error
        if not is_zip and _begins_as_a_zip(path):
            raise CheckpointError(
                f"'{path}' is cut short: it begins as a file of torch.save, and the list at its end is missing. Copy or "
                "download it again, or take an earlier one."
            ) from error
        reason = type(error).__name__ if is_zip else "it is neither safetensors nor written by torch.save"
        raise CheckpointError(f"'{path}' is no weight file, or it is damaged ({reason}).") from error


def _begins_as_a_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _wanted(path: Path, is_zip: bool) -> str:
    """What a pickle would have called, in words."""
    try:
        if is_zip:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        else:
            with path.open("rb") as file:
                names = called(file, _OLD_PICKLES)
    except Exception:  # it need not even be a whole pickle
        names = []
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f" (it asks for {', '.join(name[:80] for name in names[:6])}{more})" if names else ""


def _require_plain_zip(path: Path) -> None:
    """Refuse a zip that unpacks to more than it is: ``torch.save`` does not compress, and writes each part once."""
    archive = zipfile.ZipFile(path)
    parts = archive.infolist()
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise CheckpointError(
            f"'{path}' is a program of torch.jit.save: code, with the weights inside. It was not read; where it was made, save "
            "again with origo.save(model, path)."
        )
    unpacked = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or unpacked > path.stat().st_size:
        raise CheckpointError(f"'{path}' is a compressed zip ({unpacked:,} bytes unpacked), which torch.save does not write.")
    for part in parts:
        if part.filename.endswith("/data.pkl"):
            require_bounded(archive.read(part), path)
