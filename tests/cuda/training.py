"""Steps of training on a device, for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from onym import GPT
from onym.data.batches import Batch
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.conftest import TINY

SEQUENCES = 4


def batch(number: int) -> Batch:
    """In main memory."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, TINY.vocab_size, (SEQUENCES, TINY.context_length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def on(device: torch.device, number: int) -> Batch:
    """The same on a device."""
    inputs, targets = batch(number)
    return inputs.to(device), targets.to(device)


def new_stepper(
    device: torch.device, dtype: torch.dtype = torch.float32, *, micro_batch: int = SEQUENCES, how: Any = "off", **options: Any
) -> Stepper:
    """Before its first step, with the same weights on every device."""
    torch.manual_seed(0)
    stepper = Stepper(GPT(TINY).to(device), OptimizationOptions(**options), Compute(device, dtype))
    compilation, _ = prepare(stepper, on(device, 0), [micro_batch], how)
    assert compilation.how == how, compilation.reason
    return stepper


def as_on_cuda(stepper: Stepper) -> Stepper:
    """Let a stepper of a CPU ask its device whether a step is bad, without waiting for the answer, as it does on a GPU."""
    if stepper.compute.device.type == "cpu":
        there: Any = SimpleNamespace(
            device=SimpleNamespace(type="cuda"), dtype=stepper.compute.dtype, autocast=stepper.compute.autocast
        )
        stepper.compute = there
    return stepper


def tensors_of(stepper: Stepper) -> dict[str, Tensor]:
    """Copies of all that a step changes: weights, moments, counters of steps, the average."""
    found = dict(stepper.model.state_dict())
    for number, optimizer in enumerate(stepper.optimizers):
        for place, state in enumerate(optimizer.state.values()):
            found |= {f"{number}.{place}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    if stepper.average is not None:
        found |= {f"average.{name}": value for name, value in stepper.average.model.state_dict().items()}
    return {name: value.detach().clone() for name, value in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]
