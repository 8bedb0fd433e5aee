"""What a Llama or a Qwen can be and ours is not, and what is none at all: one sentence each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.errors import CheckpointError, ConfigError
from onym.gpt.decoder_config import DecoderConfig
from tests.convert import peers
from tests.convert.decoder_peers import KINDS, SIZES, STRETCHED, config_of, edited, transformers_model

NOT_OURS = [
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled by 'yarn'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled by 'linear'"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by 'dynamic'"),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "scaled by 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "scaled by 'spiral'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all layers have one base"),
    ("llama", {"partial_rotary_factor": 0.5}, "a part of each head alone"),
    ("llama", {"attention_bias": True}, r"biases \(attention_bias\)"),
    ("llama", {"mlp_bias": True}, r"biases \(mlp_bias\)"),
    ("qwen3", {"attention_bias": True}, r"biases \(attention_bias\)"),
    ("llama", {"hidden_act": "gelu"}, r"activation \(hidden_act\) is 'gelu'"),
    ("mistral", {"sliding_window": 8}, "a window of 8 tokens"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ..., "max_window_layers": 1}, "a window of 8"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, "a window of 8"),
    ("llama", {"model_type": "gemma"}, "'gemma': its norms add one"),
    ("llama", {"model_type": "gemma2"}, "'gemma2': its norms add one"),
    ("llama", {"model_type": "mixtral"}, "'mixtral': it is a mixture of experts"),
    ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe': it is a mixture of experts"),
    ("llama", {"model_type": "phi3"}, "'phi3': it is none of Llama, Mistral, Qwen2 and Qwen3"),
    ("llama", {"model_type": "gpt2"}, "'gpt2': it is none of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each of transformers' classes."""
    path = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        transformers_model(kind, config_of(kind, head_dim=None)).save_pretrained(path / kind)
    return path


def copied(saved: Path, kind: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / kind / name).read_bytes())
    return edited(folder, **changes)


@pytest.mark.parametrize(("kind", "changes", "said"), NOT_OURS)
def test_what_a_decoder_of_transformers_can_be_and_ours_is_not(
    tmp_path: Path, saved: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    copied(saved, kind, tmp_path / "x", **changes)
    with pytest.raises(CheckpointError, match=said):
        onym.load_model(tmp_path / "x")
    assert open_any(tmp_path / "x").checkpoint.model.names, "its tensors can be read all the same"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ..., "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8}),
        ("llama", {"pretraining_tp": 2, "partial_rotary_factor": 1.0}),
    ],
)
def test_a_window_that_hides_nothing_is_none(tmp_path: Path, saved: Path, kind: str, changes: dict[str, Any]) -> None:
    assert onym.load_model(copied(saved, kind, tmp_path / "x", **changes)).config.n_layers == 2


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("mlp.gate_proj", "mlp.experts.0.gate_proj"): value for name, value in state.items()}


