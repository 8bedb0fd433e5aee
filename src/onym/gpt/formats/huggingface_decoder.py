"""transformers' Llama, Mistral, Qwen2 and Qwen3: folders with ``config.json``, or files; with and without ``model.`` in names.

The four have the same tensors, but for biases (Qwen2) and norms of queries and keys (Qwen3). Rotation is by halves, as ours.
The head is not stored where it is the embedding. Old files hold ``rotary_emb.inv_freq``, a buffer. Source: transformers'
modeling_llama.py, modeling_qwen2.py, modeling_qwen3.py, modeling_mistral.py, modeling_rope_utils.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from onym.convert.mapping import Rule, same
from onym.convert.registry import Config, Format, NamedShapes, Stated, Target, Writing
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.formats.classifiers import TRANSFORMERS_HEADS, omitted_heads, sequence_classification
from onym.gpt.formats.decoder import HIDDEN, DecoderFormat
from onym.gpt.formats.transformers_folder import folder_texts

FIELDS = {
    "vocab_size": "vocab_size",
    "emb_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our field -> theirs in ``config.json``."""
_CONTEXTS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}  # where config.json leaves it out
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_HAS = {
    "llama": "neither norms of queries and keys nor biases",
    "qwen2": "biases on query, key and value",
    "qwen3": "norms of queries and keys",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}
"""Our key in ``rope_freq`` -> theirs in ``rope_scaling``."""
_OTHERS = {
    "gemma": "its norms add one to their weights, and its activation is GELU",
    "moe": "it is a mixture of experts, and here each layer has one feed-forward",
    "mixtral": "it is a mixture of experts, and here each layer has one feed-forward",
}


def _kind(found: NamedShapes) -> str:
    """The ``model_type``; where nothing states one of the four, by names."""
    values = (found.contents.json("config.json") if found.contents is not None else None) or {}
    if (said := str(values.get("model_type"))) in _CONTEXTS:
        return said
    if found.has(r"model\.layers\.\d+\.self_attn\.q_norm\.weight"):
        return "qwen3"
    return "qwen2" if found.has(r"model\.layers\.\d+\.self_attn\.q_proj\.bias") else "llama"


def _recognise(kind: str, found: NamedShapes) -> str | None:
    if found.has(r"model\.layers\.\d+\.self_attn\.q_proj\.weight") and _kind(found) == kind:
        also = {"qwen2": ", with biases", "qwen3": ", with q_norm"}.get(kind, "")
        return f"self_attn.q_proj, as transformers' classes have it{also}"
    return None


def _stated(kind: str, found: NamedShapes) -> Stated:
    values = (found.contents.json("config.json") if found.contents is not None else None) or {}
    flags = {"qk_norm": kind == "qwen3", "qkv_bias": kind == "qwen2"}
    if "hidden_size" not in values and "model_type" not in values:
        return Stated(flags)
    config, reason = _configuration(kind, values)
    return Stated({**flags, **config}, "config.json", FIELDS, _not_ours(kind, values) or reason)


