"""peft opens our adapters on the exported model, and ours opens peft's: equal logits, gradients, and merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onym
from onym import GPT, Decoder, DecoderConfig, GPTConfig, LoRA
from onym.convert.write import convert
from onym.errors import CheckpointError, ConfigError, OnymError
from tests.adapters.test_lora import drawn
from tests.conftest import TINY

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

_DECODER: dict[str, Any] = {
    "vocab_size": 101,
    "context_length": 32,
    "emb_dim": 32,
    "hidden_dim": 64,
    "n_heads": 4,
    "n_kv_groups": 2,
    "head_dim": 8,
    "n_layers": 2,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (lambda: GPT(TINY), "att"),
    "gpt2 tied, with biases": (
        lambda: GPT(GPTConfig.from_dict({**TINY.to_dict(), "tie_embeddings": True, "qkv_bias": True})),
        "all",
    ),
    "llama": (lambda: Decoder(DecoderConfig(**_DECODER)), "all"),
    "qwen3": (lambda: Decoder(DecoderConfig(**_DECODER, qk_norm=True)), "W_query,W_value,ff"),
}
TOKENS = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(5))


@dataclass
class Case:
    """A base in both layouts, and adapters of ours on it."""

    folder: Path
    targets: str
    logits: Tensor

    def ours(self) -> Any:
        return onym.load_model(self.folder / "base")

    def theirs(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "hf")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("peft")
    make, targets = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    onym.save(model, folder / "base")
    convert(folder / "base", folder / "hf", to="huggingface")
    lora = drawn(LoRA.apply(model, rank=4, alpha=6, targets=targets))
    onym.save(lora, folder / "ours")
    return Case(folder, targets, model(TOKENS).detach())


@pytest.fixture
def opened(case: Case) -> Any:
    return peft.PeftModel.from_pretrained(case.theirs(), case.folder / "ours").eval()


def test_peft_opens_ours(case: Case, opened: Any) -> None:
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS).logits, case.logits, atol=1e-5)
    settings = json.loads((case.folder / "ours" / "adapter_config.json").read_text())
    assert "onym" not in settings, "peft warns of a key that it does not know"
    assert settings["task_type"] == "CAUSAL_LM"
    assert len(settings["target_modules"]) <= 7, "ends of names, not a list of every layer"
    assert settings["fan_in_fan_out"] == (type(opened.base_model.model).__name__ == "GPT2LMHeadModel")


def test_ours_opens_peft_s(case: Case, opened: Any, tmp_path: Path) -> None:
    opened.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        model = case.ours()
        lora = LoRA.open(path, model)
        assert torch.allclose(model(TOKENS), case.logits, atol=1e-5)
        assert (lora.config.rank, lora.config.alpha) == (4, 6)
    other = LoRA.apply(case.ours(), rank=4, alpha=6, targets=case.targets)
    onym.load(tmp_path, into=other)
    assert torch.allclose(other.model(TOKENS), case.logits, atol=1e-5)


def test_merged_as_peft_merges(case: Case, opened: Any, tmp_path: Path) -> None:
    expected = opened.merge_and_unload().state_dict()
    lora = LoRA.open(case.folder / "ours", case.ours())
    onym.save(lora, tmp_path / "merged", merged=True)
    convert(tmp_path / "merged", tmp_path / "hf", to="huggingface")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-6) for name, value in expected.items())


def test_gradients_are_peft_s(case: Case, opened: Any) -> None:
    for name, parameter in opened.named_parameters():
        parameter.requires_grad_("lora_" in name)
    opened(TOKENS, labels=TOKENS).loss.backward()
    model = case.ours()
    lora = LoRA.open(case.folder / "ours", model)
    targets = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], dim=1)
    model(TOKENS, targets).backward()
    theirs = [each.grad for name, each in sorted(_by_ours(opened, lora).items())]
    ours = [each.grad for name, each in sorted(lora.named_parameters())]
    assert len(theirs) == len(ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert float(one.abs().max()) > 0
        assert torch.allclose(one, other, atol=1e-5)


def _by_ours(opened: Any, lora: LoRA) -> dict[str, nn.Parameter]:
    """peft's parameters by our names: both list layer by layer; within one, by equal values."""
    theirs = [each for name, each in opened.named_parameters() if "lora_" in name]
    found = {}
    for name, parameter in lora.named_parameters():
        found[name] = next(each for each in theirs if each.shape == parameter.shape and torch.equal(each, parameter))
    return found


