"""Tensors that are kept in pieces, because several processes wrote them: ``pieces.json`` says which process has which box.

The pieces are tensors of ordinary files, one file for each process, whose header has the hash of each; so one piece is read and
checked without the others, and no file has more to say than what a process wrote. Tensors that are cut alike share a layout, so
``pieces.json`` grows with the tensors and with the processes, not with their product.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from blake3 import blake3

from onym.errors import CheckpointError
from onym.format.manifest import MODEL, FileEntry, Manifest, are_counts, parse_json

PIECES = "pieces.json"
_MOST_COMPARED = 50_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor: whose it is, where it begins, and its size."""

    process: int
    start: tuple[int, ...]
    size: tuple[int, ...]

    def name(self, tensor: str, shape: tuple[int, ...]) -> str:
        """What it is called in its file: as ``weight[0:128,0:64]``; all of a tensor by its name."""
        if self.size == shape:
            return tensor
        return f"{tensor}[{','.join(f'{at}:{at + size}' for at, size in zip(self.start, self.size, strict=True))}]"


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut."""

    parts: tuple[Part, ...]
    """Sorted by where they begin."""

    @cached_property
    def digest(self) -> str:
        """Equal for equal layouts."""
        return blake3(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """A list of ``[process, [start], [size]]``."""
        return json.dumps([[part.process, list(part.start), list(part.size)] for part in self.parts])

    def overlapping(self, bounds: Sequence[tuple[int, int]]) -> Iterator[Part]:
        """The parts that have something of a box, given as (start, end) of each dimension."""
        if not bounds:
            yield from self.parts
            return
        end = bisect_left(self._starts, bounds[0][1])
        begin = bisect_left(self._starts, bounds[0][0] - self._longest)
        for part in self.parts[begin:end]:
            sides = zip(part.start, part.size, bounds, strict=True)
            if all(max(at, start) < min(at + size, stop) for at, size, (start, stop) in sides):
                yield part

    @cached_property
    def _starts(self) -> list[int]:
        return [part.start[0] for part in self.parts]

    @cached_property
    def _longest(self) -> int:
        return max((part.size[0] for part in self.parts), default=0)

    def wrong(self, shape: tuple[int, ...], budget: list[int] | None = None) -> str | None:
        """What is wrong with it for a tensor of this shape: its parts have to be in it, apart, and together all of it."""
        boxes = []
        for part in self.parts:
            if len(part.start) != len(shape) or len(part.size) != len(shape):
                return "has a piece of another kind"
            end = tuple(start + size for start, size in zip(part.start, part.size, strict=True))
            if any(stop > whole for stop, whole in zip(end, shape, strict=True)):
                return "has a piece that is not in it"
            if math.prod(part.size):
                boxes.append((part.start, end))
        if not self.parts:
            return "has no pieces"
        total, volume = sum(math.prod(map(int.__sub__, end, start)) for start, end in boxes), math.prod(shape)
        if total < volume:
            return "is not all there"
        return "has pieces that overlap" if total > volume or _overlapping(boxes, budget) else None


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor in pieces, or a whole one in one process's file."""

    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """A piece that one process has written, and what it is a piece of."""

    file: str
    """That the whole tensor would be in if one process had written it."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole."""
    part: Part
    same_as: str = ""
    """The name of another tensor whose piece is the same memory."""


@dataclass(frozen=True)
class Table:
    """What several processes keep together, as each of them knows it by itself, and this one's part in it.

    Tensors that are cut alike have one number. So what a process has to tell is a box for each number, however many tensors.
    """

    tensors: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = field(default_factory=dict)
    """By file and name: dtype, shape, and the number of how it is cut."""
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    """By file: a further name of a tied tensor -> its first name."""
    parts: dict[int, Part] = field(default_factory=dict)
    """By number: the box that this process has, if it has one."""

    @cached_property
    def digest(self) -> str:
        """Equal where they keep the same."""
        return blake3(json.dumps(self.tensors).encode()).hexdigest()


