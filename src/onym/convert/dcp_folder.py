"""Folders of torch.distributed.checkpoint: PyTorch's own FSDP sharding, torchtitan, OLMo-core, lingua, Accelerate with FSDP.

``.metadata`` is a pickle that records which chunk of which tensor is where in the ``.distcp`` files. Its unpickler
has stand-ins for the dozen classes in it, and nothing else. Each chunk is a ``torch.save`` of its own, opened with
``weights_only``. A tensor is assembled when it is asked for; the chunks of one are in memory at a time.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.errors import CheckpointError
from onym.format.layout import MOST_COMPARED, Layout, Shard
from onym.format.manifest import are_counts, is_file_name
from onym.format.pickles import named_in, require_bounded
from onym.format.pth import require_one_reading
from onym.format.safetensors import dtype_name
from onym.format.tensors import Damage, TensorFile
from onym.state.chunks import Chunk

METADATA = ".metadata"
_MOST_BYTES = 256 << 20

_M, _FS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_METADATA = (_M, "Metadata")
# The classes that a .metadata may name. None of them is looked up: each has a stand-in that stores what it is given.
_STOOD_IN = {
    _METADATA,
    *((_M, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((_M, name) for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (_FS, "_StorageInfo"),
    (_FS, "_StoragePrefix"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
}
# These are built-in types, which cannot be changed by what is built of them.
_BUILT_IN: dict[tuple[str, str], type] = {("torch", "Size"): tuple, ("collections", "OrderedDict"): OrderedDict}


def _no_bytes() -> bytes:
    """How a pickle writes empty bytes. It may not ask for a number of them."""
    return b""


_HARMLESS: list[Any] = [io.BytesIO, (_no_bytes, "builtins.bytes")]
"""What torch.load does not allow by itself, and people keep."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STOOD_IN:
            return self._classes.setdefault((module, name), _stand_in(name))
        if (module, name) in _BUILT_IN:
            return _BUILT_IN[module, name]
        if _is_dtype(module, name):
            return vars(torch)[name]
        raise _Refused

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(f"'{self._path}' refers to something outside itself, so it was not read.")

    def is_metadata(self, value: Any) -> bool:
        """Whether what was read is what such a file has to hold."""
        return type(value) is self._classes.get(_METADATA)


class _Refused(Exception):
    pass


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(vars(torch).get(name), torch.dtype)  # getattr would import some modules


def _stand_in(name: str) -> type:
    """A class of its own for one unpickler: a pickle can set what it likes on a class that it is given."""

    def restore(self: Any, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"dtype": state[0]})  # a tuple is TensorProperties'

    return type(name, (), {"__init__": lambda self, *values: None, "__setstate__": restore, "offset": None, "index": None})


def _asked_for(data: bytes) -> str:
    """What a pickle names that no such file does, in words."""
    named = [tuple(each.rsplit(".", 1)) for each in named_in(io.BytesIO(data), 1) if "." in each]
    known = _STOOD_IN | _BUILT_IN.keys()
    wanted = [f"{module}.{name}"[:80] for module, name in named if (module, name) not in known and not _is_dtype(module, name)]
    return ", ".join(wanted[:6]) + (f" and {len(wanted) - 6} more" if len(wanted) > 6 else "")


@dataclass(frozen=True)
class _StoredChunk:
    chunk: Chunk
    file: str
    offset: int
    """In bytes, as the length."""
    length: int


def open_distributed(path: Path, metadata_file: str = METADATA, *, partial: bool = False) -> Distributed:
    """The tensors of a folder with a ``.metadata``.

    Args:
        path: the folder.
        metadata_file: the file in it that says where everything is.
        partial: one rank wrote it for itself, so chunks may be missing.

    Raises:
        CheckpointError: it is damaged, incomplete, or asks for code.
    """
    metadata = _metadata(path / metadata_file)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    chunks: dict[str, list[_StoredChunk]] = {}
    objects: dict[str, _StoredChunk] = {}
    sizes: dict[str, int] = {}
    lengths: Counter[str] = Counter()
    budget = [MOST_COMPARED]
    try:
        where = {
            (index.fqn, tuple(index.offset) if index.offset is not None else None): info
            for index, info in metadata.storage_data.items()
        }
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):  # a number or an object, of a torch.save of its own
                info = where.get((name, None))
                if info is not None and is_file_name(info.relative_path) and are_counts((info.offset, info.length)):
                    objects[name] = _StoredChunk(Chunk((), ()), info.relative_path, info.offset, info.length)
                continue
            if not isinstance(name, str) or not are_counts(entry.size):
                raise CheckpointError(f"'{path / METADATA}' is damaged: it has no shape for {str(name)[:80]}.")
            shapes[name] = tuple(entry.size)
            dtypes[name] = dtype_name(entry.properties.dtype)
            chunks[name] = []
            for each in entry.chunks:
                chunk = Chunk(tuple(each.offsets), tuple(each.sizes))
                info = where.get((name, chunk.offsets)) or where.get((name, None))
                if info is None:
                    raise CheckpointError(f"'{path}' is incomplete: nothing says where a chunk of {name} is.")
                counts = (info.offset, info.length, *chunk.offsets, *chunk.sizes)
                if not is_file_name(info.relative_path) or not are_counts(counts):
                    raise CheckpointError(f"'{path / METADATA}' names a place outside its folder for {name}.")
                chunks[name].append(_StoredChunk(chunk, info.relative_path, info.offset, info.length))
                file = path / info.relative_path
                if info.relative_path not in sizes:
                    sizes[info.relative_path] = file.stat().st_size if file.is_file() else -1
                if sizes[info.relative_path] < info.offset + info.length:
                    how = "is missing" if sizes[info.relative_path] < 0 else "is shorter than it was written"
                    raise CheckpointError(f"'{file}' {how}, and holds a chunk of {name}: fetch it again, or take another step.")
                lengths[info.relative_path] += info.length
                if lengths[info.relative_path] > sizes[info.relative_path]:
                    raise CheckpointError(f"'{path / METADATA}' is damaged: it has more in '{file.name}' than there is.")
            layout = Layout.of([Shard(0, each.chunk) for each in chunks[name]])
            if problem := layout.problem(shapes[name], budget, partial=partial):
                raise CheckpointError(f"{name} in '{path}' {problem}.")
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path / METADATA}' is damaged, or of a kind that is not known here ({error}).") from error
    paths = getattr(metadata, "planner_data", None)
    return Distributed(path, shapes, dtypes, chunks, objects, paths if isinstance(paths, dict) else None)


