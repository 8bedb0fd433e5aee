"""A step of training asks the GPU nothing: what is bad is decided there, and batches come while it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from onym import GPT
from onym.data.prefetch import Prefetcher
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.conftest import TINY
from tests.cuda.training import as_on_cuda, batch, changed, new_stepper, on, tensors_of
from tests.cuda.waits import no_waits

KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "dtype": torch.float32},
    "Muon, bf16": {"optimizer": "muon", "dtype": torch.bfloat16},
    "AdamW, fp16": {"optimizer": "adamw", "dtype": torch.float16},
    "Muon, fp16": {"optimizer": "muon", "dtype": torch.float16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_step_waits_for_nothing(device: torch.device, kind: str) -> None:
    """With all that can be in one: batches read ahead, micro-batches, clipping, the guard, an average."""
    stepper = as_on_cuda(new_stepper(device, micro_batch=2, ema=0.9, **KINDS[kind]))
    batches = Prefetcher(batch, device)
    for number in range(2):
        stepper(batches.take(number, number + 1), 1e-3, number)
    before = tensors_of(stepper)
    with no_waits(device):
        results = [stepper(batches.take(number, number + 1), 1e-3, number) for number in (2, 3)]
    batches.close()
    assert not any(result.bad for result in results)
    assert {"tok_emb.weight", "average.tok_emb.weight"} <= set(changed(before, tensors_of(stepper)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_number_changes_nothing(device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, the counters of steps and the average stay as they are, to the bit; nothing waits to know it."""
    stepper = as_on_cuda(new_stepper(device, ema=0.9, **KINDS[kind]))
    for number in range(2):
        stepper(on(device, number), 1e-3, number)
    before, data, loss = tensors_of(stepper), on(device, 2), stepper._loss
    assert any(name.endswith(".step") for name in before)
    monkeypatch.setattr(stepper, "_loss", lambda part: loss(part) * torch.nan)
    with no_waits(device):
        result = stepper(data, 1e-3, 2)
    assert result.bad
    assert int(stepper.guard.streak) == 1
    assert changed(before, tensors_of(stepper)) == []
    monkeypatch.undo()
    assert not stepper(data, 1e-3, 3).bad
    assert "tok_emb.weight" in changed(before, tensors_of(stepper))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_weight_that_is_not_finite_is_found(device: torch.device, value: float) -> None:
    stepper = new_stepper(device, optimizer="adamw")
    assert stepper.finite
    with torch.no_grad():
        stepper.model.trf_blocks[1].ff.layers[0].weight[3, 5] = value
    assert not stepper.finite


def test_a_batch_is_the_one_that_was_asked_for(device: torch.device) -> None:
    """Also where one that was read ahead is not wanted after all, while its copy may be under way."""
    batches = Prefetcher(batch, device)
    for number, following in ((0, 1), (1, 2), (7, 8), (8, 9), (3, 4)):
        found, expected = batches.take(number, following), batch(number)
        assert found[0].device.type == device.type
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    ahead = batches._ahead
    assert ahead is not None
    assert [each.is_pinned() for each in ahead[1].result()] == [device.type == "cuda"] * 2
    batches.close()


def test_the_preparation_draws_nothing_from_the_devices_generator(device: torch.device) -> None:
    """Dropout draws there."""
    config = dataclasses.replace(TINY, drop_rate=0.2)
    stepper = Stepper(GPT(config).to(device), OptimizationOptions(), Compute(device, torch.float32))
    torch.manual_seed(5)
    expected = torch.rand(9, device=device)
    torch.manual_seed(5)
    prepare(stepper, on(device, 0), [2], "off")
    assert torch.equal(torch.rand(9, device=device), expected)
