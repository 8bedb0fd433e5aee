"""nanochat's ``model_*.pt``: recognised, names cleaned, never ours."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"transformer\.h\.\d+\.attn\.c_q\.weight") and not found.has(r"transformer\.wpe\.weight"):
        return "attn.c_q, and no position embeddings"
    return None


NANOCHAT = Format(
    "nanochat",
    "a nanochat model",
    _recognise,
    not_ours="its positions are rotary, its norms have no weights, and its activation is the square of ReLU",
)
