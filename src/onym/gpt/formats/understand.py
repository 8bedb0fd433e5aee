"""Somebody's GPT-2 -> a GPT: its configuration from shapes and settings, its head, its biases."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from onym.convert.mapping import Recipe, View, first_rows
from onym.convert.registry import Config, Format, Origin, Stated
from onym.convert.understand import apply_rules, note_rules, require_complete, their_name
from onym.errors import CheckpointError, ConfigError
from onym.format.tensors import TensorFile
from onym.gpt.config import GPTConfig
from onym.gpt.formats.classifiers import labels_of, not_a_head
from onym.gpt.formats.differences import extra
from onym.gpt.formats.transformers_folder import OURS
from onym.gpt.gpt2 import GPT
from onym.names.mismatch import listed

HEAD_SIZE = 64
"""Of every GPT-2 that OpenAI and the book have."""
_EMBEDDING, _POSITIONS, _HEAD = "tok_emb.weight", "pos_emb.weight", "out_head.weight"


def as_gpt(origin: Origin, tensors: TensorFile, stated: Stated, given: Config) -> tuple[TensorFile, Config] | None:
    """The tensors of a GPT-2 under our names, and its configuration; None where it is another model, which the origin says.

    Raises:
        CheckpointError: something is missing, or settings and shapes contradict each other.
        ConfigError: a setting that was given contradicts the file.
    """
    recipes = apply_rules(origin, tensors)
    view = View(tensors, recipes)
    reason = not_a_head(view, origin) or lora_in(origin)
    if reason is not None:
        origin.not_ours = reason
        return None
    if others := given.keys() - {"n_heads", "labels"}:
        raise ConfigError(f"{min(others)} cannot be given for {origin.kind}: leave it out.")
    head = labels_of(origin, view, given)
    config = _configured(origin, view, stated, given.get("n_heads"), head)
    recipes = recipes if head else _with_head(origin, view, recipes, stated)
    view = View(tensors, recipes)
    config = GPTConfig.from_dict({**config.to_dict(), "tie_embeddings": _HEAD in view.aliases})
    recipes, config = _without_our_zeros(origin, view, recipes, config)
    view = View(tensors, recipes)
    require_complete(
        origin, view, {name: tuple(tensor.shape) for name, tensor in GPT.without_values(config).state_dict().items()}
    )
    note_rules(origin, recipes)
    return view, config.to_dict()


# A layout of GPT-2. Heads and the form of GELU change what a model computes, and show in no shape.
GPT2Format = functools.partial(Format, architecture="gpt", understand=as_gpt, hidden=("n_heads", "gelu"), extra=extra)


def crop_vocabulary(tensors: TensorFile, config: Config, vocab_size: int) -> tuple[TensorFile, Config]:
    """A GPT with the first rows of its vocabulary alone."""
    change, tables = first_rows(vocab_size), (_EMBEDDING,) if config.get("labels") else (_EMBEDDING, _HEAD)
    recipes = {name: Recipe((name,), change) if name in tables else Recipe((name,)) for name in tensors.names}
    return View(tensors, recipes), {**config, "vocab_size": vocab_size}


def lora_in(origin: Origin) -> str | None:
    """Why a file with LoRA's matrices is no model by itself; None where there are none."""
    lora = [name for name in origin.unused if ".lora" in name]
    return f"it has LoRA's matrices ({lora[0]}), which have to be merged into the others first" if lora else None