def _settings(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.fixture(scope="module")
def peft_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter that peft made, whose layers have several ranks and alphas, scaled by the square root of the rank."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    onym.save(model, folder / "base")
    convert(folder / "base", folder / "hf", to="huggingface")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        rank_pattern={"c_fc": 2, r"h\.1\.attn\.c_attn": 3},
        alpha_pattern={"c_fc": 7},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"), config).eval()
    made.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder, made(TOKENS).logits


def test_ranks_alphas_and_rslora_of_peft_s_are_honoured_and_written_again(peft_gpt2: tuple[Path, Any], tmp_path: Path) -> None:
    folder, logits = peft_gpt2
    model: Any = onym.load_model(folder / "base")
    lora = LoRA.open(folder / "adapter", model)
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)
    assert lora.config.rank_of("trf_blocks.1.att.qkv") == 3
    onym.save(lora, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"), tmp_path / "again")
    with torch.no_grad():
        assert torch.allclose(again.eval()(TOKENS).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["score"]}, "it replaces whole modules as well"),
        ({"bias": "all"}, "it trained biases too"),
        ({"peft_type": "IA3"}, "peft's kind 'IA3', and LORA alone is read here"),
        ({"r": 5}, "does not fit together: transformer.h.0.attn.c_attn has rank 5 by its settings"),
        ({"lora_alpha": -1}, "is damaged: The alpha of LoRA is a number above 0"),
        ({"rank_pattern": {"(": 3}}, "is damaged"),
        ({"rank_pattern": {"(.+)+x": 3}}, "could take forever to match"),
        ({"rank_pattern": [3]}, "is damaged"),
        ({"target_modules": [3]}, "is damaged"),
    ],
)
def test_variants_that_are_not_read_are_named(
    peft_gpt2: tuple[Path, Any], tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    folder, _ = peft_gpt2
    for file in (folder / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _settings(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=sentence.replace("(", r"\(")):
        LoRA.open(tmp_path, onym.load_model(folder / "base"))


def test_an_adapter_for_another_base_is_refused_with_both_named(peft_gpt2: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = peft_gpt2
    wide: Any = GPT(GPTConfig.from_dict({**TINY.to_dict(), "emb_dim": 64}))
    with pytest.raises(CheckpointError, match=r"qkv of 32 inputs and 96 outputs, and in this GPT its weight is \[192, 64\]"):
        LoRA.open(folder / "adapter", wide)
    llama = Decoder(DecoderConfig(**_DECODER))
    with pytest.raises(CheckpointError, match=r"adapters for transformer.h.0.attn.c_attn, and this Decoder has no such layer"):
        LoRA.open(folder / "adapter", llama)
    lora = LoRA.apply(GPT(TINY), rank=4, alpha=6, targets="att.qkv,ff.layers.0")
    with pytest.raises(OnymError, match=r"was trained with alpha 10 at rank 4 \(trf_blocks.0.att.qkv\), and these"):
        onym.load(folder / "adapter", into=lora)
    assert LoRA.of(llama) is None


def test_transformers_own_model_gets_adapters_that_peft_opens(peft_gpt2: tuple[Path, Any], tmp_path: Path) -> None:
    """Conv1D, whose weight is [in, out], also where it is square."""
    folder, _ = peft_gpt2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    lora = drawn(LoRA.apply(model, rank=4))
    assert "lm_head" not in "".join(lora.state_dict())
    expected = model(TOKENS).logits.detach()
    onym.save(lora, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.allclose(other.eval()(TOKENS).logits, expected, atol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    LoRA.open(tmp_path / "adapter", again).merge()
    assert torch.allclose(again(TOKENS).logits, expected, atol=1e-5)
    ours: Any = onym.load_model(folder / "base")
    LoRA.open(tmp_path / "adapter", ours)
    assert torch.allclose(ours(TOKENS), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        LoRA.open(tmp_path / "adapter", ours)
