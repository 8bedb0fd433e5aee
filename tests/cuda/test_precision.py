"""Which device computes, in which dtype, and what is rounded there and what is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from onym import GPT
from onym.errors import ConfigError
from onym.gpt import head_loss as chunked
from onym.gpt.head_loss import head_loss
from onym.train.precision import Compute, choose_compute
from tests.conftest import TINY
from tests.cuda.training import as_on_cuda, batch, changed, new_stepper, on, tensors_of


@pytest.mark.cuda
def test_auto_is_the_gpu_in_the_dtype_that_it_is_fast_in(cuda: torch.device) -> None:
    compute = choose_compute("auto", "auto")
    assert compute.device.type == "cuda"
    newer = torch.cuda.get_device_capability(cuda) >= (8, 0)
    assert compute.precision == ("bf16" if newer else "fp32")
    assert str(compute).startswith(torch.cuda.get_device_name(cuda))
    assert choose_compute("cuda:0", "fp16") == Compute(torch.device("cuda", 0), torch.float16)


def test_a_gpu_that_is_not_there_is_one_sentence(device: torch.device) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_compute("cuda:99", "auto")
    assert str(refused.value).startswith("There is no device 'cuda:99' here (")
    assert str(refused.value).endswith("): take another --device.")
    assert len(str(refused.value).splitlines()) == 1
    assert choose_compute(device.type, "auto").device.type == device.type, "and what is there can be used after it"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_are_narrow_and_the_loss_and_gradients_are_near(device: torch.device, precision: str) -> None:
    torch.manual_seed(0)
    model = GPT(TINY).to(device)
    compute = choose_compute(device.type, precision)
    inputs, targets = on(device, 0)
    expected = model(inputs, targets)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    with compute.autocast():
        assert model(inputs).dtype == compute.dtype
        loss = model(inputs, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.005, atol=0)
    found = torch.autograd.grad(loss * 1024, list(model.parameters()))  # so that fp16 loses nothing of what is small
    assert {each.dtype for each in found} == {torch.float32}
    for one, other in zip(found, wanted, strict=True):
        assert (one / 1024 - other).norm() <= 0.1 * other.norm()


def test_an_infinite_gradient_skips_the_step_of_fp16_and_halves_the_scale(device: torch.device) -> None:
    stepper = as_on_cuda(new_stepper(device, torch.float16, optimizer="adamw"))
    for number in range(2):
        stepper(on(device, number), 1e-3, number)
    before, scale = tensors_of(stepper), stepper._scaler.get_scale()
    spoils = stepper.model.final_norm.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    result = stepper(on(device, 2), 1e-3, 2)
    spoils.remove()
    assert result.bad
    assert result.loss.isfinite()
    assert changed(before, tensors_of(stepper)) == []
    assert stepper._scaler.get_scale() == scale / 2
    assert not stepper(on(device, 2), 1e-3, 2).bad
    assert changed(before, tensors_of(stepper))


def test_the_head_in_chunks_loses_nothing_in_fp16(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many tokens that the gradient of each, before it is scaled up, is below what fp16 holds."""
    tokens, width, vocabulary, scale = 16_384, 8, 512, 65_536.0
    monkeypatch.setitem(chunked._CHUNK_BYTES, "cpu", 4096 * vocabulary * 2)
    monkeypatch.setattr(chunked, "_CHUNK_BYTES_ON_GPUS", 4096 * vocabulary * 2)
    torch.manual_seed(0)
    x = torch.randn(tokens, width).half().to(device).requires_grad_()
    weight = (0.3 * torch.randn(vocabulary, width)).half().float().to(device).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,)).to(device)
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    truth = F.cross_entropy(F.linear(*exact), targets)
    truth.backward()
    loss = head_loss(x, weight, targets, vocabulary)
    (loss * scale).backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    for found, wanted in zip((x, weight), exact, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert (found.grad.double() / scale - wanted.grad).norm() < 2e-3 * wanted.grad.norm()


def test_fp32_is_fp32_and_not_tf32(device: torch.device) -> None:
    """TF32 would be an error of 3e-4; it is torch's setting, which training leaves as it is."""
    assert torch.get_float32_matmul_precision() == "highest"
    compute = choose_compute(device.type, "fp32")
    compute.set_deterministic(False)
    stepper = new_stepper(device, optimizer="muon")
    stepper(on(device, 0), 1e-3, 0)
    one, other = torch.randn(2, 512, 512, device=device)
    with compute.autocast():
        product = one @ other
    exact = one.double() @ other.double()
    assert (product - exact).norm() < 1e-5 * exact.norm()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_learns_what_a_cpu_learns(cuda: torch.device, optimizer: str) -> None:
    losses = {}
    for device in (torch.device("cpu"), cuda):
        stepper = new_stepper(device, optimizer=optimizer)
        losses[device.type] = [float(stepper(on(device, 0), 1e-2, number).loss) for number in range(8)]
    assert losses["cpu"][-1] < losses["cpu"][0] - 0.3
    assert losses[cuda.type] == pytest.approx(losses["cpu"], abs=0.02 if optimizer == "muon" else 5e-3)
    assert batch(0)[0].device.type == "cpu"
