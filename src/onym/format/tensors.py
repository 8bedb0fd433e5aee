"""The tensors of a file: known from its header, read when they are asked for, checked before they are used."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onym.errors import CheckpointError
from onym.format.hashing import TensorHash
from onym.format.safetensors import dtype_called
from onym.state.chunks import Chunk, Shape, chunk_of_index

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Damage:
    """A file or tensor that is not as it was written."""

    file: str
    tensor: str | None
    reason: str
    """A sentence, with the path."""


class TensorFile(ABC):
    """The tensors of one file: what they are is known, their values are read when they are asked for."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Shape],
        dtypes: Mapping[str, str],
        aliases: Mapping[str, str],
        hashes: Mapping[str, TensorHash],
    ) -> None:
        self.path = path
        self.shapes = shapes
        """Of every stored tensor."""
        self.dtypes = dtypes
        """Of every stored tensor, under torch's names."""
        self.aliases = aliases
        """Further names of tied tensors -> the name they are stored under."""
        self.hashes = hashes
        """Expected hashes; a tensor without one cannot be checked."""
        self.versions: Mapping[str, Any] | None = None
        """The versions of the modules' state by their path, where the file has them (``.pth``)."""
        self._verified: set[str] = set()  # until the file changes

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
            self.require_verified([stored])
        return self._read(stored)

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """A slice of a tensor, as ``tensor(name)[index]``, in memory of its own.

        Args:
            name: a name or alias.
            index: any index of a tensor. For numbers and slices without a step only the chunk that they select is read.
            verify: check the blocks of the tensor that have elements of it, the first time.
        """
        stored = self._stored_name(name)
        selected, dtype = chunk_of_index(index, self.shapes[stored]), dtype_called(self.dtypes[stored])
        if selected is None or dtype is None:
            part: Tensor = self.tensor(name, verify=verify)[index].clone()
            return part
        chunk, dropped = selected
        return self.read_chunk(stored, chunk, dtype, verify=verify)[dropped]

    def read_chunk(self, name: str, chunk: Chunk, dtype: torch.dtype, *, verify: bool = True) -> Tensor:
        """A chunk of a tensor, in memory of its own."""
        import torch

        try:
            values = torch.empty(chunk.sizes, dtype=dtype, device="cpu")
        except RuntimeError as error:  # a shape whose strides no machine can count
            raise CheckpointError(f"{name} in '{self.path}' cannot be a tensor: {error}.") from error
        self.read_into(name, values, chunk, verify=verify)
        return values

    def read_into(self, name: str, target: Tensor, chunk: Chunk | None = None, *, verify: bool = True) -> None:
        """Read a tensor, or a chunk of one, into a tensor of that shape. If it is damaged, ``target`` may have been changed.

        Raises:
            CheckpointError: as :meth:`tensor`.
        """
        value = self.tensor(name, verify=verify)
        target.copy_(value if chunk is None else value[chunk.slices])

    def state(self, *, verify: bool = True) -> dict[str, Any]:
        """All tensors by name; tied ones are one object."""
        if verify:
            self.require_verified(self.shapes)
        state: OrderedDict[str, Any] = OrderedDict((name, self._read(name)) for name in self.shapes)
        state.update({alias: state[name] for alias, name in self.aliases.items()})
        if self.versions is not None:
            state._metadata = self.versions  # type: ignore[attr-defined]
        return state

    def damages(self, rank: int = 0, world_size: int = 1) -> Iterator[Damage]:
        """Check every tensor that has a hash; of several ranks each checks some of them."""
        own = sorted(self.shapes, key=lambda name: -math.prod(self.shapes[name]))[rank::world_size]
        return self.unverified(own, reused=False)

    def unverified(self, names: Iterable[str], *, reused: bool) -> Iterator[Damage]:
        """Check those that were not verified yet, by the names they are stored under. For ``reused`` see :meth:`_check`."""
        self._forget_if_changed()
        return self._check([name for name in names if name not in self._verified], reused=reused)

    def require_verified(self, names: Iterable[str]) -> None:
        """Raise CheckpointError if one of them is damaged."""
        for damage in self.unverified(names, reused=True):
            raise CheckpointError(damage.reason)

    def _stored_name(self, name: str) -> str:
        stored = self.aliases.get(name, name)
        if stored not in self.shapes:
            raise CheckpointError(f"'{self.path}' holds no tensor {name!r}.")
        return stored

    def _forget_if_changed(self) -> None:  # noqa: B027
        """Forget what was verified if the file has been written to since."""

    @abstractmethod
    def _read(self, name: str) -> Any:
        """A tensor, not verified."""

    @abstractmethod
    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        """The damaged ones. ``reused``: they are read next, so fetched bytes may be cached."""
