"""A GGUF file is what llama.cpp takes it for: the same tokens, logits and text, by llama.cpp itself (the wheel xllamacpp)."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch import nn

import onym
from onym.convert.gguf_file import DTYPES
from onym.convert.write import convert
from onym.data.corpus import Corpus, Document
from onym.data.tokenizer import END_OF_TEXT, Tokenizer
from onym.errors import CheckpointError, ConfigError, OnymError, StorageError, TokenizerError
from onym.gpt.formats.gguf_tokenizer import ggml_tokenizer
from tests.conftest import Run
from tests.convert.llama_cpp import LlamaCpp

GUIDE = Path(__file__).parent.parent.parent / "docs" / "gguf.md"
VOCABULARY = 512
SHAPE = {"vocab_size": VOCABULARY + 2, "context_length": 128, "emb_dim": 64, "n_heads": 2, "n_layers": 2}
GROUPS = {**SHAPE, "n_kv_groups": 1}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 32}
MODELS: dict[str, Any] = {
    "gpt2": lambda: onym.GPT(onym.GPTConfig(**SHAPE)),
    "gpt2-tied-with-biases": lambda: onym.GPT(onym.GPTConfig(**SHAPE, qkv_bias=True, tie_embeddings=True)),
    "gpt2-without-biases": lambda: onym.GPT(onym.GPTConfig(**SHAPE, bias=False)),
    "llama": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS)),
    "llama-scaled": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS, head_dim=48, rope_freq=SCALING, tie_embeddings=True)),
    "llama-with-biases": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS, head_dim=64, qkv_bias=True)),
    "qwen2": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS, qkv_bias=True, rope_base=1e6)),
    "qwen3": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS, head_dim=64, qk_norm=True, tie_embeddings=True)),
    "qwen3-with-biases": lambda: onym.Decoder(onym.DecoderConfig(**GROUPS, qk_norm=True, qkv_bias=True)),
}
TRAINED = ("gpt2", "llama", "qwen3")
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Code and docstrings that every Python carries."""
    documents = Corpus((str(Path(json.__file__).parent),), suffixes=("py",)).documents()
    return [document.text for document in documents if isinstance(document, Document)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, VOCABULARY)


@pytest.fixture(scope="module")
def trained(
    texts: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[onym.GPT | onym.Decoder, Path]]:
    """Models that have learned something, so that their logits are not flat, saved without a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    stream = torch.tensor(tokenizer.encode(texts[0])[:1024])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster, for matrices so small
    result = {}
    for name in TRAINED:
        torch.manual_seed(0)
        model = MODELS[name]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10)
            at = torch.randint(0, len(stream) - 65, (8,), generator=torch.Generator().manual_seed(step))
            batch = torch.stack([stream[place : place + 65] for place in at])
            model(batch[:, :-1], batch[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        onym.save(model.eval(), folder / name)
        result[name] = (model, folder / name)
    torch.set_num_threads(threads)
    return result


@pytest.fixture
def small(tmp_path: Path) -> onym.Decoder:
    """A model with random weights, saved as ``ours`` in ``tmp_path``."""
    model = scattered(MODELS["llama"]())
    onym.save(model, tmp_path / "ours")
    assert isinstance(model, onym.Decoder)
    return model


def scattered(model: nn.Module) -> nn.Module:
    """With values everywhere, so that a bias or a permutation that is lost shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def our_log_probabilities(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens]))[0], dim=-1)  # [time, vocabulary]


def furthest(model: nn.Module, engine: LlamaCpp, tokens: list[int], tokenizer: Tokenizer) -> float:
    theirs = engine.log_probabilities(tokens, SHAPE["vocab_size"], tokenizer.encode("e")[0])
    return float((our_log_probabilities(model, tokens)[-1] - torch.tensor(theirs)).abs().max())


