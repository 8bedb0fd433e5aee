"""GGUF, for llama.cpp, Ollama and what is built on them: a GPT as ``gpt2``, a decoder as ``llama``, ``qwen2`` or ``qwen3``.

Written, not read. A matrix is ``[out, in]``, as here. llama.cpp turns neighbouring dimensions in its ``llama``, so the rows of
queries and keys are permuted there, and halves in the other two, as here. Source: ``gguf/constants.py`` and
``convert_hf_to_gguf.py`` in llama.cpp's repository; tests/convert/test_gguf.py compares with llama.cpp itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.convert.gguf_file import DTYPES, GGUFFile, dtype_of, package, plan
from onym.convert.mapping import Change, Recipe, Shape, made, same, weight_and_bias
from onym.convert.registry import Config, Format, Target, Writing
from onym.data.chat_template import ALPACA
from onym.errors import CheckpointError
from onym.format.manifest import CONFIG, TOKENIZER
from onym.format.tensors import TensorFile
from onym.gpt.config import GPTConfig
from onym.gpt.decoder import rope_frequencies, stretched
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.formats.classifiers import no_place_for_labels
from onym.gpt.formats.differences import biases, without
from onym.gpt.formats.gguf_tokenizer import TEXTS, GGMLTokenizer, ggml_tokenizer

_MODULES = ("norm1", "att.proj", "norm2", "ff.layers.0", "ff.layers.2", "final_norm")
_POSITIONS = "position_embd.weight"
_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_ALPACA = """{{- range $i, $m := .Messages }}
{{- if eq $m.Role "system" }}{{ $m.Content }}