def tabled(table: Table, parts: Iterable[Mapping[int, Part]]) -> dict[str, dict[str, ShardedTensor]]:
    """The tensors of a table, from each process's boxes."""
    found: dict[int, list[Part]] = {}
    for each in parts:
        for number, part in each.items():
            found.setdefault(number, []).append(part)
    layouts = {
        number: Layout(tuple(sorted(parts, key=lambda part: (part.start, part.process)))) for number, parts in found.items()
    }
    tensors: dict[str, dict[str, ShardedTensor]] = {}
    for file, entries in table.tensors.items():
        further: dict[str, list[str]] = {}
        for alias, name in table.aliases.get(file, {}).items():
            further.setdefault(name, []).append(alias)
        tensors[file] = {
            name: ShardedTensor(dtype, shape, layouts.get(number, Layout(())), tuple(further.get(name, ())))
            for name, (dtype, shape, number) in entries.items()
            if name not in table.aliases.get(file, {})
        }
    return tensors


def assemble(written: Iterable[Written]) -> dict[str, dict[str, ShardedTensor]]:
    """The tensors that pieces make, by file and name. Where all pieces are another tensor's too, it is a further name of it."""
    found: dict[tuple[str, str], list[Written]] = {}
    for each in written:
        found.setdefault((each.file, each.name), []).append(each)
    layouts: dict[tuple[Part, ...], Layout] = {}
    tensors: dict[str, dict[str, ShardedTensor]] = {}
    aliases: dict[tuple[str, str], list[str]] = {}
    for (file, name), pieces in found.items():
        parts = tuple(sorted((piece.part for piece in pieces), key=lambda part: (part.start, part.process)))
        layout = layouts.setdefault(parts, Layout(parts))
        others = {piece.same_as for piece in pieces}
        other = tensors.get(file, {}).get(others.pop()) if len(others) == 1 else None
        if other is not None and other.layout is layout:
            aliases.setdefault((file, pieces[0].same_as), []).append(name)
        else:
            tensors.setdefault(file, {})[name] = ShardedTensor(pieces[0].dtype, pieces[0].shape, layout)
    for (file, name), further in aliases.items():
        entry = tensors[file][name]
        tensors[file][name] = ShardedTensor(entry.dtype, entry.shape, entry.layout, tuple(further))
    return tensors


def piece_file(file: str, process: int) -> str:
    """Where a process has its pieces of the tensors of a file."""
    return f"{file.removesuffix('.safetensors')}-{process:05d}.safetensors"


