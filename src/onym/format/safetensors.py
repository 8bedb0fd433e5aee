"""The safetensors format, both ways: a little-endian u64 with the header's length, the header as JSON, the tensors' bytes.

Written and read here, not by the safetensors library: equal models are equal files (the order of the library's metadata
varies), a file is hashed while it is written and mapped while it is verified, chunks of it are fetched from an object store,
and a header is checked before it is used. The tests read our files with the library, and its files with this module.
Headers are read without torch, which takes a second to import.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from onym.errors import CheckpointError
from onym.format.manifest import MOST_JSON_BYTES, are_counts, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The dtypes of the format: torch's name, the format's, and the bits of an element of the format.
_DTYPES = (
    ("float64", "F64", 64),
    ("float32", "F32", 32),
    ("float16", "F16", 16),
    ("bfloat16", "BF16", 16),
    ("float8_e4m3fn", "F8_E4M3", 8),
    ("float8_e5m2", "F8_E5M2", 8),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", 8),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", 8),
    ("float8_e8m0fnu", "F8_E8M0", 8),
    ("float4_e2m1fn_x2", "F4", 4),
    ("complex64", "C64", 64),
    ("int64", "I64", 64),
    ("int32", "I32", 32),
    ("int16", "I16", 16),
    ("int8", "I8", 8),
    ("uint64", "U64", 64),
    ("uint32", "U32", 32),
    ("uint16", "U16", 16),
    ("uint8", "U8", 8),
    ("bool", "BOOL", 8),
)
_FORMAT_NAMES = {name: format_name for name, format_name, _ in _DTYPES}
_TORCH_NAMES = {format_name: name for name, format_name, _ in _DTYPES}
_BITS = {name: bits for _, name, bits in _DTYPES} | {"F6_E2M3": 6, "F6_E3M2": 6}
_PACKED = "float4_e2m1fn_x2"  # an element of torch's has two of the format's, side by side in the last dimension

# Dtypes that the format does not have, stored as one that it has, with one more dimension: the bytes are the same.
_STORED_AS = {"complex128": ("F64", 2), "complex32": ("F16", 2)}

_SPACES = (b" ", b"\t", b"\n", b"\r")  # before the header's first value, as JSON has them
# A million tensors have 7 million values and 4 million names. A name takes 300 bytes of memory, a value 70.
_MOST_VALUES, _MOST_NAMES, _MANY = 10_000_000, 4_100_000, 100_000
_BEGINNING = re.compile(rb'\s*\{\s*(\}|"(?:[^"\\]|\\.)*+"\s*:\s*(\{|null))')
_ENTRY = {"dtype", "shape", "data_offsets"}
_LONGEST_HEADER = 100_000_000  # what the safetensors library reads; a longer one would open here alone


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of a file: the format's dtype and shape, and where its bytes are, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch's name for it, as ``float32``."""
    return str(dtype).removeprefix("torch.")


@cache
def dtype_called(name: str) -> torch.dtype | None:
    """torch's dtype of that name; None where this version has none, or where it is a quantized one."""
    import torch

    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) and not name.startswith("q") else None


@cache
def item_size(name: str) -> int | None:
    """The bytes of an element, from torch's name of the dtype; None for a dtype that this version does not know."""
    if name in _FORMAT_NAMES:
        return -(-_BITS[_FORMAT_NAMES[name]] // 8)
    dtype = dtype_called(name)
    return None if dtype is None else dtype.itemsize


def as_stored(name: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]] | None:
    """The format's name for what a dtype is stored as, and the shape in the file.

    A dtype that the format does not have (complex128, int4 …) is stored as one that it has. None for one that this version of
    torch does not have.
    """
    if name == _PACKED and shape:
        return "F4", (*shape[:-1], 2 * shape[-1])
    if name in _FORMAT_NAMES and name != _PACKED:
        return _FORMAT_NAMES[name], tuple(shape)
    if name in _STORED_AS:
        stored_as, further = _STORED_AS[name]
        return stored_as, (*shape, further)
    size = item_size(name)
    return None if size is None else ("U8", tuple(shape) if size == 1 else (*shape, size))


