"""The model: its names, its start, its cache, and what padding may not change."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from onym import GPT, GPTConfig
from onym.gpt.causal_lm import HEAD_MULTIPLE, Head
from tests.conftest import TINY


def test_names_are_those_of_the_books_optimised_model() -> None:
    block = "norm1.weight norm1.bias att.qkv.weight att.proj.weight att.proj.bias norm2.weight norm2.bias "
    block += "ff.layers.0.weight ff.layers.0.bias ff.layers.2.weight ff.layers.2.bias"
    expected = {"tok_emb.weight", "pos_emb.weight", "final_norm.weight", "final_norm.bias", "out_head.weight"}
    expected |= {f"trf_blocks.{n}.{name}" for n in range(TINY.n_layers) for name in block.split()}
    assert set(GPT(TINY).state_dict()) == expected


def test_it_starts_as_gpt2_does() -> None:
    model = GPT(GPTConfig(vocab_size=500, context_length=64, emb_dim=256, n_heads=4, n_layers=8))
    residual = 0.02 / math.sqrt(16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = residual if name.endswith(("att.proj.weight", "ff.layers.2.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 if "norm" in name and "weight" in name else 0.0)), name


def test_a_fresh_model_knows_nothing() -> None:
    model = GPT(GPTConfig(vocab_size=1000, context_length=32, emb_dim=64, n_heads=4, n_layers=2))
    data = torch.randint(0, 1000, (8, 33))
    assert model(data[:, :-1], data[:, 1:]).item() == pytest.approx(math.log(1000), abs=0.1)


def test_a_head_of_few_rows_is_not_copied_to_be_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    head, padded = Head(8, 101, bias=False), []
    pad = F.pad
    monkeypatch.setattr(F, "pad", lambda *given: padded.append(given) or pad(*given))
    assert head(torch.zeros(1, 1, 8)).shape == (1, 1, 101)
    assert not padded
    assert head(torch.zeros(1, HEAD_MULTIPLE, 8)).shape == (1, HEAD_MULTIPLE, 101)
    assert padded


@pytest.mark.parametrize("vocab_size", [HEAD_MULTIPLE - 1, HEAD_MULTIPLE, HEAD_MULTIPLE + 1, 101])
def test_padding_the_head_changes_no_logit_and_no_gradient(vocab_size: int) -> None:
    model = GPT(GPTConfig(vocab_size=vocab_size, context_length=16, emb_dim=32, n_heads=4, n_layers=1)).double()
    tokens = torch.randint(0, vocab_size, (2, 16))
    model(tokens, tokens).backward()
    gradient = model.out_head.weight.grad
    assert gradient is not None
    assert gradient.shape == (vocab_size, 32), "no row that is not a token"

    x = torch.randn(2, 16, 32, dtype=torch.double)
    torch.testing.assert_close(model.out_head(x), F.linear(x, model.out_head.weight), rtol=1e-12, atol=1e-12)


def test_no_token_sees_the_ones_after_it(tiny: GPT, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % TINY.vocab_size
    before, after = tiny(tokens), tiny(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("pieces", [[32], [1] * 32, [5, 1, 1, 9, 16], [31, 1]])
def test_cached_logits_are_those_of_the_whole_sequence(tiny: GPT, tokens: torch.Tensor, pieces: list[int]) -> None:
    cache = tiny.new_cache(batch_size=2)
    with torch.no_grad():
        logits = [tiny(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), tiny(tokens), rtol=0, atol=1e-5)
    assert cache.length == 32


def test_too_many_tokens_are_refused(tiny: GPT, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="33 tokens do not fit a context of 32"):
        tiny(torch.cat([tokens, tokens[:, :1]], dim=1))


def test_targets_that_do_not_count_do_not_count(tiny: GPT, tokens: torch.Tensor) -> None:
    targets = tokens.clone()
    targets[1] = -100
    torch.testing.assert_close(tiny(tokens, targets), tiny(tokens[:1], tokens[:1]))


def test_dropout_is_on_in_training_only() -> None:
    model = GPT(GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.5))
    tokens = torch.randint(0, 101, (1, 32))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_a_tied_model_has_one_matrix_and_loads_it_under_either_name() -> None:
    config = GPTConfig(vocab_size=101, context_length=16, emb_dim=32, n_heads=4, n_layers=1, tie_embeddings=True)
    model = GPT(config)
    assert model.out_head.weight is model.tok_emb.weight
    for kept in ("tok_emb.weight", "out_head.weight"):
        state = {name: value for name, value in model.state_dict().items() if name not in ("tok_emb.weight", "out_head.weight")}
        state[kept] = model.state_dict()[kept]
        size_before = len(state)
        twin = GPT(config)
        twin.load_state_dict(state, strict=True)
        assert len(state) == size_before, "the caller's dict is not touched"
        assert twin.out_head.weight is twin.tok_emb.weight
        assert torch.equal(twin.out_head.weight, model.out_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_copies_and_pickles_compute_the_same(tokens: torch.Tensor, tied: bool) -> None:
    model = GPT(GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=2, tie_embeddings=tied)).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens))
        assert (twin.out_head.weight is twin.tok_emb.weight) == tied
