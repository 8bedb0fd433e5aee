"""Files -> named tensors: lazily, mapped, and each checked before it is used. Opening a file executes none of its content.

What a path is, is told from its content: a folder with a manifest, a .safetensors file (of Origo or not), or a state dict
that ``torch.save`` wrote.
"""

from __future__ import annotations

import functools
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from origo.errors import CheckpointError
from origo.state.model import describe
from origo.store.layout import CONFIG, HEADER_KEY, MANIFEST, MODEL, Header, HeaderTensor, Manifest, TensorEntry
from origo.store.writer import DTYPE_NAMES, file_entry, tensor_hash


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file.

    ``tensor(name)`` reads one, under its own name or an alias, and checks it against its hash unless told otherwise.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """Of every stored tensor."""
    dtypes: Mapping[str, str]
    """Of every stored tensor, under torch's names."""
    aliases: Mapping[str, str]
    """Further names of tied tensors -> the name they are stored under."""
    hashes: Mapping[str, str]
    """BLAKE3 of each tensor's bytes; a name without one cannot be checked."""
    _read: Callable[[str], Any] = field(repr=False)
    _check: Callable[[], None] = field(repr=False, default=lambda: None)
    """Checks the file as a whole, where its format has a checksum for that; cheap after the first call."""
    versions: Mapping[str, Any] | None = None
    """The layout versions of the modules by their path, where the file keeps them (``.pth``)."""

    @property
    def names(self) -> list[str]:
        """All names, aliases included."""
        return [*self.shapes, *self.aliases]

    def tensor(self, name: str, *, verify: bool = True) -> Any:
        """One tensor (or, from a .pth, whatever is stored under that name), on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or its bytes are not those that were written.
        """
        stored_name = self.aliases.get(name, name)
        if stored_name not in self.shapes:
            raise CheckpointError(f"'{self.path}' holds no tensor {name!r}.")
        if verify:
            self._check()
        try:
            value = self._read(stored_name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"The tensor {name!r} cannot be read from '{self.path}': {error}.") from error
        if verify and (expected := self.hashes.get(stored_name)) is not None and tensor_hash(value) != expected:
            raise CheckpointError(
                f"'{self.path}' is damaged: the bytes of {stored_name!r} are not those that were written. Use another "
                "checkpoint, or fetch the file again."
            )
        return value

    def state(self, *, verify: bool = True) -> dict[str, Any]:
        """All tensors by name; tied ones are one object."""
        state: OrderedDict[str, Any] = OrderedDict((name, self.tensor(name, verify=verify)) for name in self.shapes)
        state.update({alias: state[name] for alias, name in self.aliases.items()})
        if self.versions is not None:
            state._metadata = self.versions  # type: ignore[attr-defined]
        return state


@dataclass(frozen=True)
class Checkpoint:
    """Something with a model's weights in it, opened but not read; see :func:`read_checkpoint`."""

    path: Path
    model: TensorFile
    config: Mapping[str, Any] | None = None
    """The model's configuration, where it is stored."""
    architecture: str | None = None
    """The name of the model class, where it is stored."""
    manifest: Manifest | None = None
    """Of a folder."""

    @property
    def names(self) -> list[str]:
        """Canonical names of the model's tensors, aliases included."""
        return self.model.names

    def tensor(self, name: str, *, verify: bool = True) -> Tensor:
        """One of the model's tensors, read now, on the CPU, checked against its hash."""
        value = self.model.tensor(name, verify=verify)
        assert isinstance(value, Tensor)
        return value

    def text(self, file: str) -> str | None:
        """The content of one of the folder's other files (``"tokenizer.json"``), checked; None where there is none."""
        if self.manifest is None or file not in self.manifest.files:
            return None
        self._check_file(file)
        return (self.path / file).read_text(encoding="utf-8")

    def tensors(self, file: str) -> TensorFile:
        """The tensors of another file of the folder (``"optimizer.safetensors"``)."""
        if self.manifest is None or file not in self.manifest.tensors:
            raise CheckpointError(f"'{self.path}' holds no {file}: it has the model only.")
        return _open_listed(self.path, file, self.manifest)

    def verify(self) -> None:
        """Read every byte and check it.

        Raises:
            CheckpointError: the first file or tensor that is not as it was written.
        """
        if self.manifest is not None:
            for file in self.manifest.files:  # a file's hash covers its tensors
                self._check_file(file)
        else:
            self.model.state(verify=True)

    def _check_file(self, file: str) -> None:
        assert self.manifest is not None
        entry, path = self.manifest.files[file], self.path / file
        _check_size(path, entry.bytes)
        try:
            found = file_entry(path)
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
        if found != entry:
            raise CheckpointError(f"'{path}' is damaged: its content is not what was written.")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder, a checkpoint, a .safetensors file or a .pth state dict, lazily.

    Raises:
        CheckpointError: it is none of these, or its structure is damaged. Tensor bytes are checked when they are read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}': check the path.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if len(start) == 9 and start[8:] == b"{":
        tensors, header = _open_safetensors(path)
        return Checkpoint(path, tensors, header.config if header else None, header.architecture if header else None)
    return Checkpoint(path, _open_pth(path))


