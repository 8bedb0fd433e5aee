"""Tensors that are kept in pieces, because several processes wrote them: ``pieces.json`` says which piece is where.

The pieces themselves are tensors of ordinary files, each with its hash in the manifest; so what checks a folder checks them
too, and one piece is read and checked without the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from origo.errors import CheckpointError
from origo.store.layout import Manifest, TensorEntry, are_counts, parse_json

PIECES = "pieces.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: the file and the name it has there, and where in the whole it begins."""

    file: str
    name: str
    start: tuple[int, ...]


@dataclass(frozen=True)
class Pieced:
    """A tensor in pieces, or a whole one in another file."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
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
    piece: Piece


def put_together(written: Iterable[Written]) -> dict[str, dict[str, Pieced]]:
    """The tensors that pieces make, by file and name. The same pieces under another name are a tied tensor."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...], list[Piece]]]] = {}
    for each in written:
        found.setdefault(each.file, {}).setdefault(each.name, (each.dtype, each.shape, []))[2].append(each.piece)
    tensors: dict[str, dict[str, Pieced]] = {}
    for file, named in found.items():
        names: dict[Pieced, list[str]] = {}
        for name, (dtype, shape, pieces) in named.items():
            pieced = Pieced(dtype, shape, tuple(sorted(pieces, key=lambda piece: piece.start)))
            names.setdefault(pieced, []).append(name)
        tensors[file] = {first: replace(pieced, aliases=tuple(others)) for pieced, (first, *others) in names.items()}
    return tensors


@dataclass(frozen=True)
class Pieces:
    """What ``pieces.json`` says."""

    tensors: dict[str, dict[str, Pieced]]
    """By the file that they would be in if one process had written them, then by name."""
    objects: dict[str, Any] = field(default_factory=dict)
    """What is no tensor, as plain structures (:mod:`origo.state.tree`)."""
    prefix: str = ""
    """What the model's names began with where they came from."""
    paths: dict[str, list[Any]] = field(default_factory=dict)
    """Full names -> the keys that led to them in nested dicts."""

    def to_json(self) -> str:
        """The text of a ``pieces.json``, one tensor a line."""
        files = []
        for file, entries in self.tensors.items():
            lines = [
                f"{json.dumps(name)}: "
                + json.dumps(
                    {
                        "dtype": entry.dtype,
                        "shape": list(entry.shape),
                        "pieces": [[piece.file, piece.name, list(piece.start)] for piece in entry.pieces],
                        **({"aliases": list(entry.aliases)} if entry.aliases else {}),
                    }
                )
                for name, entry in entries.items()
            ]
            files.append(f"{json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n}")
        rest = {"objects": self.objects, "prefix": self.prefix, "paths": self.paths}
        return '{"tensors": {' + ",\n".join(files) + "},\n" + json.dumps(rest, allow_nan=False)[1:] + "\n"

    @classmethod
    def read(cls, text: str, manifest: Manifest, source: str) -> Pieces:
        """Hold what a ``pieces.json`` says against the manifest beside it.

        Raises:
            CheckpointError: a piece is in none of the files, or the pieces of a tensor are not all of it.
        """
        values = parse_json(text, f"'{source}'")
        try:
            tensors = {
                file: {
                    name: Pieced(
                        entry["dtype"],
                        tuple(entry["shape"]),
                        tuple(Piece(piece[0], piece[1], tuple(piece[2])) for piece in entry["pieces"]),
                        tuple(entry.get("aliases", ())),
                    )
                    for name, entry in entries.items()
                }
                for file, entries in values["tensors"].items()
            }
            for entries in tensors.values():
                for name, entry in entries.items():
                    if reason := _wrong(entry, manifest):
                        raise CheckpointError(f"'{source}' is damaged: {name!r} {reason}.")
                further = [alias for entry in entries.values() for alias in entry.aliases]
                if len(set(further)) != len(further) or not entries.keys().isdisjoint(further):
                    raise CheckpointError(f"'{source}' is damaged: a tensor has a name that is another's.")
            return cls(tensors, dict(values["objects"]), str(values["prefix"]), dict(values["paths"]))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"'{source}' is damaged ({type(error).__name__}: {error}).") from error


def _wrong(entry: Pieced, manifest: Manifest) -> str | None:
    """What is wrong with a tensor; its pieces have to be in it, apart from each other, and all of it."""
    if type(entry.dtype) is not str or not are_counts(entry.shape):
        return "has no shape"
    boxes = []
    for piece in entry.pieces:
        found: TensorEntry | None = manifest.tensors.get(piece.file, {}).get(piece.name)
        if found is None:
            return f"has a piece in {piece.file!r}, which does not hold it"
        sizes = tuple(found.shape)
        if found.dtype != entry.dtype or len(sizes) != len(entry.shape) or not are_counts(piece.start):
            return "has a piece of another kind"
        ends = tuple(start + size for start, size in zip(piece.start, sizes, strict=True))
        if any(end > whole for end, whole in zip(ends, entry.shape, strict=True)):
            return "has a piece that is not in it"
        if math.prod(sizes):
            boxes.append((piece.start, ends))
    if sum(math.prod(e - s for s, e in zip(start, end, strict=True)) for start, end in boxes) != math.prod(entry.shape):
        return "is not all there"
    if not entry.pieces:
        return "has no pieces"
    return "has pieces that overlap" if any(_overlapping(boxes)) else None


def _overlapping(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[bool]:
    """Sorted by their first dimension, each is compared with those that begin before it ends."""
    ordered = sorted(boxes)
    for number, (_, end) in enumerate(ordered):
        for start, other_end in ordered[number + 1 :]:
            if end and start[0] >= end[0]:
                break
            lower = ordered[number][0]
            yield all(a < d and c < b for a, b, c, d in zip(lower, end, start, other_end, strict=True))


def entries_of(tensors: Mapping[str, Pieced], manifest: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """Tensors as a manifest has whole ones. The hash of one in pieces is that of its pieces' places and hashes."""
    entries = {}
    for name, tensor in tensors.items():
        found = [(piece.start, manifest[piece.file][piece.name]) for piece in tensor.pieces]
        if len(found) == 1:
            digest = found[0][1].blake3
        else:
            lines = sorted(f"{','.join(map(str, start))} {','.join(map(str, e.shape))} {e.blake3}\n" for start, e in found)
            digest = blake3("".join(lines).encode()).hexdigest()
        entries[name] = TensorEntry(tensor.dtype, list(tensor.shape), digest, list(tensor.aliases))
    return entries
