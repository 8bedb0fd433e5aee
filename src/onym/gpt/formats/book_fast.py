"""The GPTModel of the book's optimised scripts, and of its package (``GPTModelFast``): the names that Onym's own GPT has."""

from __future__ import annotations

from onym.convert.mapping import Recipe, same, weight_and_bias
from onym.convert.registry import Config, NamedShapes, Target
from onym.gpt.config import GPTConfig
from onym.gpt.formats.book import SETTINGS, lacks, needed_biases, note
from onym.gpt.formats.classifiers import book_head_bias
from onym.gpt.formats.differences import biases, without
from onym.gpt.formats.understand import GPT2Format

_LAYER = [f"trf_blocks.{{n}}.{name}" for name in ("norm1", "att.qkv", "att.proj", "norm2", "ff.layers.0", "ff.layers.2")]


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"trf_blocks\.\d+\.att\.qkv\.weight") and "tok_emb.weight" in found.shapes:
        return "att.qkv and att.proj, the names of Onym's own GPT"
    return None


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    config = GPTConfig.from_dict(values)
    return {**biases(config, BOOK_FAST.rules, needed_biases(config), dtype), **book_head_bias(config, dtype)}


BOOK_FAST = GPT2Format(
    name="book-fast",
    title="the book's optimised GPTModel",
    recognise=_recognise,
    rules=(
        same("tok_emb.weight", "tok_emb.weight"),
        same("pos_emb.weight", "pos_emb.weight"),
        *(rule for module in [*_LAYER, "final_norm", "out_head"] for rule in weight_and_bias(module, module)),
    ),
    target=Target(settings=SETTINGS, lacks=lacks, without=without, added=_added, note=note),
)
