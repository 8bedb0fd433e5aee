"""Onym's models, registered with the library from outside: their architectures, their files' formats, hints for diagnoses."""

from __future__ import annotations

import onym.adapters.merging  # noqa: F401  # what opens a model opens adapters with their base
from onym.convert.registry import Family, register_family, register_format
from onym.gpt.config import GPTConfig
from onym.gpt.decoder import Decoder
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.formats import FORMATS
from onym.gpt.formats.huggingface import HUGGINGFACE
from onym.gpt.formats.huggingface_decoder import class_for
from onym.gpt.formats.understand import crop_vocabulary
from onym.gpt.gpt2 import GPT
from onym.gpt.outputs import decoder_logits, gpt_logits
from onym.names.hints import Hints, register_hints
from onym.state.architectures import register_architecture

_HINTS = Hints(
    sign=r"trf_blocks\.|tok_emb\.",
    fields={
        "blocks": "n_layers",
        "vocabulary": "vocab_size",
        "context": "context_length",
        "width": "emb_dim",
        "qkv_bias": "qkv_bias",
    },
    layouts={
        "transformers' GPT-2 and of nanoGPT": r"(^|\.)h\.\d+\.attn\.c_attn\.weight$",
        "onym.Decoder, and of the book's Llama3Model and Qwen3Model": r"trf_blocks\.\d+\.ff\.fc1\.weight$",
        "the book's GPTModel": r"trf_blocks\.\d+\.att\.W_query\.weight$",
        "the book's optimised GPTModel, and of onym.GPT": r"trf_blocks\.\d+\.att\.qkv\.weight$",
        "transformers' Llama, Mistral and Qwen": r"layers\.\d+\.self_attn\.q_proj\.weight$",
        "torchtitan's Llama": r"layers\.\d+\.attention\.wq\.weight$",
        "LitGPT": r"\.h\.\d+\.attn\.qkv\.weight$",
    },
)


def register() -> None:
    """The entry point ``onym.families`` of this package."""
    register_architecture("gpt", GPT, GPTConfig, build=GPT.without_values)
    register_family(Family("gpt", outputs=gpt_logits, peft=lambda config: HUGGINGFACE, crop_vocabulary=crop_vocabulary))
    register_architecture("decoder", Decoder, DecoderConfig, build=Decoder.without_values)
    register_family(Family("decoder", outputs=decoder_logits, peft=class_for, crop_vocabulary=crop_vocabulary))
    for known in FORMATS:
        register_format(known)
    register_hints(_HINTS)
