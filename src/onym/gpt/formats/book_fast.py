"""The GPTModel of the book's optimised scripts, and of its package (``GPTModelFast``): the names that Onym's own GPT has."""

from __future__ import annotations

from onym.convert.mapping import Recipe, same
from onym.convert.registry import Config, Format, NamedShapes, Target
from onym.gpt.config import GPTConfig
from onym.gpt.formats.biases import biases, extra
from onym.gpt.formats.book import heads_note, lacks, needed_biases
from onym.gpt.formats.dropping import without
from onym.gpt.formats.understand import HIDDEN, as_gpt

_LAYER = ("norm1", "att.qkv", "att.proj", "norm2", "ff.layers.0", "ff.layers.2")


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"trf_blocks\.\d+\.att\.qkv\.weight") and "tok_emb.weight" in found.shapes:
        return "att.qkv and att.proj, the names of Onym's own GPT"
    return None


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    config = GPTConfig.from_dict(values)
    return biases(config, BOOK_FAST.rules, needed_biases(config), dtype)


BOOK_FAST = Format(
    name="book-fast",
    title="the book's optimised GPTModel",
    recognise=_recognise,
    rules=tuple(
        same(name, name)
        for name in (
            "tok_emb.weight",
            "pos_emb.weight",
            *(f"trf_blocks.{{n}}.{name}" for module in _LAYER for name in _both(module)),
            *_both("final_norm"),
            "out_head.weight",
        )
    ),
    architecture="gpt",
    understand=as_gpt,
    hidden=HIDDEN,
    extra=extra,
    target=Target(settings=("n_heads",), lacks=lacks, without=without, added=_added, note=heads_note),
)
