"""LitGPT's ``lit_model.pth``: recognised, names cleaned, never ours: its two dozen families have rotary positions."""

from __future__ import annotations

from onym.convert.registry import Format, NamedShapes


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"transformer\.h\.\d+\.attn\.(qkv|attn)\.weight") and found.has(r"transformer\.h\.\d+\.norm_1\.weight"):
        return "attn.qkv and norm_1"
    return None


LITGPT = Format(
    "litgpt",
    "a LitGPT model",
    _recognise,
    not_ours="its positions are rotary, and a GPT-2's are learned (pos_emb)",
)
