"""Documents in one row that do not see each other: the losses and gradients are those of each document computed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onym import GPT, GPTConfig
from onym.gpt import attention
from onym.gpt.documents import (
    Kernel,
    _in_order,
    _visible_blocks,
    causal_in_documents,
    documents_of,
    flex_attend,
    kernel_for,
    positions_of,
    targets_within,
)
from onym.gpt.head_loss import IGNORED_TARGET

END = 0
CONTEXT = 24
CONFIG = GPTConfig(vocab_size=31, context_length=CONTEXT, emb_dim=32, n_heads=2, n_layers=2, qkv_bias=True)

# Lengths of documents, their end-of-text tokens included: some of one token, some longer than a row.
LENGTHS = st.lists(st.one_of(st.just(1), st.integers(1, 8), st.integers(CONTEXT - 1, 2 * CONTEXT + 2)), min_size=1, max_size=30)


def rows_of(lengths: list[int], rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch cut from a stream of documents of those lengths, again and again: inputs and targets, both [rows, CONTEXT]."""
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) <= rows * CONTEXT:
        for length in lengths:
            stream += [*torch.randint(1, CONFIG.vocab_size, (length - 1,), generator=generator).tolist(), END]
    tokens = torch.tensor(stream)
    return tokens[: rows * CONTEXT].view(rows, CONTEXT), tokens[1 : rows * CONTEXT + 1].view(rows, CONTEXT)