def _open_folder(path: Path) -> Checkpoint:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(
            f"The folder '{path}' holds no {MANIFEST}: it is no checkpoint, or its writing was never completed."
        )
    try:
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"), str(manifest_path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The manifest '{manifest_path}' cannot be read: {error}.") from error
    for file, entry in manifest.files.items():
        if Path(file).name != file:
            raise CheckpointError(f"The manifest '{manifest_path}' names a file outside its folder: {file!r}.")
        _check_size(path / file, entry.bytes)
    if MODEL not in manifest.tensors:
        raise CheckpointError(f"'{path}' holds no {MODEL}.")
    opened = Checkpoint(path, _open_listed(path, MODEL, manifest), None, manifest.architecture, manifest)
    config_text = opened.text(CONFIG)
    return Checkpoint(
        path, opened.model, json.loads(config_text) if config_text is not None else None, manifest.architecture, manifest
    )


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"'{path}' is listed in the manifest but cannot be read: {error.strerror}.") from error
    if size != expected:
        raise CheckpointError(f"'{path}' is damaged: it has {size:,} bytes, {expected:,} were written.")


def _open_listed(folder: Path, file: str, manifest: Manifest) -> TensorFile:
    """A tensor file of a folder, held against the manifest."""
    found, _ = _open_safetensors(folder / file)
    entries = manifest.tensors[file]
    _require_listed(found, entries)
    return TensorFile(
        found.path,
        {name: found.shapes[name] for name in entries},  # in the order of the model, where the file sorts them
        found.dtypes,
        {alias: name for name, entry in entries.items() for alias in entry.aliases},
        {name: entry.blake3 for name, entry in entries.items()},
        found._read,
    )


def _require_listed(file: TensorFile, entries: Mapping[str, TensorEntry] | Mapping[str, HeaderTensor]) -> None:
    """Hold a file's own header against what was recorded when it was written."""
    found = {name: (file.dtypes[name], list(shape)) for name, shape in file.shapes.items()}
    if found != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
        raise CheckpointError(f"'{file.path}' is damaged: it holds other tensors than were written.")


def _open_safetensors(path: Path) -> tuple[TensorFile, Header | None]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' is damaged, or no .safetensors file: {error}.") from error
    metadata: dict[str, str] = file.metadata() or {}
    header = Header.from_json(metadata[HEADER_KEY], str(path)) if HEADER_KEY in metadata else None
    names = list(header.tensors) if header else sorted(file.keys())  # the model's order, where the file sorts them
    if set(names) != set(file.keys()):
        raise CheckpointError(f"'{path}' is damaged: it holds other tensors than were written.")
    slices = {name: file.get_slice(name) for name in names}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    dtypes = {name: DTYPE_NAMES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
    # Stock safetensors records a tied tensor's further names as metadata entries: further name -> stored name.
    aliases = {alias: name for alias, name in metadata.items() if name in shapes and alias not in shapes}
    hashes = {name: entry.blake3 for name, entry in header.tensors.items()} if header else {}
    opened = TensorFile(path, shapes, dtypes, aliases, hashes, file.get_tensor)
    if header:
        _require_listed(opened, header.tensors)
    return opened, header


def _open_pth(path: Path) -> TensorFile:
    is_zip = False
    try:
        is_zip = zipfile.is_zipfile(path)  # since torch 1.6; files from before cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # a damaged file can make torch raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # the pickle asks for a class or function
            raise CheckpointError(
                f"'{path}' is not a plain state dict: reading it would run code that is stored in it, so it was not read. "
                "Where it was made, save again with origo.save(model, path)."
            ) from error
        reason = type(error).__name__ if is_zip else "it is neither safetensors nor written by torch.save"
        raise CheckpointError(f"'{path}' is no weight file, or it is damaged ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}, not a state dict of named tensors.")
    if set(state) == {"state", "param_groups"}:
        raise CheckpointError(f"'{path}' holds the state of an optimizer, not of a model: give the model's file.")
    if not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((name for name, value in state.items() if isinstance(value, dict)), None)
        hint = f" Load it with torch.load and pass [{inner!r}] to origo.load_state_dict." if inner else ""
        raise CheckpointError(f"'{path}' has no tensors at its top level; it has {', '.join(list(state)[:6])}.{hint}")

    @functools.cache
    def check() -> None:
        """Compare the zip's checksums, which torch writes and does not read."""
        try:
            damaged = zipfile.ZipFile(path).testzip() if is_zip else None
        except Exception as error:  # zipfile does not keep to BadZipFile
            raise CheckpointError(f"'{path}' is damaged ({error}).") from error
        if damaged is not None:
            raise CheckpointError(f"'{path}' is damaged: the bytes of its part {damaged!r} are not those that were written.")

    described = describe(state)
    shapes = {name: shape for name, (shape, _) in described.items()}
    dtypes = {name: dtype for name, (_, dtype) in described.items()}
    return TensorFile(path, shapes, dtypes, {}, {}, state.__getitem__, check, getattr(state, "_metadata", None))