@dataclass(frozen=True)
class Pieces:
    """What ``pieces.json`` says."""

    tensors: dict[str, dict[str, ShardedTensor]]
    """By the file that they would be in if one process had written them, then by name."""
    objects: dict[str, Any] = field(default_factory=dict)
    """What is no tensor, as plain structures (:mod:`onym.state.tree`)."""
    prefix: str = ""
    """What the model's names began with where they came from."""
    paths: dict[str, list[Any]] = field(default_factory=dict)
    """Full names -> the keys that led to them in nested dicts."""

    @cached_property
    def files(self) -> dict[str, str]:
        """The files with pieces -> the files that these are pieces of."""
        by_layout = {
            (file, id(entry.layout)): entry.layout for file, entries in self.tensors.items() for entry in entries.values()
        }
        return {piece_file(file, part.process): file for (file, _), layout in by_layout.items() for part in layout.parts}

    def to_json(self) -> str:
        """The text of a ``pieces.json``, one tensor or layout a line."""
        numbers: dict[str, int] = {}
        texts: dict[int, str] = {}
        files = []
        for file, entries in self.tensors.items():
            lines = []
            for name, entry in entries.items():
                if id(entry.layout) not in texts:  # they are long, and many tensors have the same
                    texts[id(entry.layout)] = entry.layout.to_json()
                number = numbers.setdefault(texts[id(entry.layout)], len(numbers))
                values = {"dtype": entry.dtype, "shape": list(entry.shape), "layout": number}
                lines.append(
                    f"{json.dumps(name)}: {json.dumps(values | ({'aliases': list(entry.aliases)} if entry.aliases else {}))}"
                )
            files.append(f"{json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n}")
        rest = {"objects": self.objects, "prefix": self.prefix, "paths": self.paths}
        layouts = '"layouts": [\n' + ",\n".join(numbers) + "\n],\n"
        return "{" + layouts + '"tensors": {' + ",\n".join(files) + "},\n" + json.dumps(rest, allow_nan=False)[1:] + "\n"

    @classmethod
    def read(cls, text: str, manifest: Manifest, source: str) -> Pieces:
        """Hold what a ``pieces.json`` says against itself, and against the files that there are.

        Raises:
            CheckpointError: a piece is in none of the files, or the pieces of a tensor are not all of it.
        """
        values = parse_json(text, f"'{source}'")
        try:
            layouts = [
                Layout(tuple(Part(process, tuple(start), tuple(size)) for process, start, size in parts))
                for parts in values["layouts"]
            ]
            for layout in layouts:
                if not all(are_counts((part.process, *part.start, *part.size)) for part in layout.parts):
                    raise CheckpointError(f"'{source}' is damaged: a layout has something else than numbers.")
            tensors = {
                file: {
                    name: ShardedTensor(
                        entry["dtype"],
                        tuple(entry["shape"]),
                        layouts[_index(entry["layout"])],
                        tuple(entry.get("aliases", ())),
                    )
                    for name, entry in entries.items()
                }
                for file, entries in values["tensors"].items()
            }
            for entries in tensors.values():
                for name, entry in entries.items():
                    if type(entry.dtype) is not str or not are_counts(entry.shape):
                        raise CheckpointError(f"'{source}' is damaged: {name!r} has no shape.")
                further = [alias for entry in entries.values() for alias in entry.aliases]
                if len(set(further)) != len(further) or not entries.keys().isdisjoint(further):
                    raise CheckpointError(f"'{source}' is damaged: a tensor has a name that is another's.")
            found = cls(tensors, dict(values["objects"]), str(values["prefix"]), dict(values["paths"]))
            found.require_whole(f"'{source}' is damaged")
            missing = next((file for file in found.files if file not in manifest.files), None)
            if missing is not None:
                raise CheckpointError(f"'{source}' is damaged: it has pieces in {missing!r}, which is not there.")
            return found
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"'{source}' is damaged ({type(error).__name__}: {error}).") from error

    def require_whole(self, what: str) -> None:
        """See that the pieces of each tensor are all of it, and no two pieces have one name.

        Raises:
            CheckpointError: begins with ``what``.
        """
        wrong: dict[tuple[int, tuple[int, ...]], str | None] = {}
        budget = [_MOST_COMPARED]
        for entries in self.tensors.values():
            for name, entry in entries.items():
                key = (id(entry.layout), entry.shape)
                if key not in wrong:
                    try:
                        wrong[key] = entry.layout.wrong(entry.shape, budget)
                    except ValueError as error:
                        raise CheckpointError(f"{what}: {error}.") from error
                if wrong[key]:
                    raise CheckpointError(f"{what}: {name!r} {wrong[key]}.")
                if "[" in name:
                    tensor = name.rpartition("[")[0]
                    other = entries.get(tensor)
                    if other and any(part.name(tensor, other.shape) == name for part in other.layout.parts):
                        raise CheckpointError(f"{what}: {name!r} would be a piece of {tensor!r} too.")

    def identity(self, files: Mapping[str, FileEntry]) -> str:
        """Of the model: how each tensor is cut, and the hashes of the headers that have the hashes of the pieces."""
        lines = []
        for name, entry in self.tensors[MODEL].items():
            about = f"{entry.dtype} {','.join(map(str, entry.shape))} {entry.layout.digest}"
            lines += [f"{len(each.encode())} {each} {about}\n" for each in (name, *entry.aliases)]
        headers = [f"{file} {files[file].blake3}\n" for file, of in self.files.items() if of == MODEL]
        return blake3("".join([*sorted(lines), *sorted(headers)]).encode()).hexdigest()


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a layout is called {value!r}")
    return value


def _overlapping(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], budget: list[int] | None = None) -> bool:
    """Sorted by the dimension that tells most of them apart, each is compared with those that begin before it ends.

    Args:
        budget: how many may be compared yet, as a list of one number; it is counted down.
    """
    left = budget if budget is not None else [_MOST_COMPARED]
    if len(boxes) < 2:
        return False
    if not boxes[0][0]:
        return True  # of a single number there is one
    starts, ends = (np.array([box[side] for box in boxes], dtype=np.int64) for side in (0, 1))
    sweep = max(range(starts.shape[1]), key=lambda at: len(np.unique(starts[:, at])))
    order = np.argsort(starts[:, sweep], kind="stable")
    starts, ends = starts[order], ends[order]
    until = np.searchsorted(starts[:, sweep], ends[:, sweep], side="left")
    numbers = np.arange(len(boxes))
    left[0] -= int((until - numbers - 1).sum())
    if left[0] < 0:
        raise ValueError("more pieces lie beside each other than are compared")
    for number in numbers[until > numbers + 1]:
        beside = slice(number + 1, until[number])
        if ((starts[beside] < ends[number]) & (ends[beside] > starts[number])).all(axis=1).any():
            return True
    return False
