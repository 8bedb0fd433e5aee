"""What modules store of their own making (``get_extra_state``) in a .safetensors file: values as JSON, and their tensors.

The file's metadata has one string more, under ``onym_extra_state``: the structures by name, as those of ``trainer.json``, the
names of the tensors that belong to them, and a hash of the string. Other readers see these tensors as further ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onym.errors import CheckpointError
from onym.format.hashing import NO_HASH
from onym.format.manifest import are_counts, malformed_is_damaged, parse_json, require_seal, sealed
from onym.format.safetensors_file import SafetensorsFile
from onym.format.tensors import Damage, TensorFile
from onym.state.chunks import Chunk

if TYPE_CHECKING:
    from torch import Tensor

EXTRA_KEY = "onym_extra_state"
VALUE = "value"
"""The dtype of what is no tensor."""


def extra_metadata(structures: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """The entry in a file's metadata; none without values.

    Raises:
        CheckpointError: a value cannot be written as JSON.
    """
    if not structures:
        return {}
    try:
        return {EXTRA_KEY: sealed(json.dumps({"values": structures, "tensors": list(tensors), "blake3": NO_HASH}))}
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise CheckpointError(f"{next(iter(structures))} cannot be saved: {error}.") from error


def with_extra_state(file: SafetensorsFile) -> TensorFile:
    """A file as it was saved: with the values, and without their tensors; itself where it has none.

    Raises:
        CheckpointError: they are not as they were written.
    """
    if EXTRA_KEY not in file.metadata:
        return file
    text, what = file.metadata[EXTRA_KEY], f"The extra state of modules in '{file.path}'"
    with malformed_is_damaged(what):
        content = parse_json(text, what)
        require_seal(text, what)
        values, tensors = dict(content["values"]), list(content["tensors"])
        if not values.keys().isdisjoint(file.names) or not set(tensors) <= set(file.names):
            raise ValueError("its names are not those of its tensors")
        return WithValues(file, values, tensors)


def _described(structure: Any) -> tuple[tuple[int, ...], str]:
    """The shape and the kind of a value: of a tensor that is made of others its own, and the class or layout as the dtype."""
    about = structure.get("$composite") if isinstance(structure, dict) else None
    if not isinstance(about, dict):
        return (), VALUE
    kind = str(about.get("class") if about.get("kind") == "subclass" else about.get("kind")).rpartition(".")[2]
    size = about.get("size", [])
    if not (kind.isidentifier() and isinstance(size, list) and are_counts(size)):
        raise ValueError("it has a tensor of no kind")
    return tuple(size), kind


class WithValues(TensorFile):
    """A file of which some tensors are parts of values. ``structures``: those, as JSON values; ``file``: all of its tensors."""

    def __init__(self, file: TensorFile, values: Mapping[str, Any], tensors: list[str]) -> None:
        parts = set(tensors)
        self.file, self.structures, self._names = file, values, tensors
        self._parts = list(dict.fromkeys(map(file._stored_name, tensors)))
        stored = [name for name in file.shapes if name not in parts]
        aliases = {alias: name for alias, name in file.aliases.items() if alias not in parts}
        if not set(aliases.values()) <= set(stored):
            raise ValueError("a tensor of the model is stored as a part of its extra state")
        super().__init__(
            file.path,
            {**{name: file.shapes[name] for name in stored}, **{name: _described(value)[0] for name, value in values.items()}},
            {**{name: file.dtypes[name] for name in stored}, **{name: _described(value)[1] for name, value in values.items()}},
            aliases,
            {name: file.hashes[name] for name in stored if name in file.hashes},
        )

    def part(self, name: str, index: Any, *, verify: bool = True) -> Tensor:
        """As of the file."""
        return self.file.part(self._tensor_name(name), index, verify=verify)

    def read_into(self, name: str, target: Tensor, chunk: Chunk | None = None, *, verify: bool = True) -> None:
        """As of the file."""
        self.file.read_into(self._tensor_name(name), target, chunk, verify=verify)

    def damages(self, rank: int = 0, world_size: int = 1) -> Iterator[Damage]:
        """Of all tensors, those of values too."""
        return self.file.damages(rank, world_size)

    def unverified(self, names: Iterable[str], *, reused: bool) -> Iterator[Damage]:
        """Of those tensors, and of all that are parts of values where one of these is among them."""
        asked = list(names)
        tensors = [name for name in asked if name not in self.structures]
        return self.file.unverified(tensors if len(tensors) == len(asked) else [*tensors, *self._parts], reused=reused)

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        return self.file._check(names, reused=reused)

    def _tensor_name(self, name: str) -> str:
        if name in self.structures:
            raise CheckpointError(f"{name!r} in '{self.path}' is a value of a module's own making, not a tensor.")
        return name

    def _read(self, name: str) -> Any:
        if name not in self.structures:
            return self.file._read(name)
        from onym.state.tree import unflatten

        own = [each for each in self._names if each.startswith(name)]
        read = {each: self.file._read(each).clone() for each in dict.fromkeys(map(self.file._stored_name, own))}
        tensors = {each: read[self.file._stored_name(each)] for each in own}
        with malformed_is_damaged(f"The extra state {name} in '{self.path}'"):
            try:
                return unflatten(self.structures[name], tensors)
            except (
                RuntimeError
            ) as error:  # nested too deep; a generator's state of another size, or of a device that is not here
                raise CheckpointError(f"The extra state {name} in '{self.path}' cannot be restored: {error}.") from error
