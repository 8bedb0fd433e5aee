"""A GPT without what another layout cannot hold."""

from __future__ import annotations

from collections.abc import Collection

from onym.convert.mapping import Recipe, View
from onym.convert.registry import Config
from onym.format.tensors import TensorFile


def without(tensors: TensorFile, config: Config, words: Collection[str]) -> tuple[TensorFile, Config]:
    """The other model that ``--drop`` asks for: ``head`` ties the head to the embedding, ``gelu`` takes the other form."""
    if "head" in words:
        recipes = {name: Recipe((name,)) for name in tensors.names if name != "out_head.weight"}
        tensors = View(tensors, {**recipes, "out_head.weight": Recipe(("tok_emb.weight",))})
        config = {**config, "tie_embeddings": True}
    if "gelu" in words:
        config = {**config, "gelu": "erf" if config["gelu"] == "tanh" else "tanh"}
    return tensors, config
