"""The tensors of a state dict, ready to be stored: each once, with the further names of tied ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from onym.errors import CheckpointError
from onym.format.extra_state import extra_metadata
from onym.format.hashing import TensorHash, hash_of
from onym.format.manifest import TensorEntry, is_text
from onym.format.safetensors import as_bytes, dtype_name, is_plain
from onym.state.chunks import Shape
from onym.state.composite import is_composite, require_loadable
from onym.state.dtensor import is_sharded
from onym.state.model import tensor_identity
from onym.state.tree import flatten


@dataclass(frozen=True)
class Stored:
    """Nothing is copied: the tensors are the live ones."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    """Further name -> the name it is stored under."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The entry of a file's header with the values that are no tensors (:mod:`onym.format.extra_state`)."""

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def entries(self, hashes: Mapping[str, TensorHash]) -> dict[str, TensorEntry]:
        """Their entries in a manifest or header."""
        aliases: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            aliases.setdefault(name, []).append(alias)
        return {
            name: TensorEntry(
                dtype_name(tensor.dtype), list(tensor.shape), hashes[name].blake3, aliases.get(name, []), hashes[name].blocks
            )
            for name, tensor in self.tensors.items()
        }


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is materialised when it is written, and freed afterwards. Large ones are materialised one at a time."""

    dtype: torch.dtype
    shape: Shape
    make: Callable[[], Tensor]
    aliases: tuple[str, ...] = ()
    """Further names of it."""

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def gather(state: Mapping[str, Any], *, values: bool = False) -> Stored:
    """The tensors of a state dict; a tied one is stored under the first of its names.

    Args:
        state: names and tensors.
        values: it may have values that are no tensors (``get_extra_state``). They become an entry of the header's metadata, and
            tensors under names that begin with theirs.

    Raises:
        CheckpointError: a value is nothing that can be stored, or a tensor has no values to store.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    structures: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    for name, value in state.items():
        composite = is_composite(value) and not value.is_meta
        if composite and not values:
            raise CheckpointError(f"{name} is {_described(value)}, {_REMEDY}")
        if composite or not isinstance(value, Tensor | LazyTensor):
            if not values:
                raise CheckpointError(f"{name} is a {type(value).__name__}, not a tensor: only tensors can be stored here.")
            require_loadable(name, value)
            found, structures[name] = flatten(value, name, subclasses=composite)
            parts |= found
    if not parts.keys().isdisjoint(state):
        taken = next(iter(parts.keys() & state.keys()))
        raise CheckpointError(
            f"{taken!r} is a tensor's name and that of a part of a module's extra state: rename the attribute."
        )
    for name, value in (*state.items(), *parts.items()):
        if name in structures:
            continue
        if isinstance(value, LazyTensor):
            tensors[name] = cast(Tensor, value)  # it has the attributes that are used until it is written
            aliases |= dict.fromkeys(value.aliases, name)
            continue
        if name == "__metadata__" or (not is_text(name)):
            raise CheckpointError(f"{name!r} cannot be a tensor's name in a .safetensors file: rename the attribute.")
        if value.is_meta or isinstance(value, torch.nn.UninitializedParameter):
            raise CheckpointError(
                f"{name} has no values yet (it is on the meta device, or its layer is lazy): load or initialise the model "
                "before saving it."
            )
        if is_sharded(value):
            raise CheckpointError(f"{name} is a sharded tensor, which is not written here: store its full_tensor().")
        identity = tensor_identity(value)
        if identity is not None and identity in seen:
            aliases[name] = seen[identity]
            continue
        if identity is not None:
            seen[identity] = name
        tensors[name] = value.detach()
    return Stored(tensors, aliases, extra_metadata(structures, parts))


_REMEDY = (
    "which is not written here: a folder or a .safetensors of onym.save holds it, and onym.Checkpointer; or store a plain one "
    "(to_dense() of a sparse tensor, dequantize() of a quantised one)."
)


def _described(value: Tensor) -> str:
    if value.is_quantized:
        return f"quantized ({value.dtype})"
    kind = "nested" if value.is_nested else f"a {type(value).__name__}" if value.layout == torch.strided else str(value.layout)
    return f"{kind}, a tensor made of others"


def in_memory(tensor: Tensor) -> Tensor:
    """The values, contiguous in main memory; the tensor itself if it is that already."""
    if isinstance(tensor, LazyTensor):
        return in_memory(tensor.make().detach())
    if tensor.layout != torch.strided:
        raise CheckpointError("One of the tensors is sparse, which is not written here: take its to_dense() first.")
    if is_plain(tensor):
        return tensor
    return tensor.to("cpu").resolve_conj().resolve_neg().contiguous()


def tensor_hash(tensor: Tensor) -> TensorHash:
    """The hash of a tensor's bytes."""
    return hash_of(as_bytes(in_memory(tensor)).numpy().data)
