"""The decoder: transformers' and the book's numbers for any shape, its cache, its documents, what a configuration refuses."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onym import Decoder, DecoderConfig
from onym.errors import ConfigError
from onym.gpt.config import GPTConfig
from onym.gpt.documents import documents_of, loss_of
from onym.gpt.kinds import ARCHS, arch_of, config_of, presets
from onym.gpt.models import make_model, without_values

TINY = DecoderConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_kv_groups=2, n_layers=2)
NORMED = DecoderConfig.from_dict({**TINY.to_dict(), "qk_norm": True, "head_dim": 16, "norm_eps": None})
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 16}
END = 0

# As in the book's package: chapter 5's bonus material.
LLAMA32_CONFIG_1B = {
    "vocab_size": 128_256,
    "context_length": 131_072,
    "emb_dim": 2048,
    "n_heads": 32,
    "n_layers": 16,
    "hidden_dim": 8192,
    "n_kv_groups": 8,
    "rope_base": 500_000.0,
    "dtype": torch.bfloat16,
    "rope_freq": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192},
}


@st.composite
def shapes(draw: st.DrawFn) -> DecoderConfig:
    """Any shape that one of the stock classes has."""
    groups = draw(st.integers(1, 4))
    heads, qk_norm = groups * draw(st.integers(1, 3)), draw(st.booleans())
    head_dim = 2 * draw(st.integers(1, 9))
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 131)),
        context_length=24,
        emb_dim=draw(st.integers(1, 40)) if qk_norm else heads * head_dim,
        n_heads=heads,
        n_kv_groups=groups,
        head_dim=head_dim,
        n_layers=draw(st.integers(1, 2)),
        hidden_dim=draw(st.integers(1, 70)),
        qk_norm=qk_norm,
        qkv_bias=not qk_norm and draw(st.booleans()),
        rope_base=draw(st.sampled_from([10_000.0, 500_000.0])),
        rope_freq=draw(st.sampled_from([None, SCALING])),
        tie_embeddings=draw(st.booleans()),
    )


def unlike_its_start(model: nn.Module) -> nn.Module:
    """Norms start at 1: no weight could be left out without notice."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def transformers_twin(model: Decoder) -> Any:
    """The stock class with the same weights."""
    import transformers

    config = model.config
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_freq is not None:
        scaling = dict(config.rope_freq)
        rope |= {**scaling, "rope_type": "llama3", "original_max_position_embeddings": scaling.pop("original_context_length")}
    twin = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=config.vocab_size,
            hidden_size=config.emb_dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_groups,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    twin.load_state_dict({_theirs(name): value for name, value in model.state_dict().items()}, strict=True)
    return twin


def _theirs(name: str) -> str:
    words = {"trf_blocks": "model.layers", "tok_emb": "model.embed_tokens", "final_norm": "model.norm", "out_head": "lm_head"}
    words |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "att": "self_attn", "ff": "mlp"}
    words |= {"W_query": "q_proj", "W_key": "k_proj", "W_value": "v_proj", "out_proj": "o_proj"}
    words |= {"fc1": "gate_proj", "fc2": "up_proj", "fc3": "down_proj"}
    return ".".join(words.get(each, each) for each in name.split("."))


@settings(max_examples=25)
@given(config=shapes(), seed=st.integers(0, 1000))
def test_logits_and_gradients_are_transformers_own(config: DecoderConfig, seed: int) -> None:
    torch.manual_seed(seed)
    ours = unlike_its_start(Decoder(config))
    assert isinstance(ours, Decoder)
    theirs = transformers_twin(ours)
    tokens = torch.randint(0, config.vocab_size, (2, 24))
    mine, other = ours(tokens), theirs(tokens).logits
    assert (mine - other).abs().max() < 1e-5
    mine.square().mean().backward()
    other.square().mean().backward()
    for name, parameter in ours.named_parameters():
        gradient, its = parameter.grad, theirs.get_parameter(_theirs(name)).grad
        torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "scaled"])
