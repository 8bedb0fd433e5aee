"""``Llama3Model`` and ``Qwen3Model`` of "Build a Large Language Model From Scratch", which have the names of our decoder.

``Llama3Model`` has torch's RMSNorm (``norm1.weight``), ``Qwen3Model`` a norm of its own (``norm1.scale``). What their files do
not say, heads and rotation, is in the configuration that the class was built with. The notebooks on Llama 2 store tables of
cosines and sines, and a mask, with each layer. Source: llama3.py and qwen3.py of the package ``llms_from_scratch``.
"""

from __future__ import annotations

from typing import Any

from onym.convert.mapping import Recipe, Rule, same, weight_and_bias
from onym.convert.registry import Config, NamedShapes, Stated, Target
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.formats.classifiers import book_head_bias, book_labels_note
from onym.gpt.formats.decoder import GIVEN, DecoderFormat

_LLAMA_EPS, _QWEN_EPS = 1e-5, 1e-6  # written into the classes
_SETTINGS = (*GIVEN, "labels")
_QWEN_SETTINGS = tuple(name for name in _SETTINGS if name not in ("norm_eps", "rope_freq"))
_MATRICES = ("W_query", "W_key", "W_value")


def _recognised_by(norm: str, found: NamedShapes) -> str | None:
    if found.has(r"trf_blocks\.\d+\.ff\.fc1\.weight") and found.has(rf"trf_blocks\.\d+\.norm1\.{norm}"):
        also = ", which are the names of onym.Decoder" if norm == "weight" else ""
        return f"att.W_query, ff.fc1 and norm1.{norm}{also}"
    return None


def _llama_stated(found: NamedShapes) -> Stated:
    """The rotation of the notebooks on Llama 2, whose tables [context, head_dim] are in the file."""
    table = found.shape("trf_blocks.0.att.cos")
    if table is None or len(table) != 2:
        return Stated()
    return Stated({"context_length": table[0], "head_dim": table[1], "rope_base": 10_000.0, "rope_freq": None}, "att.cos")


def _qwen_stated(found: NamedShapes) -> Stated:
    return Stated({"norm_eps": _QWEN_EPS, "rope_freq": None}, "the book's Qwen3Model")


def _table(norm: str) -> tuple[Rule, ...]:
    layer = {
        f"norm1.{norm}": "norm1.weight",
        **{f"att.{name}.weight": f"att.{name}.weight" for name in _MATRICES},
        **({f"att.{name}.bias": f"att.{name}.bias" for name in _MATRICES} if norm == "weight" else {}),
        f"att.q_norm.{norm}": "att.q_norm.weight",
        f"att.k_norm.{norm}": "att.k_norm.weight",
        "att.out_proj.weight": "att.out_proj.weight",
        f"norm2.{norm}": "norm2.weight",
        **{f"ff.{name}.weight": f"ff.{name}.weight" for name in ("fc1", "fc2", "fc3")},
    }
    return (
        same("tok_emb.weight", "tok_emb.weight"),
        *(same(f"trf_blocks.{{n}}.{their}", f"trf_blocks.{{n}}.{ours}") for their, ours in layer.items()),
        same(f"final_norm.{norm}", "final_norm.weight"),
        *weight_and_bias("out_head", "out_head"),
    )


def _no_class(config: DecoderConfig) -> str | None:
    """Why neither class can hold it."""
    if config.qkv_bias:
        return "the book's decoders have no biases, and its query, key and value have"
    if config.norm_eps not in (_LLAMA_EPS, _QWEN_EPS):
        return f"the book's norms add {_LLAMA_EPS} or {_QWEN_EPS} (norm_eps), and this model's {config.norm_eps}"
    llama = config.norm_eps == _LLAMA_EPS
    if llama and config.qk_norm:
        return f"the book's Qwen3Model adds {_QWEN_EPS} in its norms (norm_eps), and this model {config.norm_eps}"
    if llama and config.attention_width != config.emb_dim:
        return (
            f"the heads of the book's Llama3Model are as wide together as the model, and these are {config.attention_width} "
            f"for {config.emb_dim}"
        )
    if not llama and config.rope_freq is not None:
        return f"the book's Qwen3Model has no rope_freq, and its Llama3Model adds {_LLAMA_EPS} in its norms (norm_eps)"
    return None


def _llama_refuses(values: Config) -> str | None:
    config = DecoderConfig.from_dict(values)
    if (reason := _no_class(config)) is not None or config.norm_eps == _LLAMA_EPS:
        return reason
    return f"the book's Llama3Model adds {_LLAMA_EPS} in its norms, and this model {config.norm_eps}: give --to book-qwen3"


def _qwen_refuses(values: Config) -> str | None:
    config = DecoderConfig.from_dict(values)
    if (reason := _no_class(config)) is not None or config.norm_eps == _QWEN_EPS:
        return reason
    return f"the book's Qwen3Model adds {_QWEN_EPS} in its norms, and this model {config.norm_eps}: give --to book-llama3"


def _note(values: Config) -> str:
    """The dict that the class has to be built with."""
    config = DecoderConfig.from_dict(values)
    keys = ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "hidden_dim", "n_kv_groups", "rope_base"]
    qwen = config.norm_eps == _QWEN_EPS
    stored: dict[str, Any] = config.to_dict()
    said = {key: stored[key] for key in (*keys, *(("head_dim", "qk_norm") if qwen else ("rope_freq",)))}
    name = "Qwen3Model" if qwen else "Llama3Model"
    built = f"The book's files hold no configuration. Build it as {name}({said} | {{'dtype': torch.float32}})."
    labels = book_labels_note(values)
    return f"{built} {labels}" if labels else built


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    return book_head_bias(DecoderConfig.from_dict(values), dtype)


BOOK_LLAMA3 = DecoderFormat(
    name="book-llama3",
    title="the book's Llama3Model",
    program="book",
    recognise=lambda found: _recognised_by("weight", found),
    rules=_table("weight"),
    stated=_llama_stated,
    ignored=(r"trf_blocks\.\d+\.att\.(mask|cos|sin)", "mask|cos|sin"),
    target=Target(settings=_SETTINGS, refuses=_llama_refuses, added=_added, note=_note),
)
BOOK_QWEN3 = DecoderFormat(
    name="book-qwen3",
    title="the book's Qwen3Model",
    program="book",
    recognise=lambda found: _recognised_by("scale", found),
    rules=_table("scale"),
    stated=_qwen_stated,
    ignored=("mask|cos|sin",),
    target=Target(settings=_QWEN_SETTINGS, refuses=_qwen_refuses, added=_added, note=_note),
)
