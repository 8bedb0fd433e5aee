"""What is at a path -> its tensors and texts, opened and not yet read (``files.py``). Opening executes none of its content.

What a path is, is told from its content: a folder with a manifest, a .safetensors file (of Onym or not), or a state dict
that ``torch.save`` wrote.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from onym.errors import CheckpointError
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
    parse_json,
)
from onym.format.pickles import called, require_bounded
from onym.format.sharded_tensor import PIECES, Part, Pieces, piece_file
from onym.format.tensors import Damage, PickledFile, PiecedFile, SafetensorsFile, TensorFile
from onym.storage import object_store


class _TensorFiles:
    """The tensor files of a folder, each opened when it is asked for. What is in pieces holds this, not the checkpoint."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._opened: dict[str, TensorFile] = {}

    def open(self, file: str) -> TensorFile:
        if file not in self._opened:
            entry = self._manifest.files[file]
            with gc_paused():
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
        """Where somebody else's program wrote it, how that was understood (``onym.convert.opening.Origin``)."""
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
    path = object_store.as_path(path)
    require_path(path)
    object_store.refresh(path)
    if (path / MANIFEST).is_file() or path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}': check the path.")
    if object_store.is_remote(path):
        start = object_store.read_range(path, 0, 9)
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
    if object_store.is_remote(path):
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
        if not object_store.is_remote(path):
            raise CheckpointError(f"'{str(path)[:80]!r}' cannot be read: {error}.") from error


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
        if object_store.is_remote(path):
            size = object_store.size(path)
        else:
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"'{path}' is listed in the manifest but is no file of its folder's own.")
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"'{path}' is listed in the manifest but cannot be read: {error.strerror or error}.") from error
    if size != entry.bytes:
        raise CheckpointError(f"'{path}' is damaged: it has {size:,} bytes, {entry.bytes:,} were written.")


@gc_paused()
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
                f"{_wanted(path, is_zip)}, so it was not read. Where it was made, save again with onym.save(model, path)."
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
            "again with onym.save(model, path)."
        )
    unpacked = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or unpacked > path.stat().st_size:
        raise CheckpointError(f"'{path}' is a compressed zip ({unpacked:,} bytes unpacked), which torch.save does not write.")
    for part in parts:
        if part.filename.endswith("/data.pkl"):
            require_bounded(archive.read(part), path)