def test_logits_are_those_of_the_books_llama(scaling: dict[str, float] | None) -> None:
    from llms_from_scratch.llama3 import Llama3Model

    values = {**TINY.to_dict(), "dtype": torch.float32, "rope_freq": scaling}
    ours = unlike_its_start(Decoder(DecoderConfig.from_dict(values)))
    theirs = Llama3Model(values)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randint(0, 101, (2, 32))
    assert (ours(tokens) - theirs(tokens)).abs().max() < 1e-5


def test_logits_are_those_of_the_books_qwen() -> None:
    from llms_from_scratch.qwen3 import Qwen3Model

    ours = unlike_its_start(Decoder(NORMED))
    theirs = Qwen3Model({**NORMED.to_dict(), "dtype": torch.float32})
    renamed = {re.sub(r"(norm\w*)\.weight$", r"\1.scale", name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    tokens = torch.randint(0, 101, (2, 32))
    assert (ours(tokens) - theirs(tokens)).abs().max() < 1e-5


@pytest.fixture(params=[TINY, NORMED], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Decoder:
    made = unlike_its_start(Decoder(request.param))
    assert isinstance(made, Decoder)
    return made


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 101, (2, 32))


@pytest.mark.parametrize("pieces", [[32], [1] * 32, [5, 1, 1, 9, 16]])
def test_cached_logits_are_those_of_the_whole_sequence(model: Decoder, tokens: Tensor, pieces: list[int]) -> None:
    cache = model.new_cache(batch_size=2)
    assert cache.keys.shape[2] == 2, "a head of keys for each group"
    with torch.no_grad():
        logits = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=0, atol=1e-5)


def test_no_token_sees_the_ones_after_it(model: Decoder, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 101
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_a_packed_row_is_its_documents_one_by_one(model: Decoder, tokens: Tensor) -> None:
    tokens[0, 10], tokens[0, 11], tokens[0, 25], tokens[1, 31] = END, END, END, END
    with torch.no_grad():
        together = model(tokens, documents=documents_of(tokens, END))
        for row in range(2):
            start = 0
            for end in [*(index + 1 for index in range(32) if tokens[row, index] == END), 32]:
                if end > start:
                    alone = model(tokens[row : row + 1, start:end])
                    torch.testing.assert_close(together[row : row + 1, start:end], alone, rtol=0, atol=1e-5)
                start = end


@pytest.mark.parametrize(
    ("backend", "recompute", "end_of_text"), [("inductor", False, END), ("aot_eager", True, END), ("aot_eager", True, None)]
)
def test_compiled_and_eager_agree(tokens: Tensor, backend: str, recompute: bool, end_of_text: int | None) -> None:
    model = unlike_its_start(Decoder(NORMED))
    assert isinstance(model, Decoder)
    tokens[:, 9] = END
    targets = tokens.roll(-1, dims=1)

    def gradients(of: nn.Module) -> list[Tensor]:
        loss = loss_of(of, tokens, targets, end_of_text)
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = gradients(model)
    model.recompute_activations = recompute
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_it_starts_as_gpt2_does_and_with_zeros_as_the_identity() -> None:
    config = DecoderConfig(vocab_size=500, context_length=16, emb_dim=256, n_heads=4, n_layers=8)
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / 4 if name.endswith(("att.out_proj.weight", "ff.fc3.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    tokens = torch.arange(16)[None]
    assert model(tokens, tokens).item() == pytest.approx(math.log(500), abs=0.15)
    model.zero_residual_outputs()
    identity = model.out_head(model.final_norm(model.tok_emb(tokens)))
    assert torch.equal(model(tokens), identity)


def test_copies_pickles_and_models_without_values_are_the_same(model: Decoder, tokens: Tensor) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens))
    empty = without_values(model.config)
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(tokens), model(tokens))


def test_in_bf16_it_computes_in_bf16(model: Decoder, tokens: Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    assert half(tokens).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens, tokens).dtype == torch.float32
        torch.testing.assert_close(model(tokens).float(), model.float()(tokens).float(), rtol=0.1, atol=0.1)


def test_the_books_dicts_are_read_as_they_are() -> None:
    config = DecoderConfig.from_dict(LLAMA32_CONFIG_1B)
    assert config == DecoderConfig.preset("llama3.2-1b", tie_embeddings=False)
    assert (config.head_dim, config.norm_eps, config.qk_norm) == (64, 1e-5, False)
    from llms_from_scratch.qwen3 import QWEN_CONFIG_06_B

    theirs = DecoderConfig.from_dict(QWEN_CONFIG_06_B)
    assert theirs == DecoderConfig.preset("qwen3-0.6b", tie_embeddings=False)
    assert theirs.norm_eps == 1e-6


@given(shapes())
def test_a_configuration_survives_json(config: DecoderConfig) -> None:
    assert DecoderConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("arch", "preset", "millions"),
    [("qwen3", "qwen3-0.6b", 596), ("llama", "llama3.2-1b", 1236), ("llama", "small", 124), ("qwen3", "medium", 354)],
)
def test_presets_have_the_number_of_parameters_that_they_are_named_for(arch: Any, preset: str, millions: int) -> None:
    model = without_values(config_of(arch, preset))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("preset", ["nano", "micro", "mini"])
