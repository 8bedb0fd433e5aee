"""Models of other architectures: recognised and named, their names cleaned; no GPT is built from them."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _litgpt(named: NamedShapes) -> str | None:
    if named.has(r"transformer\.h\.\d+\.attn\.(qkv|attn)\.weight") and named.has(r"transformer\.h\.\d+\.norm_1\.weight"):
        return "attn.qkv and norm_1"
    return None


def _nanochat(named: NamedShapes) -> str | None:
    if named.has(r"transformer\.h\.\d+\.attn\.c_q\.weight") and not named.has(r"transformer\.wpe\.weight"):
        return "attn.c_q, and no position embeddings"
    return None


def _llama(named: NamedShapes) -> str | None:
    """torchtitan's, lingua's and transformers' names."""
    if named.has(r"(layers|model\.layers)\.\d+\.(self_attn\.q_proj|attention\.wq|attn\.q_proj)\.weight"):
        return "layers.N with separate query, key and value, as Llama has them"
    return None


LITGPT = Format(
    "litgpt",
    "a LitGPT model",
    _litgpt,
    not_ours="its positions are rotary, and a GPT-2's are learned (pos_emb)",
)
NANOCHAT = Format(
    "nanochat",
    "a nanochat model",
    _nanochat,
    not_ours="its positions are rotary, its norms have no weights, and its activation is the square of ReLU",
)
LLAMA = Format(
    "llama",
    "a model of the Llama family",
    _llama,
    not_ours="its positions are rotary, its norms are RMSNorm and its feed-forward is gated",
)
