"""What a layout of GPT-2 has and a GPT need not have, as biases and masks; and a GPT without what a layout cannot hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch

from onym.convert.mapping import Recipe, Rule, Shape, View, made, zeros
from onym.convert.registry import Config
from onym.format.tensors import TensorFile
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


def without(tensors: TensorFile, config: Config, words: Collection[str]) -> tuple[TensorFile, Config]:
    """The other model that ``--drop`` asks for: ``head`` ties the head to the embedding, ``gelu`` takes the other form."""
    if "head" in words:
        recipes = {name: Recipe((name,)) for name in tensors.names if name != "out_head.weight"}
        tensors = View(tensors, {**recipes, "out_head.weight": Recipe(("tok_emb.weight",))})
        config = {**config, "tie_embeddings": True}
    if "gelu" in words:
        config = {**config, "gelu": "erf" if config["gelu"] == "tanh" else "tanh"}
    return tensors, config