def numbered_layers(origin: Origin, view: View) -> int:
    """How many layers there are.

    Raises:
        CheckpointError: one of them is missing.
    """
    layers = {int(found.group(1)) for name in view.names if (found := re.match(r"trf_blocks\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        absent = sorted(set(range(max(layers) + 1)) - layers)
        missing = f"{listed([*map(str, absent)])} {'is' if len(absent) == 1 else 'are'} missing"
        raise CheckpointError(f"'{origin.contents.path}' is incomplete: of its {max(layers) + 1} layers, {missing}.")
    return len(layers)


def _configured(origin: Origin, view: View, stated: Stated, n_heads: int | None, head: Config) -> GPTConfig:
    """The configuration, from what shapes and settings say; they have to agree."""
    path = origin.contents.path
    for name in (_EMBEDDING, _POSITIONS):
        if name not in view.shapes or len(view.shapes[name]) != 2:
            raise CheckpointError(f"'{path}' is incomplete: it has no {their_name(origin, name)}.")
    vocabulary, width = view.shapes[_EMBEDDING]
    shaped: dict[str, Any] = {
        "vocab_size": vocabulary,
        "context_length": view.shapes[_POSITIONS][0],
        "emb_dim": width,
        "n_layers": numbered_layers(origin, view),
        "qkv_bias": "trf_blocks.0.att.qkv.bias" in view.names,
        "bias": "trf_blocks.0.att.proj.bias" in view.names,
    }
    for key, value in shaped.items():
        if key in stated.config and stated.config[key] != value and key in stated.names:
            raise CheckpointError(
                f"'{path}' does not fit together: {stated.source} says {stated.names[key]}={stated.config[key]}, and the "
                f"tensors have {value}. Take the settings that belong to the weights."
            )
    config = {**{key: value for key, value in stated.config.items() if key != "tie_embeddings"}, **shaped, **head}
    if n_heads is not None:
        if config.setdefault("n_heads", n_heads) != n_heads:
            raise ConfigError(f"{stated.source} says {config['n_heads']} heads, and {n_heads} were given: leave them out.")
    elif "n_heads" not in config:
        config["n_heads"] = max(1, width // HEAD_SIZE)
        origin.assumed.add("n_heads")
        if width % HEAD_SIZE:
            config["n_heads"] = 1
            origin.problem = (
                f"'{path}' does not say how many attention heads its model has, and its width of {width} is no multiple of "
                f"{HEAD_SIZE}: say it (n_heads= or --n-heads)."
            )
        else:
            origin.notes.append(
                f"{config['n_heads']} attention heads were assumed, of size {HEAD_SIZE}, as GPT-2 has: the file does not say. "
                "If it was another number, give it (n_heads= or --n-heads)."
            )
    try:
        return GPTConfig.from_dict({key: value for key, value in config.items() if value is not None})
    except ConfigError as error:
        if n_heads is not None:
            raise
        raise CheckpointError(f"The settings in '{path}' cannot be a GPT's: {error}") from error


def _with_head(origin: Origin, view: View, recipes: dict[str, Recipe], stated: Stated) -> dict[str, Recipe]:
    """With the head, which many files leave out, or hold twice, where it is the embedding."""
    assert origin.format is not None
    name = origin.format.name
    says_tied = name == "nanogpt" or stated.config.get("tie_embeddings", name == "huggingface") is True
    tied = {**recipes, _HEAD: recipes[_EMBEDDING]}
    if _HEAD not in view.names:
        if not says_tied and name != "book-fast":
            raise CheckpointError(f"'{origin.contents.path}' is incomplete: it has no {their_name(origin, _HEAD)}.")
        return tied
    if _HEAD in view.aliases or not says_tied or name not in ("huggingface", "nanogpt"):
        return recipes
    if torch.equal(view.tensor(_HEAD), view.tensor(_EMBEDDING)):
        return tied
    if name == "huggingface" and stated.source:
        origin.dropped.append("lm_head.weight")
        origin.notes.append(
            "config.json ties the head to the embedding, and the file holds another head besides, which transformers "
            "does not use either: it was left out."
        )
        return tied
    origin.notes.append("Its head differs from the embedding, so it stays a separate one.")
    return recipes


def _without_our_zeros(
    origin: Origin, view: View, recipes: dict[str, Recipe], config: GPTConfig
) -> tuple[dict[str, Recipe], GPTConfig]:
    """Without the biases of zeros that we gave a model which has none, where transformers' file says that it was ours."""
    assert origin.format is not None
    values = origin.contents.json("config.json")
    own = values.get(OURS) if values else None
    if origin.format.name != "huggingface" or not isinstance(own, dict):
        return recipes, config
    added = {
        name
        for name in view.shapes
        if (name.endswith("att.qkv.bias") and own.get("qkv_bias") is False)
        or (name.endswith(".bias") and not name.endswith("att.qkv.bias") and own.get("bias") is False)
    }
    if not added or any(bool(view.tensor(name).any()) for name in added):
        return recipes, config
    fields = {key: own[key] for key in ("qkv_bias", "bias") if isinstance(own.get(key), bool)}
    origin.dropped += [name for name in view.shapes if name in added]
    remaining = {name: recipe for name, recipe in recipes.items() if name not in added}
    return remaining, GPTConfig.from_dict({**config.to_dict(), **fields})
