"""How the tensors of one layout become those of another: a table, read in both directions, applied when a tensor is asked for.

A row says which of their tensors are which of ours, and what has to be done to the values. ``{n}`` stands for a layer's number.
Nothing here reads a tensor before somebody asks for it, and then that one alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.errors import CheckpointError
from onym.format.safetensors import dtype_called
from onym.format.tensors import Damage, TensorFile

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What is done to values: to one tensor, to several that become one, or to none where one is made."""

    said: str
    """In a report, of so many tensors: ``transposed 48``. Empty where nothing is done."""
    shape: Callable[[Sequence[Shape]], Shape]
    """The shape that comes of these."""
    apply: Callable[[Sequence[Tensor]], Tensor]
    """The values; a view where one will do."""


UNCHANGED = Change("", lambda shapes: shapes[0], lambda tensors: tensors[0])
TRANSPOSED = Change("transposed", lambda shapes: _matrix(shapes[0])[::-1], lambda tensors: tensors[0].t())
JOINED = Change("joined", lambda shapes: _stacked(shapes), lambda tensors: torch.cat(list(tensors)))


def part(number: int, of: int) -> Change:
    """One of equal parts along the first dimension."""

    def shape(shapes: Sequence[Shape]) -> Shape:
        (rows, *rest) = shapes[0]
        if rows % of:
            raise ValueError(f"{rows} rows are not {of} equal parts")
        return (rows // of, *rest)

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        rows = len(tensors[0]) // of
        return tensors[0][number * rows : (number + 1) * rows]

    return Change("split", shape, apply)


def first_rows(count: int) -> Change:
    """A table with fewer rows: a vocabulary without its padding."""
    return Change("cropped", lambda shapes: (count, *shapes[0][1:]), lambda tensors: tensors[0][:count])


def made(said: str, shape: Shape, make: Callable[[], Tensor]) -> Change:
    """A tensor that the other layout wants and this one does without."""
    return Change(said, lambda shapes: shape, lambda tensors: make())


def zeros(shape: Shape, dtype: str) -> Change:
    """A bias that adds nothing."""
    kind = dtype_called(dtype) or torch.float32
    return made("given zeros", shape, lambda: torch.zeros(shape, dtype=kind, device="cpu"))


@dataclass(frozen=True)
class Rule:
    """A row of a table."""

    theirs: tuple[str, ...]
    ours: str
    change: Change = UNCHANGED
    """From theirs to ours."""
    back: tuple[Change, ...] = (UNCHANGED,)
    """From ours to each of theirs."""


def same(theirs: str, ours: str) -> Rule:
    """The same values under another name."""
    return Rule((theirs,), ours)


def transposed(theirs: str, ours: str) -> Rule:
    """``[in, out]`` there, ``[out, in]`` here."""
    return Rule((theirs,), ours, TRANSPOSED, (TRANSPOSED,))


def joined(theirs: tuple[str, ...], ours: str) -> Rule:
    """Several matrices there, one above the other here."""
    return Rule(theirs, ours, JOINED, tuple(part(number, len(theirs)) for number in range(len(theirs))))


def weight_and_bias(theirs: str, ours: str, rule: Callable[[str, str], Rule] = same) -> tuple[Rule, Rule]:
    """Of a module; ``rule`` is that of its weight."""
    return rule(f"{theirs}.weight", f"{ours}.weight"), same(f"{theirs}.bias", f"{ours}.bias")


@dataclass(frozen=True)
class Recipe:
    """How one tensor comes of others."""

    sources: tuple[str, ...] = ()
    change: Change = UNCHANGED
    dtype: str = ""
    """Of a tensor that comes of none."""


def _layers_of(patterns: Iterable[str], names: Iterable[str]) -> list[int]:
    """The numbers of the layers that some of the names are of, by patterns with ``{n}`` for the number."""
    starts = sorted({re.escape(pattern.partition("{n}")[0]) for pattern in patterns if "{n}" in pattern})
    numbered = re.compile(f"(?:{'|'.join(starts)})([0-9]{{1,6}})[.]")
    return sorted({int(found.group(1)) for name in names if starts and (found := numbered.match(name))})


def to_ours(rules: Iterable[Rule], names: Sequence[str]) -> tuple[dict[str, Recipe], list[str]]:
    """Our names with what each is made of, and the names that no rule knows, or of whose parts some are missing."""
    rules, present = list(rules), set(names)
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()
    for rule, n in _every(rules, _layers_of((their for row in rules for their in row.theirs), names)):
        theirs = tuple(name.replace("{n}", n) for name in rule.theirs)
        if present.issuperset(theirs):
            recipes[rule.ours.replace("{n}", n)] = Recipe(theirs, rule.change)
            used.update(theirs)
    return recipes, [name for name in names if name not in used]


def to_theirs(rules: Iterable[Rule], ours: Iterable[str]) -> tuple[dict[str, Recipe], list[str]]:
    """The reverse of :func:`to_ours`, from our names."""
    rules, names, recipes, used = list(rules), list(ours), dict[str, Recipe](), set[str]()
    present = set(names)
    for rule, n in _every(rules, _layers_of((row.ours for row in rules), names)):
        name = rule.ours.replace("{n}", n)
        if name in present:
            used.add(name)
            for their, back in zip(rule.theirs, rule.back, strict=True):
                recipes[their.replace("{n}", n)] = Recipe((name,), back)
    return recipes, [name for name in names if name not in used]


def counts(recipes: Mapping[str, Recipe]) -> dict[str, int]:
    """What is done, by word: renamed, transposed, joined, split …"""
    counted: Counter[str] = Counter()
    for name, recipe in recipes.items():
        if recipe.sources and recipe.sources != (name,):
            counted["renamed"] += 1
        if recipe.change.said:
            counted[recipe.change.said] += 1
    return dict(counted)


class View(TensorFile):
    """Tensors that come of those of another file by recipes, each when it is asked for."""

    def __init__(self, source: TensorFile, recipes: Mapping[str, Recipe], path: Path | None = None) -> None:
        self.source, self.recipes = source, recipes
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, str] = {}
        aliases: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, recipe in recipes.items():
            stored = tuple(source.aliases.get(each, each) for each in recipe.sources)
            if stored and first.setdefault((stored, recipe.change), name) != name:
                aliases[name] = first[stored, recipe.change]
                continue
            try:
                shapes[name] = recipe.change.shape([source.shapes[each] for each in stored])
            except (ValueError, IndexError) as error:
                raise CheckpointError(f"{', '.join(recipe.sources)} in '{source.path}' cannot be {name}: {error}.") from error
            dtypes[name] = source.dtypes[stored[0]] if stored else recipe.dtype
        super().__init__(path or source.path, shapes, dtypes, aliases, {})

    def _read(self, name: str) -> Any:
        recipe = self.recipes[name]
        return recipe.change.apply([self.source.tensor(each, verify=False) for each in recipe.sources])

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        yield from _damages_of(self.source, (each for name in names for each in self.recipes[name].sources), reused)