def _configuration(kind: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What their settings are in our fields; and why there is no such rotation here."""
    rotation, reason = _rotation(values)
    config: dict[str, Any] = {
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "context_length": _CONTEXTS[kind],
        **{ours: values[theirs] for ours, theirs in FIELDS.items() if values.get(theirs) is not None},
        **rotation,
    }
    return config, reason


def _live(kind: str, model: nn.Module) -> Config | None:
    """What an instance of one of the four classes computes with."""
    settings: Any = getattr(model, "config", None)
    if not hasattr(settings, "to_dict") or getattr(settings, "model_type", None) != kind:
        return None
    values = settings.to_dict()
    heads = values.get("num_attention_heads") or 1
    config, _ = _configuration(
        kind,
        {"head_dim": values.get("hidden_size", 0) // heads, "num_key_value_heads": heads}
        | {key: value for key, value in values.items() if value is not None},
    )
    return {name: config[name] for name in HIDDEN if name in config}


def _not_ours(kind: str, values: Mapping[str, Any]) -> str | None:
    """Which part of it a decoder does not have, by its settings."""
    said = values.get("model_type", kind)
    if said != kind:
        none = "it is none of Llama, Mistral, Qwen2 and Qwen3"
        why = next((reason for word, reason in _OTHERS.items() if word in str(said)), none)
        return f"config.json says model_type {said!r}: {why}"
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        return f"its activation (hidden_act) is {activation!r}, and here it is always silu"
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            return f"its layers have biases ({key}), and here query, key and value alone can have one"
    window, context = values.get("sliding_window", 4096), values.get("max_position_embeddings", _CONTEXTS[kind])
    if kind.startswith("qwen"):
        layers = values.get("layer_types")
        from_layer, count = values.get("max_window_layers", 28), values.get("num_hidden_layers", 32)
        slides = "sliding_attention" in layers if isinstance(layers, list) else not _at_least(from_layer, count)
        window = window if values.get("use_sliding_window") and slides else None
    elif kind != "mistral":
        window = None
    if window is not None and not _at_least(window, context):
        return f"its attention has a window of {window} tokens (sliding_window), and here each token sees all before it"
    return None


def _at_least(number: Any, least: Any) -> bool:
    return isinstance(number, int) and isinstance(least, int) and number >= least


def _rotation(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Base and scaling of rotary positions, from the keys of transformers 5 or 4; and why there is no such scaling here."""
    said = values.get("rope_scaling") or values.get("rope_parameters") or {}  # of both, transformers takes the former too
    if not isinstance(said, Mapping) or any(isinstance(each, Mapping) for each in said.values()):
        return {}, f"its rotary positions are {said!r}, and here all layers have one base"
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in values:
            said = {key: values[key], **said}
    if said.get("partial_rotary_factor", 1.0) != 1.0:
        return {}, f"it turns a part of each head alone (partial_rotary_factor is {said['partial_rotary_factor']})"
    config: dict[str, Any] = {"rope_base": said.get("rope_theta", 10_000.0), "rope_freq": None}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "llama3":
        config["rope_freq"] = {ours: said[theirs] for ours, theirs in _SCALING.items() if theirs in said}
    elif kind != "default":
        return {}, f"its rotary positions are scaled by {kind!r} (rope_type), and here default and llama3 are known"
    return config, None


def refusal(kind: str, values: Config) -> str | None:
    """Why a class of transformers cannot hold a decoder; None where it can."""
    config = DecoderConfig.from_dict(values)
    if config.head_bias:
        return (
            "transformers' classifiers have no bias in their head, and RMSNorm has none that it could be added to; --to book "
            "and onym keep it"
        )
    if config.qk_norm and config.qkv_bias:
        return "no class of transformers has both norms of queries and keys and biases on them alone"
    if not config.qk_norm and config.emb_dim % config.n_heads:
        return (
            f"no class of transformers without norms of queries and keys splits a width of {config.emb_dim} over "
            f"{config.n_heads} heads"
        )
    if config.qkv_bias and config.attention_width != config.emb_dim:
        return f"Qwen2's heads are as wide together as the model, and these are {config.attention_width} for {config.emb_dim}"
    fits = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if fits != kind:
        return f"{_CLASSES[kind]} has {_HAS[kind]}, and this is a model for {_CLASSES[fits]}: give --to {fits}"
    return None


_KEPT = ("pad_token_id", "initializer_range", "use_cache", "attention_dropout")


def _texts(kind: str, writing: Writing) -> dict[str, str]:
    """The files beside the weights, by name."""
    config = DecoderConfig.from_dict(writing.config)
    values = config.to_dict()
    scaling = None
    if config.rope_freq is not None:
        numbers = {theirs: config.rope_freq[ours] for ours, theirs in _SCALING.items()}
        numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
        scaling = {"rope_type": "llama3", **numbers}
    settings: dict[str, Any] = {
        **sequence_classification(config, _CLASSES[kind]),
        "model_type": kind,
        **{theirs: values[ours] for ours, theirs in FIELDS.items() if (kind, ours) != ("qwen2", "head_dim")},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_base,  # transformers 4
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_base},  # transformers 5
    }
    settings |= {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen3": {"attention_bias": False}}.get(kind, {})
    if kind != "llama":
        settings |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layers}
    return folder_texts(writing, settings, _KEPT)


def _table(*inner: str) -> tuple[Rule, ...]:
    """Rows of all four; ``inner`` names what an attention has besides, as ``q_norm.weight``."""
    ours = {"q_proj.bias": "W_query.bias", "k_proj.bias": "W_key.bias", "v_proj.bias": "W_value.bias"}
    layer = {
        "input_layernorm.weight": "norm1.weight",
        "self_attn.q_proj.weight": "att.W_query.weight",
        "self_attn.k_proj.weight": "att.W_key.weight",
        "self_attn.v_proj.weight": "att.W_value.weight",
        **{f"self_attn.{name}": f"att.{ours.get(name, name)}" for name in inner},
        "self_attn.o_proj.weight": "att.out_proj.weight",
        "post_attention_layernorm.weight": "norm2.weight",
        "mlp.gate_proj.weight": "ff.fc1.weight",
        "mlp.up_proj.weight": "ff.fc2.weight",
        "mlp.down_proj.weight": "ff.fc3.weight",
    }
    return (
        same("model.embed_tokens.weight", "tok_emb.weight"),
        *(same(f"model.layers.{{n}}.{their}", f"trf_blocks.{{n}}.{ours}") for their, ours in layer.items()),
        same("model.norm.weight", "final_norm.weight"),
        *TRANSFORMERS_HEADS,
    )


def _target(kind: str) -> Target:
    refuses: Callable[[Config], str | None] = functools.partial(refusal, kind)
    return Target(
        container="folder",
        refuses=refuses,
        omitted=omitted_heads,
        texts=functools.partial(_texts, kind),
    )


def _format(kind: str, title: str, *inner: str, written: bool = True) -> Format:
    return DecoderFormat(
        name=kind,
        title=title,
        program="huggingface",
        recognise=functools.partial(_recognise, kind),
        rules=_table(*inner),
        stated=functools.partial(_stated, kind),
        live=functools.partial(_live, kind),
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
        prefix="model",
        target=_target(kind) if written else None,
    )


LLAMA = _format("llama", "transformers' Llama")
QWEN2 = _format("qwen2", "transformers' Qwen2", "q_proj.bias", "k_proj.bias", "v_proj.bias")
QWEN3 = _format("qwen3", "transformers' Qwen3", "q_norm.weight", "k_norm.weight")
MISTRAL = _format("mistral", "transformers' Mistral", written=False)


def class_for(values: Config) -> Format | None:
    """The class of transformers that holds a decoder of this configuration; None where none does."""
    kinds = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
    return next((format for kind, format in kinds.items() if refusal(kind, values) is None), None)
