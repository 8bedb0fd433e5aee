"""The measure itself: each kind of waiting is noticed, and what does not wait is not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.cuda.waits import WAITING, fails, no_waits, waits


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_what_waits_is_noticed(device: torch.device, wait: Callable[[torch.Tensor], object]) -> None:
    x = torch.rand(8, device=device) + 0.5
    wait(x)
    fails(wait, x)


def test_what_does_not_wait_is_not_taken_for_it(device: torch.device) -> None:
    x = torch.rand(8, device=device, requires_grad=True)

    def work() -> None:
        y = torch.where(x > 0.5, x, 0.0).masked_fill(x < 0.2, 1.0)
        (y.sum() / len(y)).backward()
        x.detach()[torch.arange(4, device=device)].clamp(min=0)
        torch.zeros(3, device=device).copy_(torch.ones(3), non_blocking=True)

    work()
    with no_waits(device):
        work()
    with waits(device) as found:
        work()
    assert found == []


def test_they_are_counted(device: torch.device) -> None:
    x = torch.rand(8, device=device)
    with waits(device) as found:
        for _ in range(3):
            float(x.sum())
    assert len(found) == 3
