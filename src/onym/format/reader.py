"""Open what is at a path; tensors and texts are read when they are asked for. Opening executes none of its content.

The kind of a file is recognised by its content: a folder with a manifest, a .safetensors file (of Onym or not), or a state dict
that ``torch.save`` wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from onym.errors import CheckpointError
from onym.format.chunk_index import CHUNKS, ChunkIndex
from onym.format.extra_state import with_extra_state
from onym.format.layout import Shard, shard_file
from onym.format.manifest import (
    CONFIG,
    HEADER_KEY,
    MANIFEST,
    MODEL,
    FileEntry,
    Header,
    Manifest,
    gc_paused,
    identity_of,
    is_file_name,
    main_file,
    parse_json,
)
from onym.format.safetensors import begins_file
from onym.format.safetensors_file import open_safetensors
from onym.format.sharded_file import ShardedFile
from onym.format.tensors import Damage, TensorFile
from onym.storage.paths import as_path, is_local, storage_of

if TYPE_CHECKING:
    from torch import Tensor


class _TensorFiles:
    """The tensor files of a folder, each opened when it is asked for. Sharded files hold this, not the checkpoint."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._opened: dict[str, TensorFile] = {}

    def open(self, file: str) -> TensorFile:
        if file not in self._opened:
            entry = self._manifest.files[file]
            with gc_paused():
                opened = open_safetensors(self._path / file)
                if opened.data_start != entry.hashed or blake3(opened.start).hexdigest() != entry.blake3:
                    raise CheckpointError(f"'{self._path / file}' is damaged: its header is not what was written.")
                if file in self._manifest.tensors:
                    opened.adopt(self._manifest.tensors[file])
                else:
                    opened.adopt(Header.from_json(opened.metadata.get(HEADER_KEY, ""), str(opened.path)).tensors)
            self._opened[file] = with_extra_state(opened)
        return self._opened[file]


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
        """Where somebody else's program wrote it, how that was understood (``onym.convert.opening.Origin``)."""
        self._identity = manifest.identity if manifest else ""

    @functools.cached_property
    def chunk_index(self) -> ChunkIndex | None:
        """Which rank wrote which chunk of which tensor; None where one process wrote all."""
        text = self.text(CHUNKS) if self.manifest is not None else None
        if text is None or self.manifest is None:
            return None
        return ChunkIndex.read(text, self.manifest, str(self.path / CHUNKS))

    @property
    def holds(self) -> list[str]:
        """The files that it has; shards under the name of the file that they are shards of."""
        files = list(self.manifest.files if self.manifest else ())
        if self.chunk_index is None:
            return files
        return [*self.chunk_index.tensors, *(file for file in files if file not in self.chunk_index.files and file != CHUNKS)]

    @property
    def model(self) -> TensorFile:
        """The model's tensors."""
        return self.tensors(MODEL if self.manifest is None else main_file(self.manifest.tensors))

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
        from torch import Tensor

        from onym.state.composite import Unbuilt

        value = self.model.tensor(name, verify=verify)
        if isinstance(value, Unbuilt):
            raise CheckpointError(
                f"{name!r} in '{self.path}' is a {value.class_name}, which only a model that has one can build: "
                "onym.load(path, into=model)."
            )
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
            sharded = self.chunk_index.tensors.get(file) if self.chunk_index else None
            if file == MODEL and self.chunk_index and sharded is None:
                keys = ", ".join(self.chunk_index.keys) or "nothing"
                raise CheckpointError(
                    f"'{self.path}' holds no model that is known by its name; it has {keys}. part= (--part) opens one of "
                    "them, dcp.load with onym.DCPReader loads all; a model that is saved as {'model': ...} is opened at once."
                )
            if self.manifest is None or (sharded is None and file not in self._tensor_files):
                raise CheckpointError(f"'{self.path}' holds no {file}: it has the model only.")
            self._files = self._files or _TensorFiles(self.path, self.manifest)
            if sharded is None:
                self._opened[file] = self._files.open(file)
            else:
                self._opened[file] = ShardedFile(self.path / file, sharded, self._files.open)
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

    def damages(self, files: Iterable[str] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Damage]:
        """Everything that is not as it was written, found by reading every byte.

        Args:
            files: of a folder, these alone.
            rank, world_size: of several ranks that check together each checks some of the tensors.
        """
        if self.manifest is None:
            yield from self.model.damages()
            return
        names = list(self.manifest.files if files is None else files)
        shards = [name for name in names if self.chunk_index and name in self.chunk_index.files]
        if len(shards) >= world_size > 1:  # each rank some of the files, rather than some tensors of each file
            names = [name for name in names if name not in shards] + self._some_of(shards, rank, world_size)
            rank, world_size = 0, 1
        for file in names:
            try:
                if file in self._tensor_files or (self.chunk_index and file in self.chunk_index.tensors):
                    yield from self.tensors(file).damages(rank, world_size)
                else:
                    self.text(file)
            except CheckpointError as error:
                yield Damage(file, None, str(error))
        identity = self._identity
        if (main := main_file(self.manifest.tensors)) in self.manifest.tensors:
            identity = identity_of(self.manifest.tensors[main])
        elif self.chunk_index is not None:
            identity = self.chunk_index.identity(self.manifest.files)
            yield from self._misfits(set(names))
        if identity != self._identity:
            yield Damage(MANIFEST, None, f"'{self.path / MANIFEST}' is damaged: its identity is not that of its tensors.")

    def _some_of(self, files: list[str], rank: int, world_size: int) -> list[str]:
        """The files that a rank checks: each about as many bytes."""
        assert self.manifest is not None
        sizes = {file: self.manifest.files[file].bytes for file in files}
        loads, parts = [0] * world_size, [list[str]() for _ in range(world_size)]
        for file in sorted(files, key=lambda file: (-sizes[file], file)):
            least = loads.index(min(loads))
            loads[least] += sizes[file]
            parts[least].append(file)
        return parts[rank]

    def _misfits(self, files: set[str]) -> Iterator[Damage]:
        """Shards that these files do not hold as ``chunks.json`` describes them."""
        assert self.chunk_index is not None
        here: dict[tuple[str, int], list[Shard]] = {}  # of each layout the shards in these files, found once
        for file, entries in self.chunk_index.tensors.items():
            opened = self.tensors(file)
            assert isinstance(opened, ShardedFile)
            for name, entry in entries.items():
                key = (file, id(entry.layout))
                if key not in here:
                    here[key] = [shard for shard in entry.layout.shards if shard_file(file, shard.rank) in files]
                for shard in here[key]:
                    try:
                        opened.find(name, shard)
                    except CheckpointError as error:
                        yield Damage(shard_file(file, shard.rank), name, str(error))

    @property
    def _tensor_files(self) -> Iterable[str]:
        """The .safetensors files of Onym."""
        assert self.manifest is not None
        return self.manifest.tensors if self.chunk_index is None else self.chunk_index.files

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
    path = as_path(path)
    require_path(path)
    storage = storage_of(path)
    if storage.has_folder(path, MANIFEST) or path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}': check the path.")
    if not path.is_file():
        raise CheckpointError(f"'{path}' is neither a file nor a folder.")
    try:
        file = storage.open_file(path)
        start, nbytes = file.read(0, 9), file.nbytes
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if begins_file(start, nbytes):
        return _open_single(path)
    if not storage.is_local:
        raise CheckpointError(
            f"'{path}' is no .safetensors file; files of other kinds are read from this machine: copy it here."
        )
    from onym.format.pth import open_pth  # with torch, which the other kinds do not need

    return Checkpoint(path, model=open_pth(path))


