"""Files of ``torch.save``: read by torch's machinery that runs nothing, and written for ``torch.load(weights_only=True)``."""

from __future__ import annotations

import functools
import io
import os
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from onym.errors import CheckpointError, NoWeightsError
from onym.format.first_bytes import known_kind
from onym.format.pickles import require_bounded
from onym.format.stand_ins import StandIn, foreign, kind_of, read_stream, read_zip, with_states
from onym.format.stored import gather, in_memory
from onym.format.tensors import Damage, TensorFile
from onym.format.writer import MARGIN_BYTES
from onym.state.model import describe
from onym.state.tree import flatten
from onym.storage.local import can_be_mapped
from onym.storage.paths import storage_of

_OLD_PICKLES = 4  # of a file from before torch 1.6: a magic number, a version, the system, and the object

PICKLES = (".pth", ".pt", ".th", ".pth.tar", ".pt.tar", ".bin")
"""The endings of files that ``torch.save`` writes."""


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
        self._state, self._is_zip = state, is_zip
        self.is_mapped = is_zip and can_be_mapped(path)

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """As of any file; the tensor itself is asked: it may be sparse."""
        part: Tensor = self.tensor(name, verify=verify)[index].clone()
        return part

    def _read(self, name: str) -> Any:
        value = self._state[name]
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(f"{name} in '{self.path}' has no values: it was on the meta device when it was saved.")
        if isinstance(value, StandIn):
            raise CheckpointError(
                f"{name} in '{self.path}' is a {value.kind}, which is not read: opening a file runs nothing of it. Where "
                "it was made, convert it to a plain tensor or value, and save again with onym.save(model, path)."
            )
        return value

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        reason = self._damage
        if reason is not None:
            yield Damage(self.path.name, None, reason)

    @functools.cached_property
    def _damage(self) -> str | None:
        return zip_damage(self.path) if self._is_zip else None


def zip_damage(path: Path) -> str | None:
    """What a zip's checksums say, which torch writes and does not read; None where all are right."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
    except Exception as error:  # zipfile does not keep to BadZipFile
        return f"'{path}' is damaged ({error})."
    if damaged is None:
        return None
    return f"'{path}' is damaged: the bytes of its part {damaged!r} are not those that were written."


@dataclass(frozen=True)
class Pickled:
    """The content of a file of ``torch.save``."""

    content: Any
    is_zip: bool
    """Whether it is a zip, whose tensors are mapped where the mount maps files."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Objects in it that were not read, by their places: the names of their classes. Whole modules became their states."""


def open_pth(path: Path) -> TensorFile:
    """Open a file that has a state dict.

    Raises:
        CheckpointError: it has something else, or see :func:`read_pickle`.
    """
    read = read_pickle(path)
    state = read.content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise NoWeightsError(f"'{path}' holds a {kind_of(state)}, not a state dict of named tensors.")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise NoWeightsError(f"'{path}' has no tensors at its top level; it has {', '.join(list(state)[:6])}.")
    return PickledFile(path, state, read.is_zip)


