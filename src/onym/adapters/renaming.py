"""Adapters under the names that a format has for the layers of an architecture, in both directions.

The table is the format's own, of its weights. A layer that the format stores as three has three adapters there: A of each is
the same, B's rows are split. In the other direction the matrices of A are stacked and those of B stand on a diagonal, so that
the product is exactly the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from onym.adapters.layer import A, B
from onym.convert.mapping import JOINED, TRANSPOSED, UNCHANGED, Change, Recipe, part
from onym.convert.registry import Format, formats

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Row:
    """One layer: what a format calls it, and the architecture. ``{n}`` stands for a block's number."""

    theirs: tuple[str, ...]
    ours: str
    transposed: bool
    """Whether the format's weight is [in, out]."""


@dataclass(frozen=True)
class Renaming:
    """A format's table of layers."""

    format: Format
    rows: tuple[Row, ...]

    def to_ours(self, theirs: Iterable[str]) -> dict[str, list[str]]:
        """Our layers, with those of the format that each is made of. Layers that no row knows, or of whose parts some are
        missing, are left out."""
        given = set(theirs)
        found: dict[str, list[str]] = {}
        for layer in given:
            for row in self.rows:
                number = _number(row.theirs, layer)
                if number is not None:
                    parts = [each.replace("{n}", number) for each in row.theirs]
                    if given.issuperset(parts):
                        found[row.ours.replace("{n}", number)] = parts
        return {layer: found[layer] for layer in sorted(found, key=_by_number)}

    def to_theirs(self, layer: str) -> tuple[list[str], bool] | None:
        """What the format calls one of our layers, and whether its weight is [in, out] there; None where it has none."""
        for row in self.rows:
            if (number := _number((row.ours,), layer)) is not None:
                return [each.replace("{n}", number) for each in row.theirs], row.transposed
        return None

    def fits(self, theirs: Sequence[str], ours: Collection[str]) -> bool:
        """Whether all of these are layers of the format, and of a model with these tensors."""
        found = self.to_ours(theirs)
        known = {part for parts in found.values() for part in parts}
        return known == set(theirs) and all(f"{layer}{_WEIGHT}" in ours for layer in found)

    @staticmethod
    def joined(layer: str, theirs: Sequence[str], weights: Sequence[float]) -> dict[str, Recipe]:
        """One adapter of the format's for a layer of ours.

        Args:
            layer: ours.
            theirs: one, or several that are one above the other in our layer.
            weights: what each product counts, relative to the first.
        """
        if len(theirs) == 1:
            return {f"{layer}.{each}": Recipe((f"{theirs[0]}.{each}",)) for each in (A, B)}
        return {
            f"{layer}.{A}": Recipe(tuple(f"{each}.{A}" for each in theirs), JOINED),
            f"{layer}.{B}": Recipe(tuple(f"{each}.{B}" for each in theirs), _diagonal(tuple(weights))),
        }

    @staticmethod
    def split(layer: str, theirs: Sequence[str], diagonal: bool) -> dict[str, Recipe]:
        """The format's adapters for one of ours.

        Args:
            layer: ours.
            theirs: one, or several that are one above the other in our layer.
            diagonal: our B has one block for each of theirs, and zeros elsewhere: then each gets its own A and its own block.
        """
        count = len(theirs)
        if count == 1:
            return {f"{theirs[0]}.{each}": Recipe((f"{layer}.{each}",)) for each in (A, B)}
        recipes = {}
        for number, name in enumerate(theirs):
            recipes[f"{name}.{A}"] = Recipe((f"{layer}.{A}",), part(number, count) if diagonal else UNCHANGED)
            recipes[f"{name}.{B}"] = Recipe((f"{layer}.{B}",), _block(number, count) if diagonal else part(number, count))
        return recipes


def renaming_of(format: Format) -> Renaming:
    """The layers among a format's weights."""
    rows = []
    for rule in format.rules:
        plain = rule.change in (UNCHANGED, TRANSPOSED) or rule.change is JOINED
        if plain and rule.ours.endswith(_WEIGHT) and all(each.endswith(_WEIGHT) for each in rule.theirs):
            theirs = tuple(each.removesuffix(_WEIGHT) for each in rule.theirs)
            rows.append(Row(theirs, rule.ours.removesuffix(_WEIGHT), rule.change is TRANSPOSED))
    return Renaming(format, tuple(rows))


def renamings(architecture: str | None) -> Iterable[Renaming]:
    """Those of all formats of an architecture."""
    return (
        renaming_of(each) for each in formats() if architecture is not None and each.architecture == architecture and each.rules
    )


def _number(patterns: Iterable[str], name: str) -> str | None:
    """The block's number in a name that is one of these; empty where it has none; None of another name."""
    for pattern in patterns:
        found = re.fullmatch(re.escape(pattern).replace(re.escape("{n}"), r"(\d+)"), name)
        if found is not None:
            return found.group(1) if found.groups() else ""
    return None


def _by_number(layer: str) -> list[tuple[bool, int, str]]:
    return [(not each.isdigit(), int(each) if each.isdigit() else 0, each) for each in layer.split(".")]


def _diagonal(weights: tuple[float, ...]) -> Change:
    def shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (sum(each[0] for each in shapes), sum(each[1] for each in shapes))

    def apply(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks = [each if weight == 1 else weight * each for each, weight in zip(tensors, weights, strict=True)]
        return torch.block_diag(*blocks)  # type: ignore[no-any-return]

    return Change("joined", shape, apply)


def _block(number: int, count: int) -> Change:
    def shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (shapes[0][0] // count, shapes[0][1] // count)

    def apply(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        rows, columns = shape([tuple(tensors[0].shape)])
        return tensors[0][number * rows : (number + 1) * rows, number * columns : (number + 1) * columns]

    return Change("split", shape, apply)


def is_diagonal(b: torch.Tensor, count: int) -> bool:
    """Whether a matrix has nothing but zeros outside ``count`` equal blocks on its diagonal."""
    if b.shape[0] % count or b.shape[1] % count:
        return False
    blocks = [_block(number, count).apply([b]) for number in range(count)]
    return torch.equal(torch.block_diag(*blocks), b)
