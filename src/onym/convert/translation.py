"""Our tensors in another layout: what a target has besides ours is made (masks, biases of zeros), and what it lacks is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from onym.convert.mapping import Recipe, Shape, View, made, to_theirs, zeros
from onym.convert.opening import FORMATS
from onym.convert.registry import Format, NamedShapes
from onym.errors import CheckpointError
from onym.format.tensors import TensorFile
from onym.gpt.config import GPTConfig

_MASK = re.compile(r"(.*\.)?att\.mask")


def format_of(shapes: Mapping[str, Shape]) -> Format | None:
    """Whose layout a model in memory has, from the names and shapes of its state."""
    found = NamedShapes(contents=None, shapes=shapes)  # type: ignore[arg-type]  # nothing but names and shapes is looked at
    return next((format for format in FORMATS if format.rules and format.recognise(found) is not None), None)


def translated(ours: TensorFile, config: GPTConfig, format: Format, wanted: Mapping[str, Shape] | None = None) -> View:
    """Our tensors under a format's names.

    Args:
        ours: a GPT's tensors under our names.
        config: its configuration.
        format: whose names to give.
        wanted: the names and shapes that the target has. What it has besides ours and can be made without loss is made.

    Raises:
        CheckpointError: the format has no place for one of the tensors.
    """
    recipes, left = to_theirs(format.rules, ours.names, config.n_layers)
    if left:
        raise CheckpointError(f"{format.title} has no place for {left[0]}.")
    dtype = ours.dtypes["tok_emb.weight"]
    stored = {name[:end] for name in recipes for end, letter in enumerate(name) if letter == "."}  # modules that have tensors
    for name, shape in (wanted or {}).items():
        if name in recipes or name.rpartition(".")[0] not in stored:  # for a layer that is not there, nothing is made either
            continue
        if _MASK.fullmatch(name):
            recipes[name] = mask(shape[-1])
        elif name.endswith((".bias", ".shift")):
            recipes[name] = Recipe((), zeros(shape, dtype), dtype)
    return View(ours, recipes)


def mask(context_length: int) -> Recipe:
    """The book's causal mask: ones above the diagonal."""
    shape = (context_length, context_length)
    return Recipe((), made("given masks", shape, lambda: torch.ones(shape, device="cpu").triu(1)), "float32")


def biases(config: GPTConfig, format: Format, *, wanted: Iterable[str]) -> dict[str, Shape]:
    """The biases under a format's names that a model of this configuration has not, with their shapes, all of zeros.

    Args:
        config: of the model.
        format: the target.
        wanted: which of our biases the target cannot do without, as ``att.qkv`` or ``norm1``, or a module outside the layers.
    """
    width = config.emb_dim
    sizes = {"att.qkv": 3 * width, "ff.layers.0": 4 * width}
    shapes: dict[str, Shape] = {}
    for module in wanted:
        layered = module != "final_norm"
        ours = f"trf_blocks.{{n}}.{module}.bias" if layered else f"{module}.bias"
        rule = next(rule for rule in format.rules if rule.ours == ours)
        for layer in range(config.n_layers if layered else 1):
            for theirs in rule.theirs:
                shapes[theirs.replace("{n}", str(layer))] = (sizes.get(module, width) // len(rule.theirs),)
    return shapes
