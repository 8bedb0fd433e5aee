"""Models with the blocks of Llama (torchtitan's, lingua's, transformers'): recognised, names cleaned, never ours."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"(layers|model\.layers)\.\d+\.(self_attn\.q_proj|attention\.wq|attn\.q_proj)\.weight"):
        return "layers.N with separate query, key and value, as Llama has them"
    return None


LLAMA = Format(
    "llama",
    "a model of the Llama family",
    _recognise,
    not_ours="its positions are rotary, its norms are RMSNorm and its feed-forward is gated",
)
