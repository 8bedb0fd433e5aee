"""transformers' GPT-2: a folder with ``config.json``, or one of its files; with and without ``transformer.`` before the names.

Its ``Conv1D`` stores matrices as ``[in, out]``. The head is not stored where it is the embedding. Old files hold masks, which
are buffers (``attn.bias``, ``attn.masked_bias``). Source: transformers' modeling_gpt2.py and configuration_gpt2.py.
"""

from __future__ import annotations

from typing import Any

from onym.convert.mapping import Recipe, same, transposed, weight_and_bias
from onym.convert.registry import Config, NamedShapes, Stated, Target, Writing
from onym.gpt.config import GPTConfig
from onym.gpt.formats.classifiers import TRANSFORMERS_HEADS, bias_in_norm, omitted_heads, sequence_classification
from onym.gpt.formats.differences import biases
from onym.gpt.formats.transformers_folder import OURS, folder_texts
from onym.gpt.formats.understand import GPT2Format

FIELDS = {
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "emb_dim": "n_embd",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
    "drop_rate": "resid_pdrop",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our field -> theirs in ``config.json``."""
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf", "gelu_python": "erf"}
"""Their ``activation_function`` -> our ``gelu``."""


def _recognise(found: NamedShapes) -> str | None:
    shape = found.shape("transformer.h.0.attn.c_attn.weight")
    if shape is not None and len(shape) == 2 and shape[1] == 3 * shape[0]:
        return "attn.c_attn is [width, 3 x width], as transformers' Conv1D stores it"
    return None


def _stated(found: NamedShapes) -> Stated:
    values = found.contents.json("config.json")
    if values is None or ("n_embd" not in values and "model_type" not in values):
        return Stated({"qkv_bias": True})
    config: dict[str, Any] = {ours: values[theirs] for ours, theirs in FIELDS.items() if theirs in values}
    config.setdefault("tie_embeddings", True)  # transformers leaves out what is as by default
    activation = values.get("activation_function", "gelu_new")
    not_ours = None
    if (kind := values.get("model_type", "gpt2")) != "gpt2":
        return Stated(not_ours=f"config.json says model_type {kind!r}, and the tensors are a GPT-2's")
    if activation in GELU:
        config["gelu"] = GELU[activation]
    else:
        not_ours = f"its activation is {activation!r}, and a GPT-2 has GELU"
    for key, wanted in (("layer_norm_epsilon", 1e-5), ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if values.get(key, wanted) != wanted:
            not_ours = f"{key} is {values[key]!r}, and here it is always {wanted!r}"
    if values.get("add_cross_attention"):
        not_ours = "it attends to an encoder (add_cross_attention)"
    if (inner := values.get("n_inner")) is not None and inner != 4 * values.get("n_embd", 0):
        not_ours = f"its feed-forward layers are {inner} wide, and a GPT-2's are four times the width"
    if isinstance(ours := values.get(OURS), dict):
        config |= {key: ours[key] for key in ("drop_rate",) if key in ours}
    return Stated(config, "config.json", FIELDS, not_ours)


_MODULES = ("norm1", "att.proj", "norm2", "ff.layers.0", "ff.layers.2", "final_norm")


def _needed_biases(config: GPTConfig) -> list[str]:
    return ([] if config.qkv_bias else ["att.qkv"]) + ([] if config.bias else list(_MODULES))


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    config = GPTConfig.from_dict(values)
    return biases(config, HUGGINGFACE.rules, _needed_biases(config), dtype)


_KEPT = ("pad_token_id", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache", "task_specific_params")


def _texts(writing: Writing) -> dict[str, str]:
    """The files beside the weights, by name."""
    config = GPTConfig.from_dict(writing.config)
    values = config.to_dict()
    settings = {
        **sequence_classification(config, "GPT2LMHeadModel"),
        "model_type": "gpt2",
        **{theirs: values[ours] for ours, theirs in FIELDS.items()},
        "n_ctx": config.context_length,  # an old name, which llama.cpp's converter reads
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
    }
    return folder_texts(writing, settings, _KEPT, end=50256 if config.vocab_size >= 50257 else None)


HUGGINGFACE = GPT2Format(
    name="huggingface",
    title="transformers' GPT-2",
    recognise=_recognise,
    rules=(
        same("transformer.wte.weight", "tok_emb.weight"),
        same("transformer.wpe.weight", "pos_emb.weight"),
        *weight_and_bias("transformer.h.{n}.ln_1", "trf_blocks.{n}.norm1"),
        *weight_and_bias("transformer.h.{n}.attn.c_attn", "trf_blocks.{n}.att.qkv", transposed),
        *weight_and_bias("transformer.h.{n}.attn.c_proj", "trf_blocks.{n}.att.proj", transposed),
        *weight_and_bias("transformer.h.{n}.ln_2", "trf_blocks.{n}.norm2"),
        *weight_and_bias("transformer.h.{n}.mlp.c_fc", "trf_blocks.{n}.ff.layers.0", transposed),
        *weight_and_bias("transformer.h.{n}.mlp.c_proj", "trf_blocks.{n}.ff.layers.2", transposed),
        *weight_and_bias("transformer.ln_f", "final_norm"),
        *TRANSFORMERS_HEADS,
    ),
    stated=_stated,
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    prefix="transformer",
    target=Target(
        container="folder",
        added=_added,
        omitted=omitted_heads,
        rewritten=bias_in_norm,
        texts=_texts,
    ),
)
