"""Our tensors in a format's layout, for a live model or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from onym.convert.mapping import Recipe, Shape, View, to_theirs
from onym.convert.registry import Format, NamedShapes, formats
from onym.errors import CheckpointError
from onym.format.tensors import TensorFile


def format_of(shapes: Mapping[str, Shape]) -> Format | None:
    """The format that a model in memory has, from the names and shapes of its state."""
    named = NamedShapes(contents=None, shapes=shapes)  # type: ignore[arg-type]  # nothing but names and shapes is looked at
    return next((known for known in formats() if known.rules and known.recognise(named) is not None), None)


def translated(ours: TensorFile, format: Format, wanted: Mapping[str, Shape] | None = None) -> View:
    """Our tensors under a format's names.

    Args:
        ours: tensors under the architecture's names.
        format: whose names to give.
        wanted: names and shapes that the target has. What it has besides ours is made, where the format knows how.

    Raises:
        CheckpointError: the format has no place for one of the tensors.
    """
    recipes = their_recipes(ours, format)
    named = Counter(recipes.values())  # a head has another name in each of a program's classes
    recipes = {name: recipe for name, recipe in recipes.items() if named[recipe] == 1 or wanted is None or name in wanted}
    dtype = next(iter(ours.dtypes.values()))
    stored = {name[:end] for name in recipes for end, letter in enumerate(name) if letter == "."}  # modules that have tensors
    for name, shape in (wanted or {}).items():
        if name in recipes or name.rpartition(".")[0] not in stored:  # for a layer that does not exist, nothing is made either
            continue
        if (made := format.extra(name, shape, dtype)) is not None:
            recipes[name] = made
    return View(ours, recipes)


def their_recipes(ours: TensorFile, format: Format) -> dict[str, Recipe]:
    """The table, from our names to the format's.

    Raises:
        CheckpointError: it has no place for one of the tensors.
    """
    recipes, left = to_theirs(format.rules, ours.names)
    if left:
        raise CheckpointError(f"{format.title} has no place for {left[0]}.")
    return recipes