def from_stored(format_name: str, shape: tuple[int, ...]) -> tuple[str | None, tuple[int, ...]]:
    """The reverse, for a dtype that the format has: torch's name, and its shape. No name for what torch cannot represent."""
    if format_name == "F4":
        return (None, shape) if not shape or shape[-1] % 2 else (_PACKED, (*shape[:-1], shape[-1] // 2))
    return _TORCH_NAMES.get(format_name), shape


def is_plain(tensor: Tensor) -> bool:
    """Whether its values are contiguous in main memory."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous CPU tensor, in its own byte order: uint8, 1-D."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.numel() == 1:  # contiguous whatever its stride
        flat = flat.as_strided((1,), (1,))
    import torch

    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device="cpu")


def from_bytes(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The reverse of :func:`as_bytes`; shares the memory where its alignment allows."""
    import torch

    if not len(data):
        return torch.empty(shape, dtype=dtype, device="cpu")
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The first bytes of a file, and its tensors' names in the order in which their bytes follow.

    Tensors are ordered by falling item size, as the library does, so that each is aligned.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in ordered:
        dtype, shape = tensors[name].dtype, tensors[name].shape
        stored = as_stored(dtype_name(dtype), shape)
        assert stored is not None
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored[0], "shape": list(stored[1]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER or (len(tensors) > _MANY and not _is_bounded(text)):
        raise CheckpointError(f"{len(tensors):,} tensors are too many for one .safetensors file: save to a folder.")
    return len(text).to_bytes(8, "little") + text, ordered


def begins_file(first: bytes, size: int) -> bool:
    """Whether the first nine bytes can be those of a .safetensors file: a length, and ``{`` or white space before it.

    Args:
        first: the bytes.
        size: the file's; white space follows the first eight bytes of many a text.
    """
    return first[8:9] == b"{" or (first[8:9] in _SPACES and 8 + int.from_bytes(first[:8], "little") <= size)


def header_length(first: bytes, size: int, path: object) -> int:
    """How many bytes come before those of the tensors, from the first eight.

    Raises:
        CheckpointError: the file is not as long as it says.
    """
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise CheckpointError(f"'{path}' is damaged, or no .safetensors file: its header would be longer than the file.")
    if length > min(_LONGEST_HEADER, MOST_JSON_BYTES):
        raise CheckpointError(f"'{path}' has a header of {length:,} bytes; up to {_LONGEST_HEADER:,} are read.")
    return 8 + length


def parse_header(text: bytes, size: int, path: object) -> tuple[dict[str, Placed], dict[str, str]]:
    """The tensors of a file and its metadata, from its header.

    Args:
        text: the JSON alone.
        size: how many bytes the tensors have.
        path: for messages.

    Raises:
        CheckpointError: it is no header, or its tensors do not follow each other from the first byte to the last.
    """
    if not _BEGINNING.match(text):
        raise CheckpointError(f"'{path}' is damaged: its header is no JSON of tensors: {text[:80]!r}.")
    others = 0

    def check(values: dict[str, Any]) -> None:
        nonlocal others
        others += not values.keys() >= _ENTRY
        if others > 2:  # the metadata and the header itself are no tensors; a hostile one has a million of such
            raise CheckpointError(f"'{path}' is damaged: its header says of a tensor: {reprlib.repr(values)}.")

    if not _is_bounded(text):
        raise CheckpointError(
            f"The header of '{path}' holds more than {_MOST_VALUES:,} values or {_MOST_NAMES:,} names, which are not read."
        )
    header = parse_json(text, f"The header of '{path}'", check, _MOST_VALUES)
    if not isinstance(header, dict):
        raise CheckpointError(f"'{path}' is damaged: its header is a {type(header).__name__}.")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'{path}' is damaged: the metadata in its header are no texts.")
    placed = {name: _placed(name, entry, path) for name, entry in header.items()}
    end = 0
    for name, tensor in sorted(placed.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise CheckpointError(f"'{path}' is damaged: the bytes of {name!r} overlap others, or there is a hole before them.")
        end = tensor.end
    if end != size:
        raise CheckpointError(f"'{path}' is damaged: its tensors need {end:,} bytes, and {size:,} follow the header.")
    return placed, metadata


def _is_bounded(text: bytes) -> bool:
    """Whether a header takes no more memory than it may."""
    return text.count(b":") <= _MOST_NAMES and sum(map(text.count, (b",", b"[", b"{"))) <= _MOST_VALUES


def _placed(name: str, entry: Any, path: object) -> Placed:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        right = type(dtype) is str and type(shape) is list and len(shape) <= 64 and are_counts((start, end, *shape))
        # A dtype of a later version of the format has a size that is not known here.
        right = right and start <= end and (dtype not in _BITS or math.prod(shape) * _BITS[dtype] == 8 * (end - start))
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise CheckpointError(f"'{path}' is damaged: its header says of {name!r}: {reprlib.repr(entry)}.")
    return Placed(dtype, tuple(shape), start, end)
