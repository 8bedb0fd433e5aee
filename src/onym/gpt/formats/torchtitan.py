"""torchtitan's Llama, and Meta's own files (``consolidated.00.pth``), whose names it has.

They rotate neighbouring dimensions, i and i + 1, where we, transformers and the book rotate i and i + head_dim / 2. The rows of
query and key are permuted for that, head by head. Source of names: torchtitan's models/llama3/model; of the permutation:
transformers' convert_llama_weights_to_hf.py (``permute``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from onym.convert.mapping import Change, View, counts, same
from onym.convert.registry import Config, NamedShapes, Origin, Stated
from onym.format.tensors import TensorFile
from onym.gpt.formats.decoder import DecoderFormat, as_decoder

_LAYER = {
    "attention_norm.weight": "norm1.weight",
    "attention.wq.weight": "att.W_query.weight",
    "attention.wk.weight": "att.W_key.weight",
    "attention.wv.weight": "att.W_value.weight",
    "attention.wo.weight": "att.out_proj.weight",
    "ffn_norm.weight": "norm2.weight",
    "feed_forward.w1.weight": "ff.fc1.weight",
    "feed_forward.w3.weight": "ff.fc2.weight",
    "feed_forward.w2.weight": "ff.fc3.weight",
}
_RULES = (
    same("tok_embeddings.weight", "tok_emb.weight"),
    *(same(f"layers.{{n}}.{their}", f"trf_blocks.{{n}}.{ours}") for their, ours in _LAYER.items()),
    same("norm.weight", "final_norm.weight"),
    same("output.weight", "out_head.weight"),
)
_FIELDS = {"emb_dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_groups": "n_kv_heads", "norm_eps": "norm_eps"}
"""Our field -> theirs in Meta's ``params.json``."""
_LARGE = 4096  # from this width on Llama 3's models were stretched by 8 (3.1), below by 32 (3.2)


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"layers\.\d+\.attention\.wq\.weight") and "tok_embeddings.weight" in found.shapes:
        return "attention.wq, as torchtitan and Meta name it"
    return None


def _stated(found: NamedShapes) -> Stated:
    values = found.contents.json("params.json") if found.contents is not None else None
    if values is None or "dim" not in values:
        return Stated()
    config: dict[str, Any] = {ours: values[theirs] for ours, theirs in _FIELDS.items() if values.get(theirs) is not None}
    config |= {"rope_base": values.get("rope_theta", 10_000.0), "rope_freq": None}
    if values.get("use_scaled_rope"):
        factor = values.get("rope_scaling_factor", 32.0 if isinstance(values["dim"], int) and values["dim"] < _LARGE else 8.0)
        config["rope_freq"] = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_context_length": 8192,
        }
    return Stated(config, "params.json", _FIELDS)


def _understand(origin: Origin, tensors: TensorFile, stated: Stated, given: Config) -> tuple[TensorFile, Config] | None:
    understood = as_decoder(origin, tensors, stated, given, _RULES)
    if understood is None:
        return None
    view, config = understood
    change = by_halves(config["head_dim"])
    recipes = {
        name: replace(recipe, change=change) if name.endswith(("W_query.weight", "W_key.weight")) else recipe
        for name, recipe in view.recipes.items()
    }
    origin.rules = counts(recipes)
    return View(tensors, recipes), config


def by_halves(head_dim: int) -> Change:
    """The rows of each head, of which neighbours were turned together, so that those half a head apart are."""

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        pairs: Tensor = tensors[0].unflatten(0, (-1, head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return Change("permuted", lambda shapes: shapes[0], apply)


TORCHTITAN = DecoderFormat(
    name="torchtitan",
    title="torchtitan's Llama",
    recognise=_recognise,
    stated=_stated,
    understand=_understand,
    ignored=(r"freqs_cis", r"rope\.freqs", r"rope\.cache"),
)