def drawn(count: int, seed: int) -> list[str]:
    """Texts of all kinds: words, code, runs of whitespace, any character that Unicode names, what looks like special tokens."""
    chance = random.Random(seed)
    assigned = [chr(code) for code in range(0x30000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    code = Path(json.__file__).read_text().splitlines(keepends=True)
    pieces = (
        lambda: chance.choice(code),
        lambda: "".join(chance.choices(" \t\n\r\u00a0\u3000\u2028\x0b\x0c", k=chance.randint(1, 9))),
        lambda: "".join(chance.choices(assigned, k=chance.randint(1, 12))),
        lambda: chance.choice(["<|endoftext|>", "<|im_start|>user\n", "<|endoftext", "|>", "<s>", "[PAD513]", "<|im_end|>"]),
        lambda: chance.choice(["I'll", "don't", "WE'VE", "it'S", "’s", "1234567", "3.14", "x²", "½", "e\u0301", "한국어", "ﬁ"]),
        lambda: "".join(chance.choices("abcdefghij XYZ-_=+(){}[]'\"\\/", k=chance.randint(1, 20))),
        lambda: chance.choice(["👩‍👩‍👧‍👦", "🇩🇪", "日本語のテキスト", "مرحبا", "नमस्ते", "\x00", "\u200d", "\ufeff", "𝔘𝔫𝔦"]),
    )
    return ["".join(chance.choice(pieces)() for _ in range(chance.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("name", TRAINED)
def test_llama_cpp_computes_and_writes_the_same(
    tmp_path: Path, trained: dict[str, Any], tokenizer: Tokenizer, texts: list[str], name: str
) -> None:
    model, path = trained[name]
    report = convert(path, tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    assert (report.to, report.why_to, report.unused) == ("gguf", "it ends in .gguf", [])
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    engine = LlamaCpp(tmp_path / "m.gguf")
    for text in [*texts[:3], "\n".join(drawn(9, seed=3))]:
        tokens = tokenizer.encode(text)[:100]
        assert furthest(model, engine, tokens, tokenizer) < (0.01 if name == "gpt2" else 1e-4)  # its GELU is a table in F16
    tokens = tokenizer.encode(texts[0])[:16]
    written = engine.greedy(tokens, 64)
    # each is the likeliest after those before it
    assert our_log_probabilities(model, tokens + written)[15:-1].argmax(dim=-1).tolist() == written
    assert len(written) == 64
    assert len(set(written)) > 20


def test_llama_cpp_makes_the_same_tokens_of_a_text(tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer) -> None:
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    engine = LlamaCpp(tmp_path / "m.gguf")
    for text in drawn(200, seed=1):
        assert engine.tokens(text) == tokenizer.encode(text), repr(text)
    assert engine.tokens(f"a{END_OF_TEXT}b", special=True) == [
        *tokenizer.encode("a"),
        tokenizer.end_of_text,
        *tokenizer.encode("b"),
    ]


@pytest.mark.parametrize(("pre", "pattern", "whole_words"), [
    ("llama-bpe", LLAMA3, True), ("dbrx", LLAMA3, False), ("qwen2", LLAMA3.replace("{1,3}", ""), False),
])  # fmt: skip
def test_so_do_the_tokenizers_that_split_as_others_do(
    tmp_path: Path, small: onym.Decoder, texts: list[str], pre: str, pattern: str, whole_words: bool
) -> None:
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(inner)
    assert ggml_tokenizer(tokenizer.to_json(), SHAPE["vocab_size"], {}).pre == pre
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    engine = LlamaCpp(tmp_path / "m.gguf")
    for text in drawn(200, seed=2):
        assert engine.tokens(text) == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TRAINED])
def test_every_kind_of_model_computes_the_same(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], name: str) -> None:
    model = scattered(MODELS[name]())
    onym.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    tokens = tokenizer.encode(texts[0])[:100]
    assert furthest(model, LlamaCpp(tmp_path / "m.gguf"), tokens, tokenizer) < (0.01 if "gpt2" in name else 1e-4)
    header = gguf.GGUFReader(tmp_path / "m.gguf")
    assert header.get_field("general.architecture").contents() == name.split("-")[0]
    assert any(tensor.name == "output.weight" for tensor in header.tensors) == (not model.config.tie_embeddings)


def test_the_factors_of_a_scaled_rotation_are_what_it_needs(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    model = scattered(MODELS["llama-scaled"]())
    onym.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    (factors,) = [tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)
    assert 1 < factors[2] < 8
    unscaled = MODELS["llama-scaled"]()
    object.__setattr__(unscaled.config, "rope_freq", None)
    unscaled.load_state_dict(model.state_dict())
    tokens = tokenizer.encode(texts[0])[:100]
    assert furthest(unscaled.eval(), LlamaCpp(tmp_path / "m.gguf"), tokens, tokenizer) > 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_q8_0_has_the_same_perplexity(
    tmp_path: Path, trained: dict[str, Any], tokenizer: Tokenizer, texts: list[str], name: str
) -> None:
    model, path = trained[name]
    report = convert(path, tmp_path / "m.gguf", tokenizer=tokenizer.to_json(), dtype="q8_0")
    assert "within a step of Q8_0; the furthest, " in str(report.rounded)
    engine = LlamaCpp(tmp_path / "m.gguf")
    tokens = tokenizer.encode(texts[0])[:97]
    every = our_log_probabilities(model, tokens[:-1])
    ours = -float(every.gather(1, torch.tensor(tokens[1:])[:, None]).mean())
    plain = tokenizer.encode("e")[0]
    theirs = -sum(
        engine.log_probabilities(tokens[:end], SHAPE["vocab_size"], plain)[tokens[end]] for end in range(1, len(tokens))
    ) / (len(tokens) - 1)
    assert math.exp(ours) < 10
    assert abs(math.exp(theirs) - math.exp(ours)) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_with(
    tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer, texts: list[str], dtype: str
) -> None:
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json(), dtype=dtype)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == dtype.upper()
    assert stored["output.weight"].tensor_type.name == ("Q8_0" if dtype.startswith("q") else dtype.upper())
    again = MODELS["llama"]()  # with the values that the file has
    values = {
        name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy()) for name, each in stored.items()
    }
    names = {"W_query": "attn_q", "W_key": "attn_k", "W_value": "attn_v", "out_proj": "attn_output", "norm1": "attn_norm"}
    names |= {"norm2": "ffn_norm", "fc1": "ffn_gate", "fc2": "ffn_up", "fc3": "ffn_down"}
    outer = {"tok_emb": "token_embd", "final_norm": "output_norm", "out_head": "output"}
    for name, parameter in again.named_parameters():
        parts = name.split(".")
        their = f"blk.{parts[1]}.{names[parts[-2]]}.weight" if parts[0] == "trf_blocks" else f"{outer[parts[0]]}.weight"
        value = values[their].reshape(parameter.shape)
        if parts[-2] in ("W_query", "W_key"):  # back from neighbouring dimensions
            heads = len(value) // 32
            value = value.reshape(heads, 16, 2, 64).transpose(1, 2).reshape(parameter.shape)
        parameter.data.copy_(value)
    tokens = tokenizer.encode(texts[0])[:32]
    # llama.cpp rounds what it multiplies with: to BF16, or to 8 bits
    near = {"f32": 1e-4, "f16": 0.02, "bf16": 0.15}.get(dtype, 0.3)
    assert furthest(again, LlamaCpp(tmp_path / "m.gguf"), tokens, tokenizer) < near


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_sources_dtype_is_the_files(tmp_path: Path, tokenizer: Tokenizer, dtype: str) -> None:
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    onym.save(scattered(MODELS["qwen3"]()).to(kind), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    ours = onym.open_checkpoint(tmp_path / "ours").tensor("trf_blocks.0.ff.fc2.weight")
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == dtype.upper()
    assert stored["blk.0.ffn_up.weight"].data.tobytes() == ours.view(torch.int16).numpy().tobytes()


def test_a_folder_of_transformers_with_a_chat_template(tmp_path: Path, texts: list[str]) -> None:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train(texts, VOCABULARY).to_json())
    inner.add_tokens(["<tool>"])
    model = scattered(MODELS["gpt2"]())
    onym.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface", tokenizer=inner.to_str())
    chat = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    about = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({**about, "eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "hf" / "chat_template.jinja").write_text(chat)
    report = convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert report.unused == []
    engine = LlamaCpp(tmp_path / "m.gguf")
    said = engine.ask("/apply-template", messages=[{"role": "user", "content": "Hello"}])["prompt"]
    assert said == "<|im_start|>user\nHello<|im_end|>\n"
    assert engine.tokens(said, special=True) == inner.encode(said, add_special_tokens=False).ids
    assert engine.tokens("a<tool> b<|im_end|>") == Tokenizer(inner).encode("a<tool> b<|im_end|>")
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.eos_token_id").contents() == inner.token_to_id(
        "<|im_end|>"
    )
    assert (tmp_path / "m.Modelfile").read_text() == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 128\n"
    )


def test_a_tokenizer_that_begins_every_text_with_a_token_says_so(texts: list[str]) -> None:
    from tokenizers.processors import TemplateProcessing

    inner = tokenizers.Tokenizer.from_str(Tokenizer.train(texts, VOCABULARY).to_json())
    inner.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    found = ggml_tokenizer(inner.to_str(), VOCABULARY, {})
    assert (found.adds_bos, found.bos, found.adds_eos) == (True, 0, False)
    old = json.loads(inner.to_str())
    del old["model"]["type"], old["model"]["ignore_merges"]
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    assert ggml_tokenizer(json.dumps(old), VOCABULARY, {}) == found


def test_the_command_says_what_it_did_and_how_to_go_on(
    tmp_path: Path, small: nn.Module, tokenizer: Tokenizer, onym: Run
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    asked = ("convert", tmp_path / "ours", tmp_path / "m.gguf", "--dtype", "q8_0", "--tokenizer", tmp_path / "tokenizer.json")
    done = onym(*asked, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "tokenizer.json"]
    done = onym(*asked)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "21 tensors read back, 5 as F32, bitwise identical to the source cast to that; 16 within a step of Q8_0" in said
    assert f"llama-cli -m {tmp_path / 'm.gguf'}" in said
    assert f"ollama create m -f {tmp_path / 'm.Modelfile'}" in said
    assert "2 rows" not in said
    assert (tmp_path / "m.Modelfile").read_text() == ('FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 128\n')
    done = onym("inspect", tmp_path / "m.gguf")
    assert done.returncode != 0
    assert "is a GGUF file, which is not read here" in done.stderr


def test_the_program_in_the_guide_runs(
    tmp_path: Path, trained: dict[str, Any], tokenizer: Tokenizer, in_fresh_process: Callable[[str], str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    convert(trained["qwen3"][1], tmp_path / "mine.gguf", tokenizer=tokenizer.to_json())
    assert len(in_fresh_process(program)) > 40


def refused(tmp_path: Path, error: type[OnymError], message: str, **asked: Any) -> None:
    """Nothing is written, and the sentence says why."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        convert(asked.pop("source", tmp_path / "ours"), tmp_path / asked.pop("name", "m.gguf"), **asked)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_refused(tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    known = tokenizer.to_json()
    refused(tmp_path, CheckpointError, r"has no tokenizer beside it, .* give it with --tokenizer")
    refused(
        tmp_path, ConfigError, r"has no dtype 'q8' \(did you mean 'q8_0'\?\)|has no dtype 'q8'", dtype="q8", tokenizer=known
    )
    refused(tmp_path, ConfigError, r"pth leaves every value as it is: leave --dtype f16 out", name="m.pth", dtype="f16")
    refused(tmp_path, ConfigError, r"gguf is one file: end .*m' in \.gguf", name="m", to="gguf", tokenizer=known)
    refused(tmp_path, ConfigError, r"gguf is one file: leave --shard-size out", shard_bytes=5, tokenizer=known)
    larger = Tokenizer.train(texts, 600).to_json()
    refused(tmp_path, TokenizerError, r"The tokenizer has 600 tokens and the model 514 rows", tokenizer=larger)
    (tmp_path / "m.Modelfile").write_text("FROM mine")
    refused(tmp_path, StorageError, r"There is something at '.*m\.Modelfile' already", tokenizer=known)
    assert (tmp_path / "m.Modelfile").read_text() == "FROM mine"


@pytest.mark.parametrize(("change", "reason"), [
    ({"model": {"type": "WordPiece", "unk_token": "<u>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
                "vocab": {"<u>": 0, "<|endoftext|>": 1}}}, "its model is WordPiece, not a byte-level BPE"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "it splits texts by Whitespace"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
     "by ByteLevel with a space before the text"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}}, r"it splits texts by '"),
    ({"normalizer": {"type": "Lowercase"}}, r"it normalises texts \(Lowercase\)"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_has_not(
    tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer, change: dict[str, Any], reason: str
) -> None:
    text = json.dumps({**json.loads(tokenizer.to_json()), **change})
    refused(tmp_path, TokenizerError, f"llama.cpp has no tokenizer like this one: .*{reason}", tokenizer=text)


def test_what_a_model_has_that_llama_cpp_has_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    known = tokenizer.to_json()
    onym.save(onym.GPT(onym.GPTConfig(**SHAPE, gelu="erf")), tmp_path / "ours")
    refused(tmp_path, CheckpointError, r"gpt2 computes GELU's tanh form, .* give --drop gelu", tokenizer=known)
    onym.save(onym.Decoder(onym.DecoderConfig(**SHAPE, qk_norm=True, rope_freq=SCALING)), tmp_path / "ours")
    refused(tmp_path, CheckpointError, r"qwen3 does not scale its rotation \(rope_freq\)", tokenizer=known)
    onym.save(onym.Decoder(onym.DecoderConfig(**{**SHAPE, "context_length": 2**32})), tmp_path / "ours")
    refused(tmp_path, CheckpointError, r"GGUF's context length has 32 bits, and this model's is 4294967296", tokenizer=known)


def test_rows_that_blocks_do_not_divide(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    model = scattered(onym.Decoder(onym.DecoderConfig(**{**SHAPE, "emb_dim": 48}, hidden_dim=64)))
    onym.save(model, tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json(), dtype="q8_0")
    assert any("14 matrices stay F16, because blocks of 32 do not divide their rows" in note for note in report.notes)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (stored["blk.0.ffn_down.weight"], stored["blk.0.ffn_up.weight"]) == ("Q8_0", "F16")
    assert furthest(model, LlamaCpp(tmp_path / "m.gguf"), tokenizer.encode(texts[0])[:32], tokenizer) < 0.3
    onym.save(onym.Decoder(onym.DecoderConfig(**{**SHAPE, "emb_dim": 48}, hidden_dim=40)), tmp_path / "none")
    refused(
        tmp_path, ConfigError, "no matrix of this model has rows that they divide",
        source=tmp_path / "none", name="n.gguf", tokenizer=tokenizer.to_json(), dtype="q4_0",
    )  # fmt: skip


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (70_000.0, "f16", r"trf_blocks|has a value of 7e\+04, which F16 cannot hold: take --dtype bf16 or f32"),
    (float("nan"), "q8_0", "has values that are not finite"),
    (1e9, "q8_0", "written and removed again: values of blk.0.ffn_up.weight are further"),
])  # fmt: skip
def test_values_that_a_dtype_cannot_hold(
    tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer, value: float, dtype: str, message: str
) -> None:
    small.trf_blocks[0].ff.fc2.weight.data[3, 5] = value
    onym.save(small, tmp_path / "ours")
    refused(tmp_path, CheckpointError, message, tokenizer=tokenizer.to_json(), dtype=dtype)


def test_without_the_package_one_sentence_says_how_to_get_it(
    tmp_path: Path, small: onym.Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(
        tmp_path, ConfigError, r"needs llama\.cpp's package gguf: pip install 'onym\[gguf\]'", tokenizer=tokenizer.to_json()
    )