def require_path(path: Path) -> None:
    """Refuse what no system can have: a name too long, or with a zero in it."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if is_local(path):
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{str(path)[:80]!r} cannot be read or written: {reason}.") from error


@gc_paused()
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
    if main_file(manifest.tensors) not in manifest.tensors and checkpoint.chunk_index is None:
        raise CheckpointError(f"'{path}' holds no {MODEL}.")
    config = checkpoint.text(CONFIG)
    if config is not None:
        checkpoint.config = parse_json(config, f"'{path / CONFIG}'")
        if not isinstance(checkpoint.config, dict):
            raise CheckpointError(f"'{path / CONFIG}' is no configuration: it holds a {type(checkpoint.config).__name__}.")
    return checkpoint


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = storage_of(path).size(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' is listed in the manifest but cannot be read: {error.strerror or error}.") from error
    if size != entry.bytes:
        raise CheckpointError(f"'{path}' is damaged: it has {size:,} bytes, {entry.bytes:,} were written.")


@gc_paused()
def _open_single(path: Path) -> Checkpoint:
    opened = open_safetensors(path)
    checkpoint = Checkpoint(path, model=opened)
    if HEADER_KEY in opened.metadata:
        header = Header.from_json(opened.metadata[HEADER_KEY], str(path))
        opened.adopt(header.tensors)
        if identity_of(header.tensors) != header.identity:
            raise CheckpointError(f"'{path}' is damaged: its identity is not that of its tensors.")
        checkpoint.config, checkpoint.architecture = header.config, header.architecture
        checkpoint.provenance, checkpoint._identity = header.provenance, header.identity
    checkpoint._opened[MODEL] = with_extra_state(opened)
    return checkpoint
