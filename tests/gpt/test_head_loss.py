"""The head and the loss in chunks: the plain formula's values and gradients, without the plain formula's logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onym import GPT, GPTConfig
from onym.gpt import head_loss as subject
from onym.gpt.head_loss import IGNORED_TARGET, chunk_rows, head_loss

TOKENS, WIDTH, VOCABULARY, PADDED = 24, 8, 50, 64


@pytest.fixture(autouse=True)
def _chunks_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subject._CHUNK_BYTES, "cpu", 8 * PADDED * 8)  # eight rows in fp64
    monkeypatch.setattr(subject, "_BLOCK_ROWS", 16)
    monkeypatch.setitem(subject._EAGER_ROWS, "cpu", 3)


def inputs(dtype: torch.dtype = torch.float64, ignored: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(
        VOCABULARY, WIDTH, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[torch.randperm(TOKENS)[:ignored]] = IGNORED_TARGET
    return x, weight, targets


def plain(x: Tensor, weight: Tensor, targets: Tensor, _: int = PADDED) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    return F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), targets, ignore_index=IGNORED_TARGET)


def test_gradients_are_those_of_the_function_itself_in_fp64() -> None:
    x, weight, targets = inputs()
    assert chunk_rows(TOKENS, PADDED, x.dtype, x.device) == 8, "several chunks"
    assert torch.autograd.gradcheck(lambda x, w: head_loss(x, w, targets, PADDED) * 3, (x, weight))


@pytest.mark.parametrize("padded_to", [VOCABULARY, PADDED])
@pytest.mark.parametrize("ignored", [0, 5, TOKENS - 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_are_the_plain_formulas(padded_to: int, ignored: int, compiled: bool) -> None:
    results = []
    chunked: Callable[..., Tensor] = torch.compile(head_loss, dynamic=False) if compiled else head_loss
    for function in (plain, chunked):
        x, weight, targets = inputs(ignored=ignored)
        loss = function(x, weight, targets, padded_to)
        (loss * 0.5).backward()
        results.append((loss, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_in_bf16_it_is_no_further_from_the_truth_than_the_plain_formula() -> None:
    exact, rough = inputs(), inputs(torch.bfloat16)
    truth = (plain(*exact), *torch.autograd.grad(plain(*exact), exact[:2]))

    def error(function: Callable[..., Tensor]) -> list[float]:
        loss = function(*rough, PADDED)
        found = (loss, *torch.autograd.grad(loss, rough[:2]))
        assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.float32]
        return [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    for ours, theirs in zip(error(head_loss), error(plain), strict=True):
        assert ours < 1.5 * theirs + 1e-3


def test_in_fp16_gradients_do_not_depend_on_how_many_tokens_share_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probability divided by 131,072 tokens is next to nothing in fp16, before the gradient scaler's factor is there."""
    monkeypatch.setitem(subject._CHUNK_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(subject._EAGER_ROWS, "cpu", 1 << 13)
    torch.manual_seed(0)
    tokens, scale = 131_072, 65536.0
    exact = (torch.randn(tokens, WIDTH, dtype=torch.float64), torch.randn(VOCABULARY, WIDTH, dtype=torch.float64))
    targets = torch.randint(VOCABULARY, (tokens,))

    def gradients(x: Tensor, weight: Tensor, loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(loss(x, weight, targets, PADDED) * scale, (x, weight))

    truth = gradients(exact[0].clone(), exact[1].clone(), plain)
    found = gradients(exact[0].half(), exact[1].float(), head_loss)
    assert [each.dtype for each in found] == [torch.float16, torch.float32]
    for ours, right in zip(found, truth, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_no_target_counts_gradients_are_zero_in_every_dtype(dtype: torch.dtype) -> None:
    x, weight, targets = inputs(dtype, ignored=TOKENS)
    for gradient in torch.autograd.grad(head_loss(x, weight, targets, PADDED), (x, weight)):
        assert not gradient.any()


def test_without_gradients_it_is_the_same_loss() -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets, PADDED), plain(x, weight, targets))


def test_where_no_target_counts_the_mean_is_no_number_and_the_gradient_zero() -> None:
    x, weight, targets = inputs(ignored=TOKENS)
    loss = head_loss(x, weight, targets, PADDED)
    loss.backward()
    assert loss.isnan()
    assert plain(x, weight, targets).isnan()


@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(2048, 50304), (2048, 1024), (1, 10**9), (997, 50304), (24, 64), (6 * 1024, 50304)]
)
def test_chunks_cover_all_tokens_in_bounded_memory(tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subject._CHUNK_BYTES, "cpu", 64 << 20)
    rows = chunk_rows(tokens, vocabulary, torch.bfloat16, torch.device("cpu"))
    assert 1 <= rows <= tokens
    assert rows == 1 or rows * vocabulary * 2 <= 64 << 20
    assert rows == tokens or rows == 1 or 4 * rows * vocabulary * 2 >= 64 << 20, "not many more chunks than needed"


@pytest.mark.parametrize("tie", [False, True])
def test_a_gpt_with_many_tokens_computes_as_with_few(tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for bytes_at_once in (1 << 30, 1 << 12):
        monkeypatch.setitem(subject._CHUNK_BYTES, "cpu", bytes_at_once)
        torch.manual_seed(1)
        model = GPT(GPTConfig(vocab_size=101, context_length=16, emb_dim=32, n_heads=2, n_layers=1, tie_embeddings=tie))
        tokens = torch.randint(101, (4, 17))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_frozen_weight_gets_no_gradient_and_changes_nothing_else() -> None:
    x, weight, targets = inputs(torch.float32)
    head_loss(x, weight, targets, PADDED).backward()
    whole = x.grad
    x.grad = None
    head_loss(x, weight.detach(), targets, PADDED).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, whole)


@pytest.mark.parametrize("of_weight", [True, False])
def test_torch_finds_the_operation_well_formed(of_weight: bool) -> None:
    x, weight, targets = inputs(torch.float32)
    torch.library.opcheck(
        subject._loss_and_gradients,
        (x, weight, targets, 8, PADDED, of_weight, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


_PEAK = """
import pathlib, sys, torch
from torch.nn import functional as F
from onym.gpt.head_loss import head_loss
x = torch.randn(4096, 64, requires_grad=True); w = torch.randn(32768, 64, requires_grad=True); t = torch.randint(32768, (4096,))
def status(field):  # ru_maxrss would begin with that of the process that started this one
    return int(pathlib.Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
before = status("VmRSS")
loss = head_loss(x, w, t, 32768) if sys.argv[1] == "chunked" else F.cross_entropy(F.linear(x, w), t)
loss.backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_logits_never_exist_as_a_whole() -> None:
    def peak_bytes(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _PEAK, how], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    whole = 4096 * 32768 * 4
    chunked, plain = peak_bytes("chunked"), peak_bytes("plain")
    assert chunked < whole < plain
    assert plain - chunked > whole  # the libraries that either loads on the way differ by machine; this does not
