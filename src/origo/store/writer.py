"""Named tensors and texts -> durable files, with the hash of everything recorded beside it."""

from __future__ import annotations

import json
import platform
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from origo.errors import CheckpointError, StorageError
from origo.state.model import tensor_identity
from origo.store.filesystem import new_file, new_folder
from origo.store.layout import HEADER_KEY, MANIFEST, FileEntry, Header, HeaderTensor, Manifest, TensorEntry

# The dtypes of the safetensors format under its names for them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for dtype, name in _DTYPES.items()}
"""From the format's names to torch's."""


@dataclass(frozen=True)
class Stored:
    """Tensors ready to be written: each once, in plain memory, with the further names of tied ones."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    """Further name -> the name it is stored under."""


def gather(state: Mapping[str, Any]) -> Stored:
    """Bring a state dict into the form it is stored in.

    A tied tensor is kept under the first of its names. A view is copied, so that what is written is the view and not all
    of the memory behind it.

    Raises:
        CheckpointError: a value is no tensor, or a tensor has no values to store.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, not a tensor: only tensors can be stored in .safetensors. "
                "Take it out of the model's state (get_extra_state), or save to .pth."
            )
        if value.is_meta or isinstance(value, torch.nn.UninitializedParameter):
            raise CheckpointError(
                f"{name} has no values yet (it is on the meta device, or its layer is lazy): load or initialise the model "
                "before saving it."
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{name} is {value.layout}, which cannot be stored: store its to_dense().")
        if is_traceable_wrapper_subclass(value):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, a tensor made of others, which cannot be stored: store a plain one "
                "(dequantize() gives it)."
            )
        identity = tensor_identity(value)
        if identity is not None and identity in seen:
            aliases[name] = seen[identity]
            continue
        if identity is not None:
            seen[identity] = name
        stored = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        owns_all = stored.untyped_storage().nbytes() == stored.nbytes
        tensors[name] = stored if owns_all else stored.clone()
    return Stored(tensors, aliases)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, in its own byte order, as safetensors stores it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: Tensor) -> str:
    """The dtype under torch's name for it, as ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_hash(tensor: Tensor) -> str:
    """BLAKE3 of a contiguous CPU tensor's bytes, in hexadecimal."""
    return blake3(tensor_bytes(tensor)).hexdigest()


def write_safetensors(
    path: Path, state: Mapping[str, Any], architecture: str | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Write one self-describing .safetensors file, durably."""
    stored = gather(state)
    tensors = {
        name: HeaderTensor(dtype_name(tensor), list(tensor.shape), tensor_hash(tensor))
        for name, tensor in stored.tensors.items()
    }
    header = Header(tensors, architecture, config)
    with new_file(path) as temporary:
        _write_tensor_file(temporary, stored, {HEADER_KEY: header.to_json()})


def write_pth(path: Path, state: Mapping[str, Any]) -> None:
    """Write a plain state dict for ``torch.load(path, weights_only=True)``, durably. Tied tensors stay tied."""
    stored = gather({name: value for name, value in state.items() if isinstance(value, Tensor)})
    plain = OrderedDict(
        (name, stored.tensors[stored.aliases.get(name, name)] if isinstance(value, Tensor) else value)
        for name, value in state.items()
    )
    if hasattr(state, "_metadata"):  # the layout versions of the modules, which their load_state_dict asks for
        plain._metadata = state._metadata  # type: ignore[attr-defined]
    with new_file(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(plain, file)
        except RuntimeError as error:  # torch closes its zip after a failed write, and fails again over that
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_folder(
    path: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, str],
    *,
    architecture: str | None = None,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint or model folder, durably, its manifest last.

    Args:
        path: where it shall be.
        tensors: by file name, the named tensors of each .safetensors file.
        texts: by file name, the content of each other file.
        architecture, step, metrics: for the manifest.
    """
    require_replaceable(path)
    gathered = {file: gather(state) for file, state in tensors.items()}
    with new_folder(path, last=MANIFEST) as temporary:
        entries: dict[str, dict[str, TensorEntry]] = {}
        for file, stored in gathered.items():
            _write_tensor_file(temporary / file, stored, {})
            entries[file] = {
                name: TensorEntry(
                    file,
                    dtype_name(tensor),
                    list(tensor.shape),
                    tensor_hash(tensor),
                    [alias for alias, kept in stored.aliases.items() if kept == name],
                )
                for name, tensor in stored.tensors.items()
            }
        for file, text in texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        files = {file: file_entry(temporary / file) for file in (*tensors, *texts)}
        manifest = Manifest(files, entries, architecture, step, dict(metrics or {}), _provenance())
        (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def require_replaceable(path: Path) -> None:
    """See that nothing is at ``path``, or a folder of which Origo wrote every file.

    Raises:
        StorageError: something else is there; replacing it would delete it.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    theirs = [path.name]
    if path.is_dir():
        try:
            ours = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"), str(path)).files
            theirs = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and entry.name != MANIFEST)
        except (OSError, UnicodeDecodeError, CheckpointError):
            theirs = sorted(entry.name for entry in path.iterdir())
    if theirs:
        raise StorageError(
            f"'{path}' holds what Origo did not write ({', '.join(theirs[:3])}) and would be replaced as a whole: choose "
            "another name, or remove it."
        )


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as it is."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return FileEntry(path.stat().st_size, hasher.hexdigest())


def _write_tensor_file(path: Path, stored: Stored, metadata: Mapping[str, str]) -> None:
    """Write the safetensors format: the header's length (u64, little-endian), the header (JSON), the tensors' bytes.

    Written here rather than by the safetensors library, whose metadata comes out in another order each time: equal models
    shall be equal files. Tensors are ordered by falling item size, as the library does, so that each is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **stored.aliases, **metadata}}
    ordered = sorted(stored.tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{name} has the dtype {tensor.dtype}, which the safetensors format does not have: cast it.")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            file.write(tensor_bytes(tensor))


def _provenance() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "origo": version("origo"),
    }