{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

{{ end }}### Instruction:
{{ $m.Content }}{{ else }}

### Response:
{{ $m.Content }}{end}

{{ end }}
{{- end }}

### Response:
"""
_OLLAMA_CONTEXT = 4096  # tokens, by default


def _gpt_lacks(config: Config) -> dict[str, str]:
    if config["gelu"] != "tanh":
        return {"gelu": "llama.cpp's gpt2 computes GELU's tanh form, and this model was trained with the exact one"}
    return {}


def _gpt_added(values: Config, dtype: str) -> dict[str, Recipe]:
    """llama.cpp's gpt2 has a bias everywhere."""
    config = GPTConfig.from_dict(values)
    wanted = ([] if config.qkv_bias else ["att.qkv"]) + ([] if config.bias else [*_MODULES])
    return biases(config, GPT_RULES, wanted, dtype)


def _architecture(config: DecoderConfig) -> str:
    """Which of llama.cpp's models computes what this one does."""
    if config.qk_norm:
        return "qwen3"
    # its qwen2 has heads as wide as the model together, and no scaled rotation; its llama takes biases too
    if config.qkv_bias and config.rope_freq is None and config.attention_width == config.emb_dim:
        return "qwen2"
    return "llama"


_LABELS = no_place_for_labels("a GGUF file's model")


def _decoder_refuses(config: Config) -> str | None:
    if (reason := _LABELS(config)) is not None:
        return reason
    if config["qk_norm"] and config["rope_freq"] is not None:
        return "llama.cpp's qwen3 does not scale its rotation (rope_freq), and its llama does not normalise queries and keys"
    if config["context_length"] >= 2**32:
        return f"GGUF's context length has 32 bits, and this model's is {config['context_length']}"
    return None


def _decoder_added(values: Config, dtype: str) -> dict[str, Recipe]:
    """The tensors that llama.cpp's llama has in another form."""
    config = DecoderConfig.from_dict(values)
    recipes: dict[str, Recipe] = {}
    if _architecture(config) != "llama":
        return recipes
    for layer in range(config.n_layers):
        for theirs, ours, heads in (("attn_q", "W_query", config.n_heads), ("attn_k", "W_key", config.n_kv_groups)):
            for part in ("weight", "bias") if config.qkv_bias else ("weight",):
                change = _neighbouring(heads)
                recipes[f"blk.{layer}.{theirs}.{part}"] = Recipe((f"trf_blocks.{layer}.att.{ours}.{part}",), change)
    if config.rope_freq is not None:
        recipes["rope_freqs.weight"] = Recipe((), _factors(config), "float32")
    return recipes


def _neighbouring(heads: int) -> Change:
    """Dimensions i and i + head_dim / 2 of each head, side by side."""

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    return Change("permuted", lambda shapes: shapes[0], apply)


def _factors(config: DecoderConfig) -> Change:
    """What each frequency of the rotation is divided by: 1, the factor, or between."""
    assert config.rope_freq is not None
    scaling = config.rope_freq

    def make() -> Tensor:
        frequencies = rope_frequencies(config, torch.device("cpu"))
        return frequencies / stretched(frequencies, scaling)

    shape: Shape = (config.head_dim // 2,)
    return made("given factors", shape, make)


def _write(writing: Writing, theirs: TensorFile) -> GGUFFile:
    """The file, with everything found that may be wrong with it."""
    gguf = package()
    if writing.tokenizer is None:
        raise CheckpointError(
            f"'{writing.checkpoint.path}' has no tokenizer beside it, and a GGUF file holds one: give it with --tokenizer."
        )
    kind = GPTConfig if writing.checkpoint.architecture == "gpt" else DecoderConfig
    config = kind.from_dict(writing.config)
    tokenizer = ggml_tokenizer(writing.tokenizer, config.vocab_size, writing.beside)
    dtype = writing.dtype or dtype_of(theirs)
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    planned = plan(theirs, dtype, exact=(_POSITIONS,), head=head)
    writing.notes.extend([*planned.notes, *tokenizer.notes])
    writing.used.update({CONFIG, TOKENIZER, "generation_config.json", *TEXTS})
    architecture = "gpt2" if isinstance(config, GPTConfig) else _architecture(config)

    def metadata(writer: Any) -> None:
        writer.add_name(writing.path.stem)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
        if dtype.startswith("q"):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _shape(writer, config)
        tokenizer.write(writer)

    return GGUFFile(theirs, planned.kinds, architecture, metadata)


def _shape(writer: Any, config: GPTConfig | DecoderConfig) -> None:
    """Set the keys ``{architecture}.…``."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    if isinstance(config, GPTConfig):
        writer.add_feed_forward_length(4 * config.emb_dim)
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count_kv(config.n_kv_groups)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)


def _modelfile(writing: Writing) -> dict[str, str]:
    """Beside ``model.gguf`` a ``model.Modelfile``, with which ``ollama create`` makes a model of it."""
    assert writing.tokenizer is not None
    tokenizer = ggml_tokenizer(writing.tokenizer, writing.config["vocab_size"], writing.beside)
    lines = [f"FROM ./{writing.path.name}", *_template(tokenizer)]
    if writing.config["context_length"] < _OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {writing.config['context_length']}")
    return {modelfile_of(writing.path).name: "\n".join(lines) + "\n"}


def _template(tokenizer: GGMLTokenizer) -> list[str]:
    """How Ollama makes a text of what somebody says."""
    if tokenizer.chat_template is None:
        return ['TEMPLATE """{{ .Prompt }}"""']
    if "<|im_start|>" in tokenizer.chat_template:
        return [f'TEMPLATE """{_CHATML}"""', 'PARAMETER stop "<|im_end|>"']
    stop = tokenizer.tokens[tokenizer.eos].replace('"', '\\"')
    if tokenizer.chat_template == ALPACA:
        return [f'TEMPLATE """{_ALPACA.replace("{end}", stop)}"""', f'PARAMETER stop "{stop}"']
    return ["# TEMPLATE: Ollama takes the chat template in the file, where it knows it.", f'PARAMETER stop "{stop}"']


def modelfile_of(path: Path) -> Path:
    """The place of a GGUF file's Modelfile."""
    return path.with_suffix(".Modelfile")


GPT_RULES = (
    same("token_embd.weight", "tok_emb.weight"),
    same(_POSITIONS, "pos_emb.weight"),
    *weight_and_bias("blk.{n}.attn_norm", "trf_blocks.{n}.norm1"),
    *weight_and_bias("blk.{n}.attn_qkv", "trf_blocks.{n}.att.qkv"),
    *weight_and_bias("blk.{n}.attn_output", "trf_blocks.{n}.att.proj"),
    *weight_and_bias("blk.{n}.ffn_norm", "trf_blocks.{n}.norm2"),
    *weight_and_bias("blk.{n}.ffn_up", "trf_blocks.{n}.ff.layers.0"),
    *weight_and_bias("blk.{n}.ffn_down", "trf_blocks.{n}.ff.layers.2"),
    *weight_and_bias("output_norm", "final_norm"),
    same("output.weight", "out_head.weight"),
)
DECODER_RULES = (
    same("token_embd.weight", "tok_emb.weight"),
    same("blk.{n}.attn_norm.weight", "trf_blocks.{n}.norm1.weight"),
    *weight_and_bias("blk.{n}.attn_q", "trf_blocks.{n}.att.W_query"),
    *weight_and_bias("blk.{n}.attn_k", "trf_blocks.{n}.att.W_key"),
    *weight_and_bias("blk.{n}.attn_v", "trf_blocks.{n}.att.W_value"),
    same("blk.{n}.attn_q_norm.weight", "trf_blocks.{n}.att.q_norm.weight"),
    same("blk.{n}.attn_k_norm.weight", "trf_blocks.{n}.att.k_norm.weight"),
    same("blk.{n}.attn_output.weight", "trf_blocks.{n}.att.out_proj.weight"),
    same("blk.{n}.ffn_norm.weight", "trf_blocks.{n}.norm2.weight"),
    same("blk.{n}.ffn_gate.weight", "trf_blocks.{n}.ff.fc1.weight"),
    same("blk.{n}.ffn_up.weight", "trf_blocks.{n}.ff.fc2.weight"),
    same("blk.{n}.ffn_down.weight", "trf_blocks.{n}.ff.fc3.weight"),
    same("output_norm.weight", "final_norm.weight"),
    same("output.weight", "out_head.weight"),
)


def _omitted(config: Config) -> tuple[str, ...]:
    return ("output.weight",) if config["tie_embeddings"] else ()


_GGUF = functools.partial(Format, recognise=lambda named: None, program="gguf")
_FILE = functools.partial(
    Target, container="file", ending=".gguf", dtypes=DTYPES, omitted=_omitted, file=_write, texts=_modelfile
)
GGUF_GPT2 = _GGUF(
    name="gguf-gpt2",
    title="llama.cpp's gpt2",
    architecture="gpt",
    rules=GPT_RULES,
    target=_FILE(refuses=_LABELS, lacks=_gpt_lacks, without=without, added=_gpt_added),
)
GGUF_DECODER = _GGUF(
    name="gguf-decoder",
    title="llama.cpp's llama, qwen2 or qwen3",
    architecture="decoder",
    rules=DECODER_RULES,
    target=_FILE(refuses=_decoder_refuses, added=_decoder_added),
)