def alone(inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What of each document is in each row, as a batch of its own; split with Python's means, not the ones under test."""
    for row, goals in zip(inputs.tolist(), targets.tolist(), strict=True):
        start = 0
        for index, token in enumerate(row):
            if token == END or index == len(row) - 1:
                yield torch.tensor([row[start : index + 1]]), torch.tensor([goals[start : index + 1]])
                start = index + 1


def model(seed: int = 0) -> GPT:
    """With weights large enough that attention looks at something, so that a wrong mask shows."""
    torch.manual_seed(seed)
    made = GPT(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(12) if parameter.dim() > 1 else parameter.normal_(std=0.5)
    return made


def masked_loss(gpt: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = gpt(inputs, targets, documents=documents_of(inputs, END))
    return loss


def gradients(gpt: GPT) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    gpt.zero_grad()
    return found


def computed_alone(gpt: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of all targets that count, from one pass a document, without any mask."""
    total, counted = torch.zeros(()), 0
    for tokens, goals in alone(inputs, targets):
        if number := int((goals != IGNORED_TARGET).sum()):
            total, counted = total + gpt(tokens, goals) * number, counted + number
    return total / counted


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, rows=st.integers(1, 3), inner=st.booleans())
def test_a_batch_has_the_loss_and_the_gradients_of_its_documents_alone(lengths: list[int], rows: int, inner: bool) -> None:
    gpt = model()
    inputs, targets = rows_of(lengths, rows)
    if inner:
        targets = targets_within(inputs, targets, END)
        if not (targets != IGNORED_TARGET).any():
            return
    loss = masked_loss(gpt, inputs, targets)
    loss.backward()
    found = gradients(gpt)
    expected = computed_alone(gpt, inputs, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients(gpt).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("lengths", [[1, 5], [5, 1], [1, 1, 4], [CONTEXT, 3], [CONTEXT + 1, 3], [3 * CONTEXT, 2], [1]])
def test_logits_are_those_of_each_document_alone(lengths: list[int]) -> None:
    """End-of-text first and last in a row, documents of one token, and some longer than a row."""
    gpt = model().eval()
    inputs, targets = rows_of(lengths, 3)
    packed = gpt(inputs, documents=documents_of(inputs, END)).flatten(0, 1)
    expected = torch.cat([gpt(tokens)[0] for tokens, _ in alone(inputs, targets)])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-4)


def test_one_document_in_a_row_is_a_row_without_documents() -> None:
    gpt = model().eval()
    inputs, _ = rows_of([10 * CONTEXT], 3)
    torch.testing.assert_close(gpt(inputs, documents=documents_of(inputs, END)), gpt(inputs), rtol=0, atol=1e-5)


def wrong_end_of_text_begins(tokens: Tensor) -> Tensor:
    return (tokens == END).long().cumsum(1)


def wrong_one_token_late(tokens: Tensor) -> Tensor:
    right = documents_of(tokens, END)
    return torch.cat([right[:, :1], right[:, :-1]], dim=1)


@pytest.mark.parametrize("wrong", [wrong_end_of_text_begins, wrong_one_token_late])
def test_a_boundary_that_is_one_token_off_is_seen(wrong: Callable[[Tensor], Tensor]) -> None:
    """That the logits above tell a right mask from one that is off by one, by far more than their tolerance."""
    gpt = model().eval()
    inputs, targets = rows_of([5, 1, 7], 3)
    expected = torch.cat([gpt(tokens)[0] for tokens, _ in alone(inputs, targets)])
    assert (gpt(inputs, documents=wrong(inputs)).flatten(0, 1) - expected).abs().max() > 0.5
    assert (gpt(inputs).flatten(0, 1) - expected).abs().max() > 0.5, "nor are they those without a mask"
    assert abs(float(gpt(inputs, targets, documents=wrong(inputs)) - computed_alone(gpt, inputs, targets))) > 1e-3


@settings(deadline=None)  # the first call of some operations takes a second on a busy machine
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
def test_numbers_positions_and_the_mask_are_those_of_a_loop(rows: list[list[int]]) -> None:
    documents = documents_of(torch.tensor(rows), END)
    mask, positions = causal_in_documents(documents), positions_of(documents)
    assert mask.shape == (len(rows), 1, 9, 9)
    for row, tokens in enumerate(rows):
        number, position = 0, 0
        numbers: list[int] = []
        for index, token in enumerate(tokens):
            numbers.append(number)
            assert int(positions[row, index]) == position
            number, position = (number + 1, 0) if token == END else (number, position + 1)
            assert mask[row, 0, index].tolist() == [k <= index and numbers[k] == numbers[index] for k in range(index + 1)] + (
                [False] * (8 - index)
            )
        assert documents[row].tolist() == numbers


def test_targets_of_end_of_text_tokens_do_not_count() -> None:
    tokens, targets = torch.tensor([[4, END, 5, END]]), torch.tensor([[END, 5, END, IGNORED_TARGET]])
    assert targets_within(tokens, targets, END).tolist() == [[END, IGNORED_TARGET, END, IGNORED_TARGET]]


def test_a_cache_holds_one_document() -> None:
    gpt = model()
    with pytest.raises(ValueError, match="not both"):
        gpt(torch.ones(1, 4, dtype=torch.long), cache=gpt.new_cache(), documents=torch.zeros(1, 4, dtype=torch.long))


def test_recomputed_activations_give_the_same_bits() -> None:
    inputs, targets = rows_of([5, 1, 9], 2)
    found = []
    for recompute in (False, True):
        gpt = model()
        gpt.recompute_activations = recompute
        masked_loss(gpt, inputs, targets).backward()
        found.append(gradients(gpt))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_under_autocast_it_is_near() -> None:
    gpt = model()
    inputs, targets = rows_of([5, 1, 9], 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_loss(gpt, inputs, targets)
    torch.testing.assert_close(loss, computed_alone(gpt, inputs, targets), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("kernel", "backend", "parts", "recompute"),
    [
        ("squares", "inductor", "whole", False),
        ("sdpa", "inductor", "whole", False),
        ("sdpa", "aot_eager", "whole", True),
        ("flex", "aot_eager", "whole", False),
        ("flex", "aot_eager", "whole", True),
        ("flex", "aot_eager", "blocks", False),
        ("flex", "aot_eager", "blocks", True),
    ],
)
def test_compiled_it_is_the_same_in_one_graph_for_all_batches(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, backend: str, parts: str, recompute: bool
) -> None:
    """Each kernel as a whole model or a block compiles it: no break, and no further graph for batches with other boundaries.

    flex_attention refuses gradients on a CPU, because Inductor has no kernel for them there; torch's dense form of its backward
    pass is computed here, without that check.
    """
    from torch.nn.attention import flex_attention

    gpt = model()
    gpt.recompute_activations = recompute
    batches = [rows_of(lengths, 3, seed) for seed, lengths in enumerate([[5, 1, 9], [1], [2, 3], [100], [1, CONTEXT]])]
    expected = []
    for inputs, targets in batches:
        loss = masked_loss(gpt, inputs, targets)
        loss.backward()
        expected.append((loss.detach(), gradients(gpt)))

    monkeypatch.setattr(attention, "kernel_for", lambda *_, **__: kernel)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for module in [gpt] if parts == "whole" else gpt.trf_blocks:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
    for (inputs, targets), (loss, wanted) in zip(batches, expected, strict=True):
        found = masked_loss(gpt, inputs, targets)
        found.backward()
        torch.testing.assert_close(found, loss, rtol=0, atol=1e-5)
        for name, gradient in gradients(gpt).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("time", [48, 128, 300])
def test_flex_attention_agrees_with_the_mask(time: int) -> None:
    """Eager, on the CPU: rows shorter than a block of its mask, of one block, and of two and a part."""
    documents = (torch.rand(2, time) < 0.03).cumsum(1)
    q, k, v = torch.randn(3, 2, 3, time, 16).unbind(0)
    mask = causal_in_documents(documents)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(flex_attend(q, k, v, documents), expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(time=st.integers(1, 4 * 128 + 3), rate=st.sampled_from([0, 0.002, 0.01, 0.2, 1]), seed=st.integers(0, 9))
def test_blocks_are_those_that_torch_finds_by_looking_at_each_pair(time: int, rate: float, seed: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = (torch.rand(2, time, generator=torch.Generator().manual_seed(seed)) < rate).cumsum(1)
    mask = causal_in_documents(documents)
    theirs = create_block_mask(lambda b, h, q, k: mask[b, 0, q, k], 2, None, time, time, device="cpu")
    partial, full = _visible_blocks(documents)
    for blocks, counts, indices in (
        (partial, theirs.kv_num_blocks, theirs.kv_indices),
        (full, theirs.full_kv_num_blocks, theirs.full_kv_indices),
    ):
        assert counts is not None
        ours = _in_order(blocks)
        assert torch.equal(ours[0], counts)
        assert torch.equal(ours[1], indices)
        assert ours[0].dtype == ours[1].dtype == torch.int32


@pytest.mark.parametrize(
    ("device", "time", "head_dim", "dropout", "compiling", "documents", "kernel"),
    [
        ("cpu", 256, 32, 0.1, True, True, "squares"),
        ("cpu", 256, 32, 0.0, True, False, "squares"),
        ("cpu", 257, 32, 0.0, True, True, "sdpa"),
        ("cpu", 256, 32, 0.0, False, True, "sdpa"),
        ("cuda", 256, 32, 0.0, True, True, "flex"),
        ("cuda", 1024, 64, 0.0, True, False, "sdpa"),
        ("cuda", 1024, 64, 0.1, True, True, "sdpa"),
        ("cuda", 1024, 8, 0.0, True, True, "sdpa"),
        ("cuda", 1024, 64, 0.0, False, True, "sdpa"),
        ("mps", 1024, 64, 0.0, True, True, "sdpa"),
    ],
)
def test_flex_attention_is_for_compiled_cuda_without_dropout(
    device: str, time: int, head_dim: int, dropout: float, compiling: bool, documents: bool, kernel: str
) -> None:
    assert kernel_for(device, time, head_dim, dropout, compiling=compiling, documents=documents) == kernel


def test_dropout_works_with_a_mask() -> None:
    gpt = GPT(GPTConfig(**{**CONFIG.to_dict(), "drop_rate": 0.2})).train()
    inputs, targets = rows_of([5, 1, 9], 2)
    losses = [float(masked_loss(gpt, inputs, targets).detach()) for _ in range(2)]
    assert losses[0] != losses[1]
    assert all(0 < loss < 10 for loss in losses)
