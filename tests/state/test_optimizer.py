"""Optimizer state by parameter name, and random number generators."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from origo.errors import CheckpointError
from origo.state.optimizer import load_optimizer_state, optimizer_state
from origo.state.rng import load_rng_state, rng_state

Make = Callable[[list[Any]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_json(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_goes_on_bit_for_bit(make: Make) -> None:
    straight = network()
    optimizer = make(list(straight.parameters()))
    train(straight, optimizer, 10)

    first = network()
    before = make(list(first.parameters()))
    train(first, before, 4)
    tensors, values = through_json(*optimizer_state(torch.compile(first), before))  # type: ignore[arg-type]
    second = network()
    second.load_state_dict(first.state_dict())
    after = make(list(second.parameters()))
    load_optimizer_state(second, after, tensors, values)
    train(second, after, 6, start=4)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_state_is_named_by_parameter_whatever_wraps_the_model() -> None:
    model = network()
    optimizer = MAKERS["adamw"](list(model.parameters()))
    train(model, optimizer, 1)
    for wrapped in (model, torch.compile(model), nn.DataParallel(model)):
        tensors, values = optimizer_state(wrapped, optimizer)  # type: ignore[arg-type]
        assert "state.exp_avg.0.weight" in tensors
        assert set(values["groups"][0]["params"]) == set(model.state_dict())


def test_parameters_in_another_order_get_their_own_state() -> None:
    model = network()
    optimizer = MAKERS["adamw"](list(model.parameters()))
    train(model, optimizer, 3)
    tensors, values = through_json(*optimizer_state(model, optimizer))
    other = torch.optim.AdamW([{"params": [p]} for p in reversed(list(model.parameters()))], lr=9.0)
    load_optimizer_state(model, other, tensors, values)
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    assert {group["lr"] for group in other.param_groups} == {0.01}


def test_other_parameters_and_mixed_groups_are_refused_unchanged() -> None:
    model = network()
    parameters = list(model.parameters())
    split = torch.optim.AdamW([{"params": parameters[:1], "weight_decay": 0.5}, {"params": parameters[1:]}])
    train(model, split, 1)
    tensors, values = optimizer_state(model, split)
    joined = torch.optim.AdamW(parameters)
    with pytest.raises(CheckpointError, match="unequal hyperparameters"):
        load_optimizer_state(model, joined, tensors, values)
    fewer = torch.optim.AdamW(parameters[:2])
    with pytest.raises(CheckpointError, match="2 stored ones it does not have"):
        load_optimizer_state(model, fewer, tensors, values)
    assert not joined.state
    assert not fewer.state
    with pytest.raises(CheckpointError, match="not the model's"):
        optimizer_state(network(), split)


def test_reading_state_never_steps() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, _ = optimizer_state(model, MAKERS["adamw"](list(model.parameters())))
    assert tensors == {}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_random_numbers_go_on_where_they_were() -> None:
    tensors, values = through_json(*rng_state())
    draw = lambda: (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())  # noqa: E731
    expected = draw()
    draw()
    load_rng_state(tensors, values)
    assert draw() == expected