def read_pickle(path: Path) -> Pickled:
    """Read a file of ``torch.save`` without running anything: by torch where it can, otherwise with stand-ins.

    Raises:
        NoWeightsError: it is of another kind, which is named.
        CheckpointError: it is damaged, much larger in memory than on disk, or asks for functions that run programs.
    """
    is_zip = False
    try:
        is_zip = zipfile.is_zipfile(path)  # since torch 1.6; files from before cannot be mapped
        if is_zip:
            _require_plain_zip(path)
        else:
            with path.open("rb") as file:
                require_bounded(file, path, _OLD_PICKLES)
        try:
            mapped = is_zip and can_be_mapped(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # of what is read below
                return Pickled(torch.load(path, map_location="cpu", mmap=mapped, weights_only=True), is_zip)
        except Exception:  # it has objects of other classes, or is damaged
            content = read_zip(path) if is_zip else read_stream(path)
        return Pickled(with_states(content), is_zip, foreign(content))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can make torch raise nearly anything
        if not is_zip and (kind := known_kind(path)):
            raise kind from error
        reason = type(error).__name__ if is_zip else "it is neither safetensors nor written by torch.save"
        named_so = path.name.endswith((*PICKLES, ".safetensors"))
        raise (CheckpointError if is_zip or named_so else NoWeightsError)(
            f"'{path}' is no weight file, or it is damaged ({reason})."
        ) from error


def _require_plain_zip(path: Path) -> None:
    """Refuse a zip that is larger unpacked than packed: ``torch.save`` does not compress, and writes each part once."""
    archive = zipfile.ZipFile(path)
    parts = archive.infolist()
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise NoWeightsError(
            f"'{path}' is a program of torch.jit.save: code, with the weights inside. It was not read; where it was made, save "
            "again with onym.save(model, path)."
        )
    if any(part.filename.endswith("/archive_format") or part.filename == "archive_format" for part in parts):
        raise NoWeightsError(
            f"'{path}' is a program of torch.export.save (.pt2): code, with the weights inside. It was not read; where it was "
            "made, save the module with onym.save(module, path)."
        )
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        raise NoWeightsError(f"'{path}' is a zip, and not one of torch.save: unpack it, and give the weight file in it.")
    require_one_reading(archive, path)
    unpacked = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or unpacked > path.stat().st_size:
        raise CheckpointError(f"'{path}' is a compressed zip ({unpacked:,} bytes unpacked), which torch.save does not write.")
    for part in parts:
        if part.filename.endswith("/data.pkl"):
            require_bounded(archive.read(part), path)


def require_one_reading(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip that Python and torch may read differently: what is checked has to be what is loaded.

    Its first part is at its beginning, its list at its very end, and no name is in it twice.
    """
    parts, file = archive.infolist(), archive.fp
    assert file is not None
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 42))
    locator, end = (tail := file.read())[:-22], tail[-22:]
    one = end[:4] == b"PK\x05\x06" and end[-2:] == bytes(2) and min(part.header_offset for part in parts) == 0
    if locator[:4] == b"PK\x06\x07":  # of a zip of more than 4 GB
        one = one and struct.unpack("<Q", locator[8:16])[0] == size - 42 - 56
    if not one or len({part.filename for part in parts}) != len(parts):
        raise CheckpointError(f"'{path}' is not a zip as torch.save writes it: it can be read as two different ones.")


def write_pth(path: Path, state: Mapping[str, Any]) -> None:
    """Write a plain state dict for ``torch.load(path, weights_only=True)``, durably. Tied tensors stay tied."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            _require_opens(name, value)
    stored = gather({name: value for name, value in state.items() if isinstance(value, Tensor)})
    plain = {name: _alone(tensor) for name, tensor in stored.tensors.items()}
    ordered = OrderedDict(
        (name, plain[stored.aliases.get(name, name)] if isinstance(value, Tensor) else value) for name, value in state.items()
    )
    if hasattr(state, "_metadata"):  # the layout versions of the modules, which their load_state_dict asks for
        ordered._metadata = state._metadata  # type: ignore[attr-defined]
    write_pickle(path, ordered, stored.nbytes)


def _require_opens(name: str, value: Any) -> None:
    """Refuse a value of a module's own making (extra state) that would keep the whole file from being opened again."""
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        torch.load(written, weights_only=True)
    except Exception as error:  # what cannot be pickled raises anything
        flatten(value, name, arrays=False)  # says which part of it
        raise CheckpointError(
            f"{name} is a {type(value).__name__}, which torch.load(weights_only=True) does not open, so nothing could: return "
            "plain values and tensors from get_extra_state()."
        ) from error


def write_pickle(path: Path, content: Any, expected_bytes: int = 0) -> None:
    """Write what ``torch.load(path, weights_only=True)`` opens, durably."""
    with storage_of(path).new_file(path, expected_bytes + MARGIN_BYTES) as file:
        failed: list[OSError] = []

        class Sink:
            """Keeps the first error: torch closes its zip after a failed write, and that fails in another way."""

            def flush(self) -> None:
                """Nothing: the content is fsynced once, at the end."""

            def write(self, data: bytes | memoryview) -> int:
                try:
                    return file.write(data)
                except OSError as error:
                    failed.append(error)
                    raise

        try:
            torch.save(content, cast(IO[bytes], Sink()))
        except KeyError as error:  # int4 and the like
            raise CheckpointError(f"torch.save cannot write this model ({error.args[0]}): save to .safetensors.") from error
        except RuntimeError as error:
            raise failed[0] if failed else error from None


def _alone(tensor: Tensor) -> Tensor:
    """Without the rest of its storage, which ``torch.save`` would write too."""
    plain = in_memory(tensor)
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
