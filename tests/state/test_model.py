"""Loading in place: all or nothing, strict, and plainly told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import origo
from origo import GPT, GPTConfig, MismatchError
from origo.errors import CheckpointError, ConfigError


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def small(**changes: object) -> GPT:
    base = {"vocab_size": 101, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    return GPT(GPTConfig(**{**base, **changes}))  # type: ignore[arg-type]


def test_a_load_keeps_the_parameters_that_the_optimizer_has() -> None:
    model = small()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    origo.load_state_dict(model, small().state_dict())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_switching_between_compiled_and_eager_changes_no_name_and_no_parameter() -> None:
    model = small()
    tokens = torch.randint(0, 101, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    names, parameters = list(origo.state_dict(model)), [id(p) for p in model.parameters()]
    losses = []
    for compiled in (False, True, False):
        if compiled:
            model.compile()
        else:
            model._compiled_call_impl = None
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert list(origo.state_dict(model)) == names
        assert [id(p) for p in model.parameters()] == parameters
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_layers": 4}, r"Stored with 4 blocks, this model has 2: build it with n_layers=4"),
        ({"vocab_size": 128}, r"Stored with a vocabulary of 128, this model has 101"),
        ({"emb_dim": 64}, r"Stored with a width of 64, this model has 32"),
        ({"qkv_bias": True}, r"2 stored but not in the model: trf_blocks\.0\.att\.qkv\.bias"),
    ],
)
def test_a_mismatch_is_explained_and_changes_nothing(other: dict[str, object], message: str) -> None:
    model = small()
    before = values(model)
    with pytest.raises(MismatchError, match=message):
        origo.load_state_dict(model, small(**other).state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_polluted_names_are_explained() -> None:
    polluted = torch.compile(small()).state_dict()  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match=r"`_orig_mod\.`.*torch\.compile.*origo\.load") as caught:
        origo.load_state_dict(small(), polluted)
    assert len(caught.value.differences.missing) == len(polluted)
    assert len(str(caught.value).splitlines()) <= 20


def test_another_dtype_is_refused_or_cast_and_reported() -> None:
    model, half = small(), small().to(torch.bfloat16)
    with pytest.raises(MismatchError, match='dtype="cast"'):
        origo.load_state_dict(model, half.state_dict())
    report = origo.load_state_dict(model, half.state_dict(), dtype="cast")
    assert report.cast["tok_emb.weight"] == ("bfloat16", "float32")
    assert "cast" in str(report)
    assert model.tok_emb.weight.dtype == torch.float32
    assert torch.equal(model.tok_emb.weight, half.tok_emb.weight.float())
    with pytest.raises(ConfigError, match='"exact" or "cast"'):
        origo.load_state_dict(model, half.state_dict(), dtype="float32")  # type: ignore[arg-type]


def test_a_load_that_is_not_strict_says_what_it_left() -> None:
    model = small()
    state = small(qkv_bias=True).state_dict()
    del state["pos_emb.weight"]
    before = model.pos_emb.weight.clone()
    report = origo.load_state_dict(model, state, strict=False)
    assert report.missing == ["pos_emb.weight"]
    assert report.unexpected == ["trf_blocks.0.att.qkv.bias", "trf_blocks.1.att.qkv.bias"]
    assert torch.equal(model.pos_emb.weight, before)


def test_the_callers_dict_is_not_touched() -> None:
    state = small(tie_embeddings=True).state_dict()
    del state["out_head.weight"]
    names = list(state)
    origo.load_state_dict(torch.compile(small(tie_embeddings=True)), state)  # type: ignore[arg-type]
    assert list(state) == names


def test_tied_tensors_are_restored_and_contradictions_refused() -> None:
    tied, untied = small(tie_embeddings=True), small()
    with pytest.raises(CheckpointError, match=r"out_head\.weight and tok_emb\.weight are one tensor .* tie_embeddings=False"):
        origo.load_state_dict(tied, untied.state_dict())
    origo.load_state_dict(tied, small(tie_embeddings=True).state_dict())
    assert tied.out_head.weight is tied.tok_emb.weight


def test_what_is_no_module_is_said_to_be_none() -> None:
    twice = torch.compile(torch.compile(small()))
    with pytest.raises(ConfigError, match="applied twice"):
        origo.state_dict(twice)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="This is a dict"):
        origo.load_state_dict({}, {})  # type: ignore[arg-type]


def test_extra_state_and_buffers_are_kept() -> None:
    class Counting(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.count = count

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    source, target = Counting(7), Counting(0)
    source.norm(torch.randn(8, 3))
    origo.load_state_dict(torch.compile(target), origo.state_dict(source))  # type: ignore[arg-type]
    assert target.count == 7
    assert torch.equal(target.norm.running_mean, source.norm.running_mean)  # type: ignore[arg-type]
