"""Models of other architectures: recognised and named, their names cleaned; nothing is built from them."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _nanochat(named: NamedShapes) -> str | None:
    found = named.has(r"transformer\.h\.\d+\.attn\.c_q\.weight") and not named.has(r"transformer\.wpe\.weight")
    return "attn.c_q, and no position embeddings" if found else None


def _other(named: NamedShapes) -> str | None:
    """Phi-3's joined matrices, OLMo-core's names, and those of decoders that nobody has described here."""
    found = named.has(
        r"(layers|blocks|model\.layers)\.\d+\.(self_attn|attention|attn)\.(q_proj|qkv_proj|wq|w_q|qkv_linear\.wq|query_key_value)\.weight"
    )
    return "layers.N with an attention, and other names than Llama's" if found else None


_SQUARED = "its positions are rotary, its norms have no weights, and its activation is the square of ReLU"
_NAMES = "its layers have other parts than those of GPT-2, Llama, Mistral and Qwen"
NANOCHAT = Format("nanochat", "a nanochat model", _nanochat, not_ours=_SQUARED)
OTHER = Format("other-decoder", "a decoder of another family", _other, not_ours=_NAMES)