def test_counterparts_have_gpt2s_size(preset: str) -> None:
    gpt2, llama = (config_of(arch, preset, vocab_size=1024) for arch in ("gpt2", "llama"))
    assert llama.multiplied_weights == gpt2.multiplied_weights
    assert llama.attention_width == gpt2.attention_width


def test_every_preset_is_one_kinds_or_all_kinds() -> None:
    for preset in presets():
        made = config_of(arch_of(preset), preset)
        assert isinstance(made, GPTConfig) == (arch_of(preset) == "gpt2")
    assert {type(make_model(config_of(arch, "nano", vocab_size=9))).__name__ for arch in ARCHS} == {"GPT", "Decoder"}
    with pytest.raises(ConfigError, match=r"There is no preset 'nanno' \(did you mean 'nano'\?\)|no preset 'nanno'"):
        arch_of("nanno")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"emb_dim": 100, "n_heads": 12}, r"emb_dim=100 cannot be split over n_heads=12 .*give head_dim, or take n_heads=10"),
        ({"n_heads": 6, "n_kv_groups": 4, "emb_dim": 60}, r"n_heads=6 cannot share n_kv_groups=4 .*: take n_kv_groups=3"),
        ({"emb_dim": 36, "n_heads": 12}, r"head_dim=3 is odd.*head_dim=4"),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1"),
        ({"hidden_dim": 1.5}, "hidden_dim must be a whole number"),
        ({"rope_base": 0}, "rope_base must be a number above 1"),
        ({"norm_eps": 10**400}, "norm_eps must be a number above 0"),
        ({"rope_freq": {**SCALING, "factor": 10**400}}, "factor in rope_freq must be a number above 0"),
        ({"norm_eps": -1e-5}, "norm_eps must be a number above 0"),
        ({"rope_freq": {"factor": 8.0}}, "rope_freq is Llama 3.1's scaling, with factor, low_freq_factor"),
        ({"rope_freq": {**SCALING, "factor": -1}}, "factor in rope_freq must be a number above 0"),
        ({"rope_freq": {**SCALING, "high_freq_factor": 1.0}}, "high_freq_factor in rope_freq must be above"),
        ({"num_experts": 8}, "num_experts=8 asks for a mixture of experts, which a decoder does not have"),
        ({"drop_rate": 0.1}, "drop_rate=0.1 asks for dropout, which a decoder does not have"),
        ({"n_kv_group": 2}, r"A decoder has no setting 'n_kv_group'.*n_kv_groups"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DecoderConfig.from_dict(values)


def test_feed_forward_and_groups_follow_another_width_of_our_own_presets() -> None:
    wide = DecoderConfig.preset("nano", emb_dim=192, n_heads=3)
    assert (wide.hidden_dim, wide.n_kv_groups) == (576, 3)
    assert DecoderConfig.preset("nano", emb_dim=192, n_heads=6).n_kv_groups == 3
    assert DecoderConfig.preset("nano", emb_dim=192, hidden_dim=77, n_kv_groups=1).to_dict()["hidden_dim"] == 77
    assert DecoderConfig.preset("qwen3-0.6b", emb_dim=512).hidden_dim == 3072