BAD_INPUT = {
    "heads that do not divide": ("llama", {"num_attention_heads": 3}, None, "cannot be split into 3 heads of queries"),
    "kv groups that do not divide heads": (
        "llama", {"num_key_value_heads": 3}, lambda state: {
            name: value.repeat(2, 1)[:24] if "k_proj" in name or "v_proj" in name else value for name, value in state.items()
        }, "n_heads=4 cannot share n_kv_groups=3",
    ),
    "other kv groups": ("llama", {"num_key_value_heads": 4}, None, "num_key_value_heads=4, and the tensors have 2"),
    "an odd head_dim": (
        "llama", {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 1}, None, "head_dim=1 is odd"
    ),
    "heads of no width": ("llama", {"num_attention_heads": 0}, None, "whole numbers of at least 1"),
    "heads in words": ("llama", {"num_attention_heads": "four"}, None, "by 'four'"),
    "a scaling nobody knows": ("llama", {"rope_scaling": {"rope_type": "spiral"}}, None, "scaled by 'spiral'"),
    "llama3 without its numbers": ("llama", {"rope_scaling": {"rope_type": "llama3"}}, None, "rope_freq is Llama"),
    "another family": ("qwen3", {"model_type": "gemma3_text"}, None, "'gemma3_text': its norms add one"),
    "a Qwen3 without its norms": ("llama", {"model_type": "qwen3"}, None, r"is incomplete: .*self_attn\.q_norm"),
    "a Llama with Qwen3's norms": ("qwen3", {"model_type": "llama"}, None, r"_norm\.weight, which transformers' Llama has not"),
    "another width": ("llama", {"intermediate_size": 47}, None, "intermediate_size=47, and the tensors have 48"),
    "experts": ("llama", {}, _renamed, "it is a mixture of experts"),
    "a reward model": (
        "llama", {}, lambda state: {name.replace("lm_head", "score"): value[:1] if "lm_head" in name else value
                                    for name, value in state.items()},
        r"its head gives one number, and a classifier here tells two labels or more apart",
    ),
    "a layer is missing": (
        "qwen3", {}, lambda state: {name: value for name, value in state.items() if ".layers.0." not in name}, "it has no "
    ),
    "a norm is missing": (
        "llama", {}, lambda state: {name: value for name, value in state.items() if name != "model.norm.weight"},
        r"1 are missing, model\.norm\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(tmp_path: Path, saved: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    from onym.cli.main import main

    kind, changes, state, said = BAD_INPUT[case]
    copied(saved, kind, tmp_path / "x", **changes)
    if state is not None:
        save_file(state(load_file(tmp_path / "x" / "model.safetensors")), tmp_path / "x" / "model.safetensors")
    code = main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", "huggingface"])
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("fields", "to", "said"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "huggingface", "both norms of queries and keys and biases"),
        ({"n_heads": 3, "n_kv_groups": 3, "head_dim": 8}, "huggingface", "splits a width of 32 over 3 heads"),
        ({"qkv_bias": True, "head_dim": 10}, "huggingface", "Qwen2's heads are as wide together"),
        ({"qk_norm": True}, "llama", "Qwen3ForCausalLM: give --to qwen3"),
        ({}, "qwen2", "LlamaForCausalLM: give --to llama"),
        ({"qkv_bias": True}, "book", "no biases"),
        ({"norm_eps": 1e-4}, "book", r"\(norm_eps\)"),
        ({"qk_norm": True, "norm_eps": 1e-5}, "book", "Qwen3Model adds 1e-06"),
        ({"head_dim": 10}, "book", "as wide together as the model, and these are 40 for 32"),
        ({"norm_eps": 1e-6, "rope_freq": STRETCHED}, "book", "has no rope_freq"),
        ({"norm_eps": 1e-6}, "book-llama3", "give --to book-qwen3"),
        ({}, "book-qwen3", "give --to book-llama3"),
        ({}, "nanogpt", "is not a gpt"),
    ],
)
def test_what_a_class_cannot_hold_is_refused(tmp_path: Path, fields: dict[str, Any], to: str, said: str) -> None:
    onym.save(onym.Decoder(DecoderConfig(**{**SIZES, **fields})), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "ours", tmp_path / ("y.pth" if to.startswith(("book", "nano")) else "y"), to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_gpt2_with_the_settings_of_another_family(tmp_path: Path) -> None:
    peers.huggingface().save_pretrained(tmp_path / "x")
    assert onym.load_model(tmp_path / "x").config.n_layers == 3
    with pytest.raises(CheckpointError, match="model_type 'llama', and the tensors are a GPT-2's"):
        onym.load_model(edited(tmp_path / "x", model_type="llama"))


def test_decoders_of_other_families_are_named(tmp_path: Path) -> None:
    names = {
        "phi": ["model.embed_tokens.weight", "model.layers.0.self_attn.qkv_proj.weight"],
        "olmo": ["blocks.0.attention.w_q.weight"],
    }
    for path, state in names.items():
        torch.save({name: torch.ones(4, 4) for name in state}, tmp_path / f"{path}.pth")
        with pytest.raises(CheckpointError, match=r"a decoder of another family.*its layers have other parts"):
            onym.load_model(tmp_path / f"{path}.pth")


def test_heads_that_cannot_be_assumed(tmp_path: Path) -> None:
    """Said where a model is to be built; a model that somebody built takes the tensors all the same."""
    model = onym.Decoder(config := config_of("llama"))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"does not say how many attention heads .* say it \(n_heads= or --n-heads\)"):
        onym.load_model(tmp_path / "model.pth")
    theirs = transformers_model("llama", config)
    onym.load(tmp_path / "model.pth", into=theirs)
    assert torch.equal(theirs.model.embed_tokens.weight, model.tok_emb.weight)  # type: ignore[union-attr]
    torch.save(peers.book().state_dict(), tmp_path / "gpt2.pth")
    with pytest.raises(ConfigError, match="rope_base cannot be given for the book's GPTModel"):
        onym.load_model(tmp_path / "gpt2.pth", rope_base=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_setting_is_it_is_answered(saved: Path, tmp_path: Path, kind: str) -> None:
    """Values of any type at any key: a model, or an error of ours."""
    values = json.loads((copied(saved, kind, tmp_path / "x") / "config.json").read_text())
    for key in [*values, "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "partial_rotary_factor"]:
        for junk in (None, True, -1, 10**30, 0.5, "four", [], [[1]], {}, {"rope_type": []}, {"a": {"b": 1}}):
            (tmp_path / "x" / "config.json").write_text(json.dumps({**values, key: junk}))
            checkpoint = open_any(tmp_path / "x").checkpoint
            origin = checkpoint.origin
            assert origin is not None
            assert (checkpoint.config is None) == (origin.problem is not None or origin.not_ours is not None)
