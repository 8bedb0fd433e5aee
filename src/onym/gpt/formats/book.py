"""The GPTModel of "Build a Large Language Model From Scratch", as the book prints it.

Query, key and value are three matrices; norms have ``scale`` and ``shift``; the causal mask is stored with each layer (in the
chapters' model) or is not (in the one with a KV cache). The file is a bare state dict, or one under ``model_state_dict``.
"""

from __future__ import annotations

from onym.convert.mapping import Recipe, Rule, joined, same, weight_and_bias
from onym.convert.registry import Config, NamedShapes, Target
from onym.gpt.config import GPTConfig
from onym.gpt.formats.classifiers import book_head_bias, book_labels_note
from onym.gpt.formats.differences import biases, mask, without
from onym.gpt.formats.understand import HEAD_SIZE, GPT2Format

_QKV = ("W_query", "W_key", "W_value")
SETTINGS = ("n_heads", "labels")
MASK = "trf_blocks.{n}.att.mask"


def _recognise(found: NamedShapes) -> str | None:
    if not found.has(r"trf_blocks\.\d+\.att\.W_(query|key|value)\.weight") or found.has(r"trf_blocks\.\d+\.ff\.fc1\.weight"):
        return None  # with fc1: a decoder
    masks = found.has(r"trf_blocks\.\d+\.att\.mask")
    return f"att.W_query, scale and shift{', a mask in each layer' if masks else ', no masks'}"


def lacks(config: Config) -> dict[str, str]:
    """What the book's models cannot hold."""
    if config["gelu"] != "tanh":
        return {"gelu": "the book's model computes GELU's tanh form, and this model was trained with the exact one"}
    return {}


def needed_biases(config: GPTConfig) -> list[str]:
    """Its layers always have a bias, query, key and value excepted."""
    return [] if config.bias else ["norm1", "att.proj", "norm2", "ff.layers.0", "ff.layers.2", "final_norm"]


def note(config: Config) -> str | None:
    """The book's files do not state the number of heads, nor the names of labels."""
    heads, said = config["n_heads"], book_labels_note(config)
    if heads * HEAD_SIZE == config["emb_dim"]:
        return said
    of_heads = (
        f"The book's files do not say how many heads a model has: give n_heads={heads} where it is loaded "
        f"(here --n-heads {heads})."
    )
    return f"{of_heads} {said}" if said else of_heads


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    config = GPTConfig.from_dict(values)
    one = mask(config.context_length)
    masks = {MASK.replace("{n}", str(layer)): one for layer in range(config.n_layers)}
    return {**biases(config, BOOK.rules, needed_biases(config), dtype), **book_head_bias(config, dtype), **masks}


def _norm(name: str) -> tuple[Rule, Rule]:
    return same(f"{name}.scale", f"{name}.weight"), same(f"{name}.shift", f"{name}.bias")


BOOK = GPT2Format(
    name="book",
    title="the book's GPTModel",
    recognise=_recognise,
    rules=(
        same("tok_emb.weight", "tok_emb.weight"),
        same("pos_emb.weight", "pos_emb.weight"),
        *_norm("trf_blocks.{n}.norm1"),
        joined(tuple(f"trf_blocks.{{n}}.att.{each}.weight" for each in _QKV), "trf_blocks.{n}.att.qkv.weight"),
        joined(tuple(f"trf_blocks.{{n}}.att.{each}.bias" for each in _QKV), "trf_blocks.{n}.att.qkv.bias"),
        *weight_and_bias("trf_blocks.{n}.att.out_proj", "trf_blocks.{n}.att.proj"),
        *_norm("trf_blocks.{n}.norm2"),
        *weight_and_bias("trf_blocks.{n}.ff.layers.0", "trf_blocks.{n}.ff.layers.0"),
        *weight_and_bias("trf_blocks.{n}.ff.layers.2", "trf_blocks.{n}.ff.layers.2"),
        *_norm("final_norm"),
        *weight_and_bias("out_head", "out_head"),
    ),
    ignored=(r"trf_blocks\.\d+\.att\.mask",),
    target=Target(settings=SETTINGS, lacks=lacks, without=without, added=_added, note=note),
)
