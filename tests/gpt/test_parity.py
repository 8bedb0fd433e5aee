"""The same weights give the same numbers in the reference implementations. Only the tests know their names."""

from __future__ import annotations

import pytest
import torch
from llms_from_scratch.ch04 import GPTModel, GPTModelFast
from torch import Tensor, nn

from onym import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=211, context_length=48, emb_dim=64, n_heads=4, n_layers=3, qkv_bias=True)
TOLERANCE = 1e-5


@pytest.fixture
def data() -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (3, CONFIG.context_length + 1))


def trained_a_little(model: GPT, data: Tensor) -> GPT:
    """Biases start at 0 and norms at 1: some steps, so that no weight could be left out without notice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(data[:, :-1], data[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_logits_and_loss_equal_transformers_gpt2(data: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = trained_a_little(GPT(CONFIG), data)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_positions=CONFIG.context_length,
            n_embd=CONFIG.emb_dim,
            n_layer=CONFIG.n_layers,
            n_head=CONFIG.n_heads,
            tie_word_embeddings=False,
        )
    ).eval()
    mine = ours.state_dict()
    mapped = {
        "transformer.wte.weight": mine["tok_emb.weight"],
        "transformer.wpe.weight": mine["pos_emb.weight"],
        "transformer.ln_f.weight": mine["final_norm.weight"],
        "transformer.ln_f.bias": mine["final_norm.bias"],
        "lm_head.weight": mine["out_head.weight"],
    }
    parts = {"norm1": "ln_1", "norm2": "ln_2", "att.qkv": "attn.c_attn", "att.proj": "attn.c_proj"}
    parts |= {"ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
    for layer in range(CONFIG.n_layers):
        for our_part, their_part in parts.items():
            weight = mine[f"trf_blocks.{layer}.{our_part}.weight"]
            # transformers' Conv1D keeps matrices as [in, out]
            mapped[f"transformer.h.{layer}.{their_part}.weight"] = weight.T if weight.dim() == 2 else weight
            mapped[f"transformer.h.{layer}.{their_part}.bias"] = mine[f"trf_blocks.{layer}.{our_part}.bias"]
    theirs.load_state_dict(mapped, strict=True)

    inputs, targets = data[:, :-1], data[:, 1:]
    with torch.no_grad():
        logits = theirs(inputs).logits
        assert (ours(inputs) - logits).abs().max() < TOLERANCE
        # transformers shifts the labels itself
        their_loss = theirs(inputs, labels=inputs).loss
        assert abs(ours(inputs[:, :-1], inputs[:, 1:]) - their_loss) < TOLERANCE
        assert abs(ours(inputs, targets) - nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())) < TOLERANCE


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_books_optimised_model_loads_strictly_both_ways(data: Tensor, qkv_bias: bool) -> None:
    values = {**CONFIG.to_dict(), "qkv_bias": qkv_bias}
    ours = trained_a_little(GPT(GPTConfig(**values)), data)
    theirs = GPTModelFast(values).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert (ours(data[:, :-1]) - theirs(data[:, :-1])).abs().max() < TOLERANCE

    fresh = GPTModelFast(values).eval()
    ours.load_state_dict(fresh.state_dict(), strict=True)
    with torch.no_grad():
        assert (ours(data[:, :-1]) - fresh(data[:, :-1])).abs().max() < TOLERANCE


def test_logits_equal_the_books_readable_model(data: Tensor) -> None:
    ours = trained_a_little(GPT(CONFIG), data)
    theirs = GPTModel(CONFIG.to_dict()).eval()
    mapped = {}
    for name, value in ours.state_dict().items():
        if ".att.qkv." in name:
            for part, piece in zip(("W_query", "W_key", "W_value"), value.chunk(3), strict=True):
                mapped[name.replace("qkv", part)] = piece
        elif "norm" in name:
            mapped[name.replace("weight", "scale").replace("bias", "shift")] = value
        else:
            mapped[name.replace("att.proj", "att.out_proj")] = value
    masks = {name: value for name, value in theirs.state_dict().items() if name.endswith("att.mask")}
    theirs.load_state_dict({**mapped, **masks}, strict=True)
    with torch.no_grad():
        assert (ours(data[:, :-1]) - theirs(data[:, :-1])).abs().max() < TOLERANCE
