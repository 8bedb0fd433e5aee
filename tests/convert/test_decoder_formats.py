"""Llamas and Qwens of transformers, the book, LitGPT and torchtitan: the same logits here, and in their classes from ours."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onym
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError
from onym.gpt.decoder_config import DecoderConfig
from tests.convert.decoder_peers import (
    KINDS,
    OF_KIND,
    PAIRS,
    STRETCHED,
    Titan,
    apart,
    book_model,
    config_of,
    drawn,
    edited,
    ours,
    shapes,
    transformers_model,
)

CLOSE = 1e-5
FEW = settings(max_examples=10, deadline=None)


@pytest.fixture(autouse=True)
def _what_is_assumed_is_tested_where_it_matters() -> None:
    import warnings

    warnings.filterwarnings("ignore", message=".*assumed")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(data=st.data())
def test_transformers_decoders(kind: str, data: st.DataObject) -> None:
    config = data.draw(OF_KIND[kind])
    theirs = transformers_model(kind, config)
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        loaded = onym.load_model(name)
    assert loaded.config == config
    assert apart(loaded, theirs, config) < CLOSE


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@FEW
@given(data=st.data())
def test_transformers_opens_a_decoder(kind: str, data: st.DataObject) -> None:
    from transformers import AutoModelForCausalLM

    config = data.draw(OF_KIND[kind])
    model = ours(config)
    with tempfile.TemporaryDirectory() as name:
        onym.save(model, f"{name}/ours")
        for to in ("huggingface", kind):
            report = convert(f"{name}/ours", f"{name}/{to}", to=to)
            assert report.logits is not None
            assert report.logits < CLOSE
        theirs = AutoModelForCausalLM.from_pretrained(f"{name}/huggingface").eval()
        assert type(theirs).__name__.lower() == f"{kind}forcausallm"
        assert (Path(name) / "huggingface" / "config.json").read_text() == (Path(name) / kind / "config.json").read_text()
        assert onym.load_model(f"{name}/huggingface").config == config
    assert apart(model, theirs, config) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_transformers_4(folder: Path, kind: str) -> None:
    """``rope_theta`` and ``rope_scaling``, as in every folder from before transformers 5; with its older word ``type``."""
    config = config_of(kind, rope_base=500_000.0, rope_freq=STRETCHED)
    transformers_model(kind, config).save_pretrained(folder)
    stretched = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert stretched.pop("rope_theta") == 500_000.0
    edited(folder, rope_parameters=..., rope_theta=500_000.0, rope_scaling=stretched)
    assert onym.load_model(folder).config == config
    stretched["type"] = stretched.pop("rope_type")
    assert onym.load_model(edited(folder, rope_scaling=stretched)).config == config
    assert onym.load_model(edited(folder, rope_scaling=None)).config == dataclasses.replace(config, rope_freq=None)
    plain = dataclasses.replace(config, rope_base=10_000.0, rope_freq=None)
    assert onym.load_model(edited(folder, rope_theta=..., rope_scaling=...)).config == plain


def test_what_is_written_has_the_rope_keys_of_both_versions(folder: Path) -> None:
    onym.save(ours(config_of("llama", rope_freq=STRETCHED)), folder / "ours")
    convert(folder / "ours", folder / "hf", to="llama")
    values = json.loads((folder / "hf" / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    assert values["rope_theta"] == 10_000.0
    assert values["rope_scaling"] == scaling
    assert values["rope_parameters"] == {**scaling, "rope_theta": 10_000.0}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_decoders_file_without_settings_prefix_or_head(folder: Path, kind: str) -> None:
    """A lone file: heads and rotation are assumed aloud, or given."""
    from safetensors.torch import save_file

    config = config_of(kind, emb_dim=128, n_heads=2, rope_base=30_000.0, tie_embeddings=True)
    theirs = transformers_model(kind, config)
    state = {
        name.removeprefix("model."): value.clone() for name, value in theirs.state_dict().items() if name != "lm_head.weight"
    }
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file({f"_orig_mod.{name}": value for name, value in state.items()}, folder / "x.safetensors")
    with pytest.warns(UserWarning, match=r"rope_base=.*000\.0 and context_length=\d+ were assumed, as (Llama|Qwen)"):
        guessed = onym.load_model(folder / "x.safetensors")
    assert (guessed.config.n_heads, guessed.config.head_dim, guessed.config.qk_norm) == (2, 64, kind == "qwen3")
    opened = open_any(folder / "x.safetensors", settings={"norm_eps": 1e-6}).checkpoint
    assert opened.origin is not None
    assert opened.origin.wrappers == {"_orig_mod": len(state)}
    assert opened.origin.dropped == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    onym.load(folder / "x.safetensors", into=(model := onym.Decoder(config)))
    assert apart(model, theirs, config) < CLOSE
    given = onym.load_model(folder / "x.safetensors", n_heads=2, rope_base=30_000.0, context_length=24)
    assert (given.config.rope_base, given.config.context_length) == (30_000.0, 24)
    with pytest.raises(ConfigError, match="cannot be split into 3 heads of queries"):
        onym.load_model(folder / "x.safetensors", n_heads=3)


def test_a_decoder_in_shards_and_in_bf16(folder: Path) -> None:
    config = config_of("qwen3")
    theirs = transformers_model("qwen3", config).to(torch.bfloat16)
    theirs.save_pretrained(folder / "hf", max_shard_size="20KB")
    assert (folder / "hf" / "model.safetensors.index.json").exists()
    report = convert(folder / "hf", folder / "again", to="huggingface", shard_bytes=20_000)
    assert report.logits == 0
    for name, value in onym.open_checkpoint(folder / "again").model.state().items():
        assert value.dtype == torch.bfloat16, name
    assert onym.load_model(folder / "again").config == config


def test_a_tied_head_that_is_stored_besides(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = config_of("llama", tie_embeddings=True)
    theirs = transformers_model("llama", config)
    theirs.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert onym.load_model(folder).config == config
    save_file({**state, "lm_head.weight": torch.zeros(97, 32)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="the file holds another head besides"):
        assert apart(onym.load_model(folder), theirs, config) < CLOSE
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is incomplete: it has no lm_head\.weight"):
        onym.load_model(edited(folder, tie_word_embeddings=False))


def test_a_chat_template_and_token_ids_are_preserved(folder: Path) -> None:
    tokenizer = Tokenizer.train(["some words and some more words " * 20], 270)
    transformers_model("mistral", config_of("mistral", vocab_size=270)).save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.json").write_text(tokenizer.to_json())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "hf" / "chat_template.jinja").write_text("{{ messages }}!")
    edited(folder / "hf", eos_token_id=[1, 2], pad_token_id=3)
    report = convert(folder / "hf", folder / "again", to="huggingface")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (folder / "again" / name).read_text() == (folder / "hf" / name).read_text()
        assert name not in report.unused
    values = json.loads((folder / "again" / "config.json").read_text())
    assert (values["model_type"], values["eos_token_id"], values["pad_token_id"]) == ("llama", [1, 2], 3)


OF_BOOK = {
    "Llama3Model": shapes(PAIRS, False, False, [1e-5]),
    "Qwen3Model": shapes(PAIRS, True, True, [1e-6], scaled=False, qk_norm=True)
    | shapes(PAIRS, True, True, [1e-6], scaled=False),
}


@pytest.mark.parametrize("name", OF_BOOK)
@FEW
@given(data=st.data())
def test_the_books_decoders(name: str, data: st.DataObject) -> None:
    """Both ways: its file here, by names that torch.compile changed, and ours in its class, strictly."""
    config = data.draw(OF_BOOK[name])
    theirs = book_model(name, config)
    known = {"n_heads": config.n_heads, "rope_base": config.rope_base, "context_length": config.context_length}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.compile(theirs).state_dict(), f"{folder}/theirs.pth")
        onym.load(f"{folder}/theirs.pth", into=(model := onym.Decoder(config)))
        assert apart(model, theirs, config) < CLOSE
        built = onym.load_model(f"{folder}/theirs.pth", **known)
        assert built.config == dataclasses.replace(config, rope_freq=None)
        onym.save(model, f"{folder}/ours")
        report = convert(f"{folder}/ours", f"{folder}/ours.pth", to="book")
        assert any(f"Build it as {name}({{" in note for note in report.notes)
        again = book_model(name, config)
        again.load_state_dict(torch.load(f"{folder}/ours.pth", weights_only=True), strict=True)
    assert apart(again, theirs, config) == 0


def test_the_dict_that_the_report_gives_builds_the_books_class(folder: Path) -> None:
    from llms_from_scratch.qwen3 import Qwen3Model

    config = config_of("qwen3", head_dim=6)
    onym.save(model := ours(config), folder / "ours")
    report = convert(folder / "ours", folder / "model.pth", to="book")
    call = next(note for note in report.notes if "Build it as" in note).split("Build it as ")[1].removesuffix(".")
    theirs = eval(call, {"Qwen3Model": Qwen3Model, "torch": torch}).eval()
    theirs.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    assert apart(model, theirs, config) < CLOSE


def test_the_books_llama_2_with_its_tables(folder: Path) -> None:
    """The notebooks on Llama 2 store mask, cosines and sines with each layer: they say context and head_dim."""
    config = config_of("llama", norm_eps=1e-5, n_kv_groups=4, head_dim=8)
    model = ours(config)
    tables = {"mask": torch.ones(24, 24), "cos": torch.ones(24, 8), "sin": torch.ones(24, 8)}
    beside = {f"trf_blocks.{n}.att.{name}": value for n in range(2) for name, value in tables.items()}
    torch.save({**model.state_dict(), **beside}, folder / "model.pth")
    loaded = onym.load_model(folder / "model.pth")
    assert loaded.config == config
    assert apart(loaded, model, config) == 0


def _litgpt(config: DecoderConfig, **changes: Any) -> Any:
    from litgpt import Config
    from litgpt.model import GPT

    scaling = None
    if config.rope_freq is not None:
        scaling = dict(config.rope_freq)
        scaling["original_max_seq_len"] = int(scaling.pop("original_context_length"))
    settings: dict[str, Any] = {
        "n_layer": config.n_layers, "n_embd": config.emb_dim, "n_head": config.n_heads, "n_query_groups": config.n_kv_groups,
        "head_size": config.head_dim, "block_size": config.context_length, "padded_vocab_size": config.vocab_size,
        "intermediate_size": config.hidden_dim, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
        "norm_eps": config.norm_eps, "parallel_residual": False, "bias": False, "rotary_percentage": 1.0,
        "rope_base": int(config.rope_base), "rope_adjustments": scaling, "norm_qk": config.qk_norm,
        "attn_bias": config.qkv_bias, **changes,
    }  # fmt: skip
    return drawn(GPT(Config(**settings)))


def _saved_litgpt(model: Any, folder: Path) -> Path:
    from litgpt.utils import save_config

    torch.save({"model": model.state_dict()}, folder / "lit_model.pth")
    save_config(model.config, folder)
    return folder


@FEW
@given(config=shapes(PAIRS, True, True, [1e-5]) | OF_KIND["qwen2"] | OF_KIND["qwen3"], grouped=st.booleans())
def test_litgpts_llamas_and_qwens(config: DecoderConfig, grouped: bool) -> None:
    """With query, key and value one above the other, and group by group, as older versions stored them."""
    config = dataclasses.replace(config, tie_embeddings=False)
    theirs = _litgpt(config)
    state = theirs.state_dict()
    with tempfile.TemporaryDirectory() as name:
        _saved_litgpt(theirs, Path(name))
        if grouped:
            sizes = [heads * config.head_dim for heads in (config.n_heads, config.n_kv_groups, config.n_kv_groups)]
            older = {}
            for key, value in state.items():
                if ".attn.qkv." in key:
                    parts = [part.unflatten(0, (config.n_kv_groups, -1)) for part in value.split(sizes)]
                    key, value = key.replace(".attn.qkv.", ".attn.attn."), torch.cat(parts, dim=1).flatten(0, 1)
                older[key] = value
            torch.save({"model": older}, f"{name}/lit_model.pth")
        loaded = onym.load_model(name)
        assert loaded.config == config
        assert apart(loaded, theirs, config) < CLOSE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel_residual": True}, "parallel_residual is True"),
        ({"rotary_percentage": 0.25}, r"rotary_percentage is 0\.25"),
        ({"sliding_window_size": 8, "sliding_window_indices": [1, 0]}, "a window of 8 tokens"),
        ({"name": "Gemma-2b"}, "Gemma"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 8}}, "beta_fast"),
    ],
)
def test_what_a_litgpt_model_can_be_and_ours_is_not(folder: Path, changes: dict[str, Any], said: str) -> None:
    _saved_litgpt(_litgpt(config_of("llama"), **changes), folder)
    with pytest.raises(CheckpointError, match=said):
        onym.load_model(folder)


def test_a_litgpt_model_without_its_settings(folder: Path) -> None:
    torch.save({"model": _litgpt(config_of("llama")).state_dict()}, folder / "lit_model.pth")
    with pytest.raises(CheckpointError, match=r"no model_config\.yaml beside it"):
        onym.load_model(folder)


@FEW
@given(config=shapes(PAIRS, True, True, [1e-5], scaled=False))
def test_torchtitans_llama(config: DecoderConfig) -> None:
    """Its rotation turns neighbouring dimensions; Meta's files have its names, and their settings in ``params.json``."""
    config = dataclasses.replace(config, tie_embeddings=False)
    theirs = drawn(Titan(config))
    with tempfile.TemporaryDirectory() as name:
        torch.save({**theirs.state_dict(), "freqs_cis": torch.ones(4)}, f"{name}/consolidated.00.pth")
        params = {"dim": config.emb_dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": 1e-5}
        params |= {"n_kv_heads": config.n_kv_groups, "rope_theta": config.rope_base, "vocab_size": -1}
        (Path(name) / "params.json").write_text(json.dumps(params))
        loaded = onym.load_model(name, context_length=config.context_length)
        assert loaded.config == config
        assert apart(loaded, theirs, config) < CLOSE
        (Path(name) / "params.json").unlink()
        known = {"n_heads": config.n_heads, "rope_base": config.rope_base, "context_length": config.context_length}
        assert apart(onym.load_model(f"{name}/consolidated.00.pth", **known), theirs, config) < CLOSE


def test_ours_and_transformers_load_each_others_checkpoints(folder: Path) -> None:
    config = config_of("qwen3")
    model, theirs = ours(config), transformers_model("qwen3", config)
    onym.save(model, folder / "ours")
    onym.load(folder / "ours", into=theirs)
    assert apart(model, theirs, config) < CLOSE
    torch.save(torch.compile(theirs).state_dict(), folder / "theirs.pth")
    onym.load(folder / "theirs.pth", into=(other := onym.Decoder(config)))
    assert apart(other, model, config) == 0
    book = book_model("Qwen3Model", dataclasses.replace(config, norm_eps=1e-6))
    onym.load(folder / "theirs.pth", into=book)
    assert apart(book, model, config) < CLOSE


def test_a_setting_that_shows_in_no_shape_is_compared_before_loading(folder: Path) -> None:
    transformers_model("llama", config_of("llama")).save_pretrained(folder)
    for field, value in (("rope_base", 5e5), ("norm_eps", 1e-3), ("rope_freq", STRETCHED), ("n_heads", 2)):
        fields = {"head_dim": 16, "n_kv_groups": 1} if field == "n_heads" else {}
        with pytest.raises(ConfigError, match=f"was trained with {field}="):
            onym.load(folder, into=onym.Decoder(config_of("llama", **{field: value}, **fields)))


def test_a_live_model_of_transformers_is_compared_before_loading_too(folder: Path) -> None:
    """Ours and its own folder, into a class that has the same shapes and computes otherwise."""
    config = config_of("llama")
    onym.save(ours(config), folder / "ours")
    transformers_model("llama", config).save_pretrained(folder / "hf")
    for field, value in (("rope_base", 5e5), ("norm_eps", 1e-3), ("rope_freq", STRETCHED), ("n_heads", 2)):
        fields = {"head_dim": 16, "n_kv_groups": 1} if field == "n_heads" else {}
        other = transformers_model("llama", config_of("llama", **{field: value}, **fields))
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        for source in ("ours", "hf"):
            with pytest.raises(ConfigError, match=f"was trained with {field}="):
                onym.load(folder / source, into=other)
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    for source in ("ours", "hf"):
        onym.load(folder / source, into=transformers_model("llama", config))


def test_a_mismatch_speaks_of_the_decoders_fields_and_of_whose_names_they_are(folder: Path) -> None:
    onym.save(ours(config_of("llama")), folder / "ours")
    for field, value in (("n_layers", 3), ("vocab_size", 90)):
        with pytest.raises(CheckpointError, match=field):
            onym.load(folder / "ours", into=onym.Decoder(config_of("llama", **{field: value})))
    transformers_model("llama", config_of("llama")).save_pretrained(folder / "hf")
    with pytest.raises(CheckpointError, match="transformers' Llama"):
        onym.load(folder / "hf", into=onym.GPT(onym.GPTConfig.preset("nano", vocab_size=97)))


def test_transformers_writes_the_same_text(folder: Path) -> None:
    """Model and tokenizer opened by their Auto classes: the same greedy continuation as ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from onym.generation.engine import generate
    from onym.generation.sampling import Sampling

    tokenizer = Tokenizer.train(["some words and some more words, all of them short " * 20], 280)
    model = ours(config_of("qwen3", vocab_size=tokenizer.vocab_size, tie_embeddings=True))
    onym.save(model, folder / "ours")
    convert(folder / "ours", folder / "hf", to="huggingface", tokenizer=tokenizer.to_json())
    prompt = AutoTokenizer.from_pretrained(folder / "hf")("some words", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [tokenizer.encode("some words")]
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf")
    written = theirs.generate(**prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist()
    mine = generate(model, tokenizer.encode("some words"), 16, Sampling(temperature=0))
    assert written[len(prompt["input_ids"][0]) :] == list(mine)


def test_what_a_decoders_file_does_not_say_is_given_on_the_command_line(folder: Path) -> None:
    from onym.cli.main import main

    config = config_of("llama", rope_base=20_000.0, norm_eps=1e-5)
    torch.save(ours(config).state_dict(), folder / "model.pth")
    said = ["--n-heads", "4", "--rope-base", "20000", "--context-length", "24"]
    assert main(["convert", str(folder / "model.pth"), str(folder / "ours"), "--to", "onym", *said]) == 0
    assert onym.load_model(folder / "ours").config == config
