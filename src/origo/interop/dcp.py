"""Folders of torch.distributed.checkpoint: PyTorch's own FSDP sharding, torchtitan, OLMo-core, lingua, Accelerate with FSDP.

``.metadata`` is a pickle that says which piece of which tensor is where in the ``.distcp`` files; it is opened by an unpickler
that knows those dozen classes and no others. Each piece is a ``torch.save`` of its own, opened with ``weights_only``. A tensor
is put together when it is asked for; the pieces of one are in memory at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from origo.errors import CheckpointError
from origo.store.layout import are_counts, is_file_name
from origo.store.pickles import require_bounded
from origo.store.reader import Damage, TensorFile
from origo.store.tensorfile import dtype_name

METADATA = ".metadata"
_MOST_BYTES = 256 << 20

_M, _FS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
# Everything that a .metadata may name: dataclasses, enumerations and dtypes, whose making runs no code of the file's.
_ALLOWED = {
    *(
        (_M, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (_FS, "_StorageInfo"),
    (_FS, "_StoragePrefix"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib" or module.startswith("pathlib."):
            return str if (module, name) not in _ALLOWED else _joined_path
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"'{self._path}' asks for {module}.{name}, which no checkpoint needs: it would run code, so it was not read."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(f"'{self._path}' refers to something outside itself, so it was not read.")


def _joined_path(*parts: str) -> str:
    return "/".join(parts)


@dataclass(frozen=True)
class _Piece:
    file: str
    offset: int
    length: int
    start: tuple[int, ...]
    """Where in the whole tensor it begins."""
    shape: tuple[int, ...]


def open_distributed(path: Path) -> TensorFile:
    """The tensors of a folder with a ``.metadata``.

    Raises:
        CheckpointError: it is damaged, incomplete, or asks for code.
    """
    metadata = _metadata(path / METADATA)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    pieces: dict[str, list[_Piece]] = {}
    sizes: dict[str, int] = {}
    try:
        where = {
            (index.fqn, tuple(index.offset) if index.offset is not None else None): info
            for index, info in metadata.storage_data.items()
        }
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):  # a number or an object: torch.save'd, and not needed
                continue
            shapes[name] = tuple(entry.size)
            dtypes[name] = dtype_name(entry.properties.dtype)
            pieces[name] = []
            for chunk in entry.chunks:
                start, shape = tuple(chunk.offsets), tuple(chunk.sizes)
                info = where.get((name, start)) or where.get((name, None))
                if info is None:
                    raise CheckpointError(f"'{path}' is incomplete: nothing says where a piece of {name} is.")
                if not is_file_name(info.relative_path) or not are_counts((info.offset, info.length, *start, *shape)):
                    raise CheckpointError(f"'{path / METADATA}' names a place outside its folder for {name}.")
                pieces[name].append(_Piece(info.relative_path, info.offset, info.length, start, shape))
                file = path / info.relative_path
                if info.relative_path not in sizes:
                    sizes[info.relative_path] = file.stat().st_size if file.is_file() else -1
                if sizes[info.relative_path] < info.offset + info.length:
                    how = "is missing" if sizes[info.relative_path] < 0 else "is shorter than it was written"
                    raise CheckpointError(f"'{file}' {how}, and holds a piece of {name}: fetch it again, or take another step.")
            if sum(math.prod(each.shape) for each in pieces[name]) != math.prod(shapes[name]):
                raise CheckpointError(f"'{path}' is incomplete: the pieces of {name} are not all of it.")
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path / METADATA}' is damaged, or of a kind that is not known here ({error}).") from error
    return _Distributed(path, shapes, dtypes, pieces)


def _metadata(path: Path) -> Any:
    try:
        data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not data:
        raise CheckpointError(f"'{path}' is empty, or larger than any list of tensors: a save may have been cut short.")
    try:
        require_bounded(data, path)
        metadata = _Unpickler(data, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"'{path}' is damaged ({type(error).__name__}).") from error
    if type(metadata).__name__ != "Metadata" or not metadata.storage_data:
        raise CheckpointError(f"'{path}' is no metadata of torch.distributed.checkpoint.")
    return metadata


class _Distributed(TensorFile):
    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], pieces: dict[str, list[_Piece]]
    ) -> None:
        super().__init__(path, shapes, dtypes, {}, {})
        self._pieces = pieces

    def _read(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        first = self._piece(name, pieces[0])
        if len(pieces) == 1 and first.shape == self.shapes[name]:
            return first
        whole = torch.empty(self.shapes[name], dtype=first.dtype, device="cpu")
        for piece in pieces:
            values = first if piece is pieces[0] else self._piece(name, piece)
            place = tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))
            if whole[place].shape != values.shape or values.dtype != whole.dtype:
                raise CheckpointError(f"A piece of {name} in '{self.path / piece.file}' has another shape than is said of it.")
            whole[place] = values
        return whole

    def _piece(self, name: str, piece: _Piece) -> Tensor:
        path = self.path / piece.file
        try:
            with path.open("rb") as file:
                file.seek(piece.offset)
                data = file.read(piece.length)
            archive = zipfile.ZipFile(io.BytesIO(data))
            if sum(part.file_size for part in archive.infolist()) > len(data) or archive.testzip() is not None:
                raise CheckpointError(f"'{path}' is damaged: a piece of {name} is not what was written.")
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged piece can make torch raise nearly anything
            raise CheckpointError(f"'{path}' is damaged: a piece of {name} cannot be read ({type(error).__name__}).") from error
        if not isinstance(value, Tensor) or value.shape != piece.shape:
            raise CheckpointError(f"'{path}' is damaged: what it holds as a piece of {name} is none.")
        return value.detach()

    def _check(self, names: list[str], *, keep: bool = True) -> Iterator[Damage]:
        for name in names:
            for piece in self._pieces[name]:
                try:
                    self._piece(name, piece)
                except CheckpointError as error:
                    yield Damage(piece.file, name, str(error))
