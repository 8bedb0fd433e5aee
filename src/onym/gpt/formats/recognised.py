"""Models of other architectures: recognised and named, their names cleaned; no GPT is built from them."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _litgpt(named: NamedShapes) -> str | None:
    found = named.has(r"transformer\.h\.\d+\.attn\.(qkv|attn)\.weight") and named.has(r"transformer\.h\.\d+\.norm_1\.weight")
    return "attn.qkv and norm_1" if found else None


def _nanochat(named: NamedShapes) -> str | None:
    found = named.has(r"transformer\.h\.\d+\.attn\.c_q\.weight") and not named.has(r"transformer\.wpe\.weight")
    return "attn.c_q, and no position embeddings" if found else None


def _llama(named: NamedShapes) -> str | None:
    """torchtitan's, lingua's and transformers' names."""
    found = named.has(r"(layers|model\.layers)\.\d+\.(self_attn\.q_proj|attention\.wq|attn\.q_proj)\.weight")
    return "layers.N with separate query, key and value, as Llama has them" if found else None


_ROTARY = "its positions are rotary, and a GPT-2's are learned (pos_emb)"
_SQUARED = "its positions are rotary, its norms have no weights, and its activation is the square of ReLU"
_GATED = "its positions are rotary, its norms are RMSNorm and its feed-forward is gated"
LITGPT = Format("litgpt", "a LitGPT model", _litgpt, not_ours=_ROTARY)
NANOCHAT = Format("nanochat", "a nanochat model", _nanochat, not_ours=_SQUARED)
LLAMA = Format("llama", "a model of the Llama family", _llama, not_ours=_GATED)