def _metadata(path: Path) -> Any:
    try:
        data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not data:
        raise CheckpointError(f"'{path}' is empty, or larger than any list of tensors: a save may have been cut short.")
    try:
        require_bounded(data, path)
        unpickler = _Unpickler(data, path)
        metadata = unpickler.load()
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(
            f"'{path}' asks for {_asked_for(data)}, which no checkpoint needs: it would run code, so it was not read."
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"'{path}' is damaged ({type(error).__name__}).") from error
    if not unpickler.is_metadata(metadata) or getattr(metadata, "storage_data", None) is None:
        raise CheckpointError(f"'{path}' is no metadata of torch.distributed.checkpoint.")
    return metadata


class _Slice(io.RawIOBase):
    """A part of a file as a file, so that it need not be in memory to be read."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(wanted) or 0
        self._at += count
        return count


class Distributed(TensorFile):
    """The tensors of such a folder, and what else is in it."""

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
        chunks: dict[str, list[_StoredChunk]],
        objects: dict[str, _StoredChunk],
        paths: dict[str, Any] | None,
    ) -> None:
        super().__init__(path, shapes, dtypes, {}, {})
        self.chunks, self.objects = chunks, objects
        self.paths = paths
        """Full names -> the keys that lead to them in nested dicts, where it is recorded."""

    def chunk(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        """One chunk of a tensor."""
        return self._values(name, next(each for each in self.chunks[name] if each.chunk.offsets == offsets))

    def value(self, name: str) -> Any:
        """What is no tensor: plain values, and what ``torch.serialization.safe_globals`` allows."""
        return self._loaded(name, self.objects[name])

    def _read(self, name: str) -> Tensor:
        chunks = self.chunks[name]
        first = self._values(name, chunks[0])
        if len(chunks) == 1 and first.shape == self.shapes[name]:
            return first
        full = torch.empty(self.shapes[name], dtype=first.dtype, device="cpu")
        for stored in chunks:
            values = first if stored is chunks[0] else self._values(name, stored)
            place = full[stored.chunk.slices]
            if place.shape != values.shape or values.dtype != full.dtype:
                raise CheckpointError(f"A chunk of {name} in '{self.path / stored.file}' has another shape than is said of it.")
            place.copy_(values)
        return full

    def _loaded(self, name: str, stored: _StoredChunk) -> Any:
        path = self.path / stored.file
        try:
            with path.open("rb", buffering=0) as file, io.BufferedReader(_Slice(file, stored.offset, stored.length)) as part:
                archive = zipfile.ZipFile(part)
                if sum(each.file_size for each in archive.infolist()) > stored.length or archive.testzip() is not None:
                    raise CheckpointError(f"'{path}' is damaged: a chunk of {name} is not what was written.")
                require_one_reading(archive, path)
                for each in archive.infolist():
                    if each.filename.endswith("/data.pkl"):
                        require_bounded(archive.read(each), path)
                part.seek(0)
                with torch.serialization.safe_globals(_HARMLESS):
                    return torch.load(part, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None or name in self.chunks:  # a tensor names no class
                reason = type(error).__name__
                raise CheckpointError(f"'{path}' is damaged: a chunk of {name} cannot be read ({reason}).") from error
            raise CheckpointError(
                f"{name} in '{self.path}' needs {asked[1][:80]}, which is not looked up, because that would run code: allow it "
                "with torch.serialization.safe_globals if you trust the file, or leave it out of what is loaded."
            ) from error
        except Exception as error:  # a damaged chunk can make torch raise nearly anything
            raise CheckpointError(f"'{path}' is damaged: a chunk of {name} cannot be read ({type(error).__name__}).") from error

    def _values(self, name: str, stored: _StoredChunk) -> Tensor:
        value = self._loaded(name, stored)
        if not isinstance(value, Tensor) or value.shape != stored.chunk.sizes:
            path = self.path / stored.file
            raise CheckpointError(f"'{path}' is damaged: what it holds as a chunk of {name} is none.")
        return value.detach()

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        for name in names:
            for stored in self.chunks[name]:
                try:
                    self._values(name, stored)
                except CheckpointError as error:
                    yield Damage(stored.file, name, str(error))
