"""Somebody's Llama or Qwen -> a Decoder: its configuration from shapes and settings, and its head."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from onym.convert.mapping import Recipe, Rule, View
from onym.convert.registry import Config, Format, Origin, Stated
from onym.convert.understand import apply_rules, note_rules, require_complete, shape_of, their_name
from onym.errors import CheckpointError, ConfigError
from onym.format.tensors import TensorFile
from onym.gpt.decoder import Decoder
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.formats.classifiers import labels_of, not_a_head
from onym.gpt.formats.understand import lora_in, numbered_layers

_EMBEDDING, _HEAD = "tok_emb.weight", "out_head.weight"
_QUERY, _KEY, _QUERY_NORM = (f"trf_blocks.0.att.{name}.weight" for name in ("W_query", "W_key", "q_norm"))
_GATE = "trf_blocks.0.ff.fc1.weight"
HIDDEN = ("n_heads", "n_kv_groups", "head_dim", "rope_base", "rope_freq", "norm_eps")
"""Fields that change what a decoder computes, and show in no shape."""
GIVEN = (*HIDDEN, "context_length")
"""Fields that a file need not state, and that can be given."""
_WIDE = 3072  # from this width on Llama's heads have 128 dimensions, below 64
_LLAMA_3_TOKENS = 128_256
_LLAMA = {"rope_base": 500_000.0, "context_length": 131_072, "norm_eps": 1e-5, "rope_freq": None}
_QWEN2 = {"rope_base": 1_000_000.0, "context_length": 32_768, "norm_eps": 1e-6, "rope_freq": None}
_QWEN3 = {"rope_base": 1_000_000.0, "context_length": 40_960, "norm_eps": 1e-6, "rope_freq": None}


def as_decoder(
    origin: Origin, tensors: TensorFile, stated: Stated, given: Config, rules: Sequence[Rule] | None = None
) -> tuple[View, Config] | None:
    """The tensors of a decoder under our names, and its configuration; None where it is another model, which the origin says.

    Args:
        rules: the table, where it depends on the file's settings; the format's by default.

    Raises:
        CheckpointError: something is missing, or settings and shapes contradict each other.
        ConfigError: a setting that was given contradicts the file.
    """
    assert origin.format is not None
    table = origin.format.rules if rules is None else rules
    recipes = apply_rules(origin, tensors, table)
    view = View(tensors, recipes)
    if (reason := _another_model(origin, view)) is not None:
        origin.not_ours = reason
        return None
    for name in (_EMBEDDING, _QUERY, _KEY, _GATE):
        if len(view.shapes.get(name, ())) != 2:
            raise CheckpointError(f"'{origin.contents.path}' is incomplete: it has no {their_name(origin, name, table)}.")
    head = labels_of(origin, view, given)
    config = _configured(origin, view, stated, {key: value for key, value in given.items() if key != "labels"}, table, head)
    recipes = recipes if head else _with_head(origin, view, recipes, stated, table)
    view = View(tensors, recipes)
    config = DecoderConfig.from_dict({**config.to_dict(), "tie_embeddings": _HEAD in view.aliases})
    wanted = Decoder.without_values(config).state_dict()
    require_complete(origin, view, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, table)
    note_rules(origin, recipes)
    return view, config.to_dict()


DecoderFormat = functools.partial(Format, architecture="decoder", understand=as_decoder, hidden=HIDDEN)


def _another_model(origin: Origin, view: View) -> str | None:
    """Which part of it a decoder does not have."""
    if (reason := lora_in(origin)) is not None:
        return reason
    for name in origin.unused:
        if ".experts." in name or "block_sparse_moe." in name or name.endswith(".mlp.gate.weight"):
            return f"it is a mixture of experts ({name}), and here each layer has one feed-forward"
    if (reason := not_a_head(view, origin)) is not None:
        return reason
    inside = [name for name in origin.unused if any(segment.isdigit() for segment in name.split("."))]
    if inside:
        return f"its layers have {inside[0]}, which {origin.format.title if origin.format else 'it'} has not"
    return None


def _configured(
    origin: Origin, view: View, stated: Stated, given: Config, table: Sequence[Rule], head: Config
) -> DecoderConfig:
    """The configuration, from what shapes and settings say; they have to agree."""
    path = origin.contents.path
    for name, value in given.items():
        if name not in GIVEN:
            raise ConfigError(f"{name} cannot be given for {origin.kind}: leave it out.")
        if name in stated.config and stated.config[name] != value:
            raise ConfigError(
                f"{stated.source or path} says {name}={stated.config[name]}, and {value} was given: leave it out."
            )
    vocabulary, width = view.shapes[_EMBEDDING]
    shaped: dict[str, Any] = {
        "vocab_size": vocabulary,
        "emb_dim": width,
        "n_layers": numbered_layers(origin, view),
        "hidden_dim": view.shapes[_GATE][0],
        "qk_norm": _QUERY_NORM in view.names,
        "qkv_bias": "trf_blocks.0.att.W_query.bias" in view.names,
        **_heads(origin, view, stated, given, table),
    }
    for key, value in shaped.items():
        if key in stated.config and stated.config[key] != value and key in stated.names:
            raise CheckpointError(
                f"'{path}' does not fit together: {stated.source} says {stated.names[key]}={stated.config[key]!r}, and the "
                f"tensors have {value}. Take the settings that belong to the weights."
            )
        if key in given and given[key] != value:
            raise ConfigError(f"'{path}' has {key}={value}, and {given[key]} was given: leave it out.")
    config = {**shaped, **{key: value for key, value in stated.config.items() if key != "tie_embeddings"}, **given}
    config |= {**_assumed(origin, config), **head}
    try:
        return DecoderConfig.from_dict(config)
    except ConfigError as error:
        if given:
            raise
        raise CheckpointError(f"The settings in '{path}' cannot be a decoder's: {error}") from error


def _heads(origin: Origin, view: View, stated: Stated, given: Config, table: Sequence[Rule]) -> dict[str, int]:
    """``n_heads``, ``head_dim`` and ``n_kv_groups``: of two that multiply to the rows of a matrix, one has to be known."""
    path = origin.contents.path
    queries, keys = view.shapes[_QUERY][0], view.shapes[_KEY][0]
    width = view.shapes[_EMBEDDING][1]
    says = {**stated.config, **given}
    heads, size = says.get("n_heads"), says.get("head_dim")
    for value in (heads, size):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise (ConfigError if value in given.values() else CheckpointError)(
                f"'{path}' cannot have heads by {value!r}: a number of heads and their width are whole numbers of at least 1."
            )
    if size is None and _QUERY_NORM in view.shapes:
        size = view.shapes[_QUERY_NORM][0]
    elif heads is None and size is None:
        size = 128 if width >= _WIDE else 64
        origin.assumed |= {"n_heads", "head_dim", "n_kv_groups"}
        if queries % size or keys % size:
            origin.problem = (
                f"'{path}' does not say how many attention heads its model has, and its queries of {queries} dimensions are "
                f"not heads of {size}: say it (n_heads= or --n-heads)."
            )
            size = keys  # its tensors can still be loaded into a model that somebody built
        else:
            origin.notes.append(
                f"{queries // size} attention heads were assumed, of size {size}, as Llama has at this width: the file does "
                "not say. If it was another number, give it (n_heads= or --n-heads)."
            )
    if size is None:
        assert heads is not None
        size = queries // heads
    for name, rows, parts in ((_QUERY, queries, heads or size), (_KEY, keys, size)):
        if not size or rows % parts:
            said = f"{heads} heads of queries" if name == _QUERY else f"heads of {size}, as the queries are"
            problem = f"{their_name(origin, name, table)} has {rows} rows, which cannot be split into {said}"
            if given:
                raise ConfigError(f"{problem}: give another number of heads (n_heads= or --n-heads).")
            raise CheckpointError(f"'{path}' does not fit together: {problem}.")
    return {"n_heads": queries // size, "head_dim": size, "n_kv_groups": keys // size}


def _assumed(origin: Origin, config: Config) -> dict[str, Any]:
    """What nobody states: the values that the models of the book have."""
    if config["qk_norm"]:
        usual, whose = dict[str, Any](_QWEN3), "Qwen3"
    elif config["qkv_bias"]:
        usual, whose = dict[str, Any](_QWEN2), "Qwen2"
    else:
        usual, whose = dict[str, Any](_LLAMA), "Llama 3.2"
        if config["vocab_size"] == _LLAMA_3_TOKENS and "rope_base" not in config:
            usual["rope_freq"] = DecoderConfig.presets["llama3.2-1b"]["rope_freq"]
    missing = {key: value for key, value in usual.items() if key not in config}
    origin.assumed |= missing.keys()
    said = [f"{key}={value}" for key, value in missing.items() if key in ("rope_base", "context_length")]
    if said:
        were = "were" if len(said) > 1 else "was"
        scaled = ", with its rope_freq" if missing.get("rope_freq") is not None else ""
        origin.notes.append(
            f"{' and '.join(said)} {were} assumed, as {whose} has{scaled}: the file does not say. If the model was trained "
            "with others, give them (rope_base= or --rope-base, context_length= or --context-length)."
        )
    return missing


def _with_head(
    origin: Origin, view: View, recipes: dict[str, Recipe], stated: Stated, table: Sequence[Rule]
) -> dict[str, Recipe]:
    """With the head, which files leave out, or hold twice, where it is the embedding."""
    ties = stated.config.get("tie_embeddings")
    tied = {**recipes, _HEAD: recipes[_EMBEDDING]}
    if _HEAD not in view.names:
        if ties is False:
            raise CheckpointError(f"'{origin.contents.path}' is incomplete: it has no {their_name(origin, _HEAD, table)}.")
        return tied
    if _HEAD in view.aliases or not ties:
        return recipes
    if shape_of(view, _HEAD) != shape_of(view, _EMBEDDING) or not torch.equal(view.tensor(_HEAD), view.tensor(_EMBEDDING)):
        origin.dropped.append(their_name(origin, _HEAD, table))
        origin.notes.append(
            f"{stated.source} ties the head to the embedding, and the file holds another head besides, which transformers "
            "does not use either: it was left out."
        )
    return tied
