"""Biases and masks that a layout of GPT-2 cannot do without, and a GPT may."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from onym.convert.mapping import Recipe, Rule, Shape, made, zeros
from onym.gpt.config import GPTConfig

_MASK = re.compile(r"(.*\.)?att\.mask")


def extra(name: str, shape: Shape, dtype: str) -> Recipe | None:
    """A tensor of a live model that a GPT has not: the book's mask, or a bias of zeros, which changes no output."""
    if _MASK.fullmatch(name):
        return mask(shape[-1])
    return Recipe((), zeros(shape, dtype), dtype) if name.endswith((".bias", ".shift")) else None


def mask(context_length: int) -> Recipe:
    """The book's causal mask: ones above the diagonal."""
    shape = (context_length, context_length)
    return Recipe((), made("given masks", shape, lambda: torch.ones(shape, device="cpu").triu(1)), "float32")


def biases(config: GPTConfig, rules: Iterable[Rule], wanted: Iterable[str], dtype: str) -> dict[str, Recipe]:
    """Biases of zeros under a format's names.

    Args:
        config: of the model.
        rules: of the format.
        wanted: which of our biases the target cannot do without, as ``att.qkv`` or ``norm1``, or a module outside the layers.
        dtype: of the weights.
    """
    width, rules = config.emb_dim, list(rules)
    sizes = {"att.qkv": 3 * width, "ff.layers.0": 4 * width}
    recipes: dict[str, Recipe] = {}
    for module in wanted:
        layered = module != "final_norm"
        ours = f"trf_blocks.{{n}}.{module}.bias" if layered else f"{module}.bias"
        rule = next(rule for rule in rules if rule.ours == ours)
        for layer in range(config.n_layers if layered else 1):
            for theirs in rule.theirs:
                shape = (sizes.get(module, width) // len(rule.theirs),)
                recipes[theirs.replace("{n}", str(layer))] = Recipe((), zeros(shape, dtype), dtype)
    return recipes
