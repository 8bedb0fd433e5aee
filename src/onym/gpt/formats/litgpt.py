"""LitGPT's ``lit_model.pth`` of Llama's and Qwen's families, with the ``model_config.yaml`` beside it.

Query, key and value are one matrix: one above the other (``attn.qkv``), or in older versions group by group (``attn.attn``).
The settings say how its rows are split, and which of LitGPT's many architectures it is. Source: LitGPT's model.py and
config.py, and ``qkv_reassemble`` of its convert_hf_checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onym.convert.mapping import Change, Rule, Shape, same
from onym.convert.registry import Config, NamedShapes, Origin, Stated
from onym.errors import CheckpointError
from onym.format.tensors import TensorFile
from onym.gpt.formats.decoder import DecoderFormat, as_decoder

SETTINGS = "model_config.yaml"
_FIELDS = {
    "n_layers": "n_layer",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_kv_groups": "n_query_groups",
    "head_dim": "head_size",
    "hidden_dim": "intermediate_size",
    "context_length": "block_size",
    "norm_eps": "norm_eps",
    "rope_base": "rope_base",
    "qk_norm": "norm_qk",
    "qkv_bias": "attn_bias",
}
"""Our field -> theirs."""
# What a setting is in a decoder, what LitGPT takes where nobody says, and what it is called.
_WANTED: dict[str, tuple[Any, Any]] = {
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"),
    "parallel_residual": (False, True),
    "bias": (False, True),
    "lm_head_bias": (False, False),
    "rotary_percentage": (1.0, 0.25),
    "rope_condense_ratio": (1, 1),
    "rope_interleave": (False, False),
    "rope_local_base_freq": (None, None),
    "norm_qk_type": ("default", "default"),
    "post_attention_norm": (False, False),
    "post_mlp_norm": (False, False),
    "norm_1": (True, True),
    "norm_2": (True, True),
    "shared_attention_norm": (False, False),
    "scale_embeddings": (False, False),
    "attention_scores_scalar": (None, None),
    "attention_logit_softcapping": (None, None),
    "final_logit_softcapping": (None, None),
    "latent_attention": (None, None),
    "n_expert": (0, 0),
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": "original_max_seq_len",
}
_SCALAR = re.compile(r"(?P<key>[A-Za-z_]\w*):(?: (?P<value>.*))?")


def _recognise(found: NamedShapes) -> str | None:
    if found.has(r"transformer\.h\.\d+\.attn\.(qkv|attn)\.weight") and found.has(r"transformer\.h\.\d+\.norm_1\.weight"):
        return "attn.qkv and norm_1"
    return None


def _stated(found: NamedShapes) -> Stated:
    if found.has(r"transformer\.h\.\d+\.norm_1\.bias"):
        return Stated(not_ours="its norms are LayerNorm, and a decoder's are RMSNorm")
    text = found.contents.texts.get(SETTINGS) if found.contents is not None else None
    if text is None:
        return Stated()
    values = plain_yaml(text)
    for key, (wanted, usual) in _WANTED.items():
        if (said := values.get(key, usual)) != wanted:
            return Stated(not_ours=f"{key} is {said!r} in {SETTINGS}, and here it is always {wanted!r}")
    indices = values.get("sliding_window_indices")
    if values.get("sliding_window_size") is not None and (not isinstance(indices, list) or any(indices)):
        return Stated(not_ours=f"its attention has a window of {values['sliding_window_size']} tokens (sliding_window_size)")
    if "Gemma" in str(values.get("name")):
        return Stated(not_ours="it is a Gemma, whose norms add one to their weights")
    config = {ours: values[theirs] for ours, theirs in _FIELDS.items() if values.get(theirs) is not None}
    config.setdefault("n_kv_groups", config.get("n_heads"))
    config["rope_freq"] = None
    scaling = values.get("rope_adjustments")
    if isinstance(scaling, Mapping):
        if set(scaling) != set(_SCALING.values()):
            return Stated(not_ours=f"its rotary positions are scaled by {', '.join(scaling)} (rope_adjustments)")
        config["rope_freq"] = {ours: scaling[theirs] for ours, theirs in _SCALING.items()}
    return Stated(config, SETTINGS, _FIELDS)


def _understand(origin: Origin, tensors: TensorFile, stated: Stated, given: Config) -> tuple[TensorFile, Config] | None:
    says = {**stated.config, **given}
    counts = [says.get(name) for name in ("n_heads", "n_kv_groups", "head_dim")]
    heads, groups, size = (each if isinstance(each, int) and each > 0 else 0 for each in counts)
    if not heads or not groups or not size or heads % groups:
        raise CheckpointError(
            f"'{origin.contents.path}' has query, key and value in one matrix, and no {SETTINGS} beside it says how they are "
            "split: copy it from where LitGPT wrote it."
        )
    grouped = any(re.fullmatch(r"transformer\.h\.\d+\.attn\.attn\.weight", name) for name in tensors.names)
    return as_decoder(origin, tensors, stated, given, _table("attn" if grouped else "qkv", heads, groups, size))


def _table(fused: str, heads: int, groups: int, size: int) -> tuple[Rule, ...]:
    parts = {"W_query": (0, heads), "W_key": (heads, groups), "W_value": (heads + groups, groups)}
    layer = {
        "norm_1.weight": "norm1.weight",
        "attn.norm_q.weight": "att.q_norm.weight",
        "attn.norm_k.weight": "att.k_norm.weight",
        "attn.proj.weight": "att.out_proj.weight",
        "norm_2.weight": "norm2.weight",
        "mlp.fc_1.weight": "ff.fc1.weight",
        "mlp.fc_2.weight": "ff.fc2.weight",
        "mlp.proj.weight": "ff.fc3.weight",
    }
    split = []
    for name, (first, count) in parts.items():
        if fused == "attn":
            share = heads // groups
            within = {"W_query": (0, share), "W_key": (share, 1), "W_value": (share + 1, 1)}[name]
            change = heads_of((share + 2) * groups, *within, every=share + 2, size=size)
        else:
            change = heads_of(heads + 2 * groups, first, count, every=heads + 2 * groups, size=size)
        for kind in ("weight", "bias"):
            ours = f"trf_blocks.{{n}}.att.{name}.{kind}"
            split.append(Rule((f"transformer.h.{{n}}.attn.{fused}.{kind}",), ours, change))
    return (
        same("transformer.wte.weight", "tok_emb.weight"),
        *split,
        *(same(f"transformer.h.{{n}}.{their}", f"trf_blocks.{{n}}.{ours}") for their, ours in layer.items()),
        same("transformer.ln_f.weight", "final_norm.weight"),
        same("lm_head.weight", "out_head.weight"),
    )


def heads_of(total: int, first: int, count: int, *, every: int, size: int) -> Change:
    """Of a matrix of heads some: of each run of ``every`` heads, ``count`` from the ``first`` on."""

    def shape(shapes: Sequence[Shape]) -> Shape:
        (rows, *rest) = shapes[0]
        if rows != total * size:
            raise ValueError(f"{rows} rows are not {total} heads of {size}")
        return (total // every * count * size, *rest)

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        heads: Tensor = tensors[0].unflatten(0, (-1, every, size))
        return heads[:, first : first + count].flatten(0, 2)

    return Change("split", shape, apply)


def plain_yaml(text: str) -> dict[str, Any]:
    """What ``yaml.dump`` makes of a dict of plain values, lists of them, and dicts of them; anything else is left out."""
    values: dict[str, Any] = {}
    inner: Any = None
    last = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("- ") and last:
            if not isinstance(values.get(last), list):
                values[last] = []
            values[last].append(_scalar(stripped[2:]))
        elif (found := _SCALAR.fullmatch(stripped)) is not None:
            if line[0] == " ":
                if isinstance(inner, dict):
                    inner[found["key"]] = _scalar(found["value"] or "")
                continue
            last = found["key"]
            inner = None if found["value"] else {}
            values[last] = _scalar(found["value"]) if found["value"] else inner
    return values


def _scalar(text: str) -> Any:
    text = text.strip()
    if text in ("null", "~", ""):
        return None
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


LITGPT = DecoderFormat(name="litgpt", title="a LitGPT model", recognise=_recognise, stated=_stated, understand=_understand)
