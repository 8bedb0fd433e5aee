"""A format's tensors -> those of its architecture: by the table, complete, and in the right shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from onym.convert.mapping import Recipe, Rule, Shape, View, counts, to_ours
from onym.convert.registry import Config, NamedShapes, Origin, Stated
from onym.errors import CheckpointError
from onym.format.tensors import TensorFile
from onym.names.mismatch import listed
from onym.state.architectures import build_model
from onym.state.model import state_dict


def by_rules(origin: Origin, tensors: TensorFile, stated: Stated, given: Config) -> tuple[TensorFile, Config]:
    """The general way: the format's rules, then the configuration that its ``config`` finds.

    Raises:
        CheckpointError: tensors are missing or have other shapes than a model of that configuration.
        ConfigError: the configuration is none of the architecture's.
    """
    format = origin.format
    assert format is not None
    assert format.architecture is not None
    recipes = apply_rules(origin, tensors)
    view = View(tensors, recipes)
    named = NamedShapes(origin.contents, {name: shape_of(tensors, name) for name in tensors.names})
    config = {**format.config(named), **stated.config, **given}
    model = state_dict(build_model(format.architecture, config))
    require_complete(origin, view, {name: tuple(value.shape) for name, value in model.items() if isinstance(value, Tensor)})
    note_rules(origin, recipes)
    return view, config


def apply_rules(origin: Origin, tensors: TensorFile, rules: Sequence[Rule] | None = None) -> dict[str, Recipe]:
    """The table applied, by default the format's; what it has no place for is recorded in the origin."""
    assert origin.format is not None
    recipes, left = to_ours(origin.format.rules if rules is None else rules, tensors.names)
    ignored = [name for name in left if any(re.fullmatch(pattern, name) for pattern in origin.format.ignored)]
    origin.dropped += ignored
    origin.unused = [name for name in left if name not in set(ignored)]
    return recipes


def note_rules(origin: Origin, recipes: Mapping[str, Recipe]) -> None:
    """Record what was done, where anything was."""
    if any(recipe.sources != (name,) or recipe.change.said for name, recipe in recipes.items()):
        origin.rules = counts(recipes)


def require_complete(origin: Origin, view: View, wanted: Mapping[str, Shape], rules: Sequence[Rule] | None = None) -> None:
    """Raise a CheckpointError unless every tensor of the model is there, in its shape.

    Args:
        rules: the table that was applied, for the file's own names in the message; the format's by default.
    """
    path, present = origin.contents.path, set(view.names)
    if absent := [name for name in wanted if name not in present]:
        names = listed([their_name(origin, name, rules) for name in absent])
        raise CheckpointError(f"'{path}' is incomplete: of {len(wanted)} tensors {len(absent)} are missing, {names}.")
    for name, shape in wanted.items():
        if (found := shape_of(view, name)) != shape:
            raise CheckpointError(
                f"'{path}' does not fit together: {their_name(origin, name, rules)} is {list(found)} as "
                f"ours, and a model of this width needs {list(shape)}."
            )


def their_name(origin: Origin, ours: str, rules: Sequence[Rule] | None = None) -> str:
    """What the file would call a tensor of ours."""
    assert origin.format is not None
    for rule in origin.format.rules if rules is None else rules:
        pattern = re.escape(rule.ours).replace(re.escape("{n}"), r"(\d+)")
        if match := re.fullmatch(pattern, ours):
            return rule.theirs[0].replace("{n}", match.group(1) if match.groups() else "")
    return ours


def shape_of(file: TensorFile, name: str) -> Shape:
    """The shape of a tensor by any of its names."""
    return file.shapes[file.aliases.get(name, name)]