class Joined(TensorFile):
    """Tensors of several files, as one."""

    def __init__(self, path: Path, files: Sequence[TensorFile]) -> None:
        self._of: dict[str, TensorFile] = {}
        for file in files:
            for name in file.names:
                if self._of.setdefault(name, file) is not file:
                    raise CheckpointError(f"{name} is in both '{self._of[name].path}' and '{file.path}': which one is right?")
        self.files = list(files)
        super().__init__(
            path,
            {name: shape for file in files for name, shape in file.shapes.items()},
            {name: dtype for file in files for name, dtype in file.dtypes.items()},
            {alias: name for file in files for alias, name in file.aliases.items()},
            {},
        )

    def _read(self, name: str) -> Any:
        return self._of[name].tensor(name, verify=False)

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        for file in self.files:
            yield from _damages_of(file, (name for name in names if self._of[name] is file), reused)


def nbytes(file: TensorFile) -> int:
    """What its tensors need in a file."""
    kinds = {name: dtype_called(file.dtypes[name]) for name in file.shapes}
    return sum(math.prod(file.shapes[name]) * (kind.itemsize if kind else 1) for name, kind in kinds.items())


def _damages_of(file: TensorFile, names: Iterable[str], reused: bool) -> Iterator[Damage]:
    stored = dict.fromkeys(file.aliases.get(name, name) for name in names)
    yield from file.unverified(stored, reused=reused)


def _every(rules: Sequence[Rule], layers: Sequence[int]) -> Iterator[tuple[Rule, str]]:
    """Each rule with each layer's number, those without one once."""
    numbered = [rule for rule in rules if "{n}" in rule.ours]
    for rule in rules:
        if "{n}" not in rule.ours:
            yield rule, ""
        elif rule is numbered[0]:  # layer by layer, as a model lists them
            yield from ((each, str(n)) for n in layers for each in numbered)


def _matrix(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise ValueError(f"it has the shape {list(shape)}, and a matrix is wanted")
    return shape


def _stacked(shapes: Sequence[Shape]) -> Shape:
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(f"shapes {', '.join(str(list(shape)) for shape in shapes)} do not go one above the other")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
