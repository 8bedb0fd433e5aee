"""Promise 1 as a property: whatever is wrapped around whichever part of whatever model, its state is the plain model's.

A bounded sample runs with the other tests; ``make prove`` runs thousands.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onym
from onym.names.plain_view import plain_view
from onym.state.dtensor import full_tensor
from onym.state.optimizer import load_optimizer_state, optimizer_state
from tests.names.trees import LEAVES, REPLICATED, SHARDABLE, SHARDED, WIDTH, Plan, Wraps, build, equal, nestings, plans, ties

pytestmark = pytest.mark.filterwarnings("ignore")
slow_is_fine = settings(deadline=None, suppress_health_check=list(HealthCheck))
Ties = tuple[tuple[int, int], ...]


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def state(model: nn.Module) -> dict[str, Any]:
    """Ours, with FSDP's pieces put together."""
    return {name: full_tensor(value) if isinstance(value, Tensor) else value for name, value in onym.state_dict(model).items()}


def torch_state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(dict(model.state_dict()))


def check(plan: Plan, wraps: Wraps, ties: Ties) -> None:
    plain, other = build(plan, ties=ties), build(plan, ties=ties, seed=1)
    wrapped = build(plan, wraps, ties)
    raw_before = [name for name, _ in wrapped.named_modules()]
    parameters = [id(parameter) for parameter in wrapped.parameters()]

    assert equal(state(wrapped), torch_state(plain)), "names, order and values are the plain model's"
    named = [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in plain_view(wrapped).named_parameters(remove_duplicate=False)] == named

    given_state = torch_state(other)
    before = dict(given_state)
    report = onym.load_state_dict(wrapped, given_state)
    assert report.loaded == list(torch_state(plain))
    assert all(given_state[name] is value for name, value in before.items()), "the caller's dict is not touched"
    assert len(given_state) == len(before)
    assert equal(state(wrapped), torch_state(other)), "plain -> wrapped"
    assert [id(parameter) for parameter in wrapped.parameters()] == parameters, "the optimizer keeps its parameters"

    back = build(plan, ties=ties, seed=2)
    back.load_state_dict(state(wrapped), strict=True)
    assert equal(torch_state(back), torch_state(other)), "wrapped -> plain, with nothing of ours"
    assert [name for name, _ in wrapped.named_modules()] == raw_before, "looking changed nothing"

    x = torch.randn(5, WIDTH)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(back.eval()(x), wrapped.eval()(x)), "the same outputs"


@slow_is_fine
@given(plans(list(LEAVES), shared=True), nestings(REPLICATED), ties)
def test_state_is_the_plain_models_under_any_wrappers(plan: Plan, wraps: Wraps, ties: Ties) -> None:
    check(plan, wraps, ties)


@slow_is_fine
@given(plans(SHARDABLE, shared=False), nestings(SHARDED))
def test_state_is_the_plain_models_when_it_is_sharded(plan: Plan, wraps: Wraps) -> None:
    check(plan, wraps, ())


TRAINED = [name for name in LEAVES if name != "batch norm"]  # recomputing (checkpointing) counts its batches twice
INSIDE = [name for name in REPLICATED if name != "distributed"]  # one inside another cannot be trained in torch


@slow_is_fine
@given(plans(TRAINED, shared=True), nestings(INSIDE), nestings(INSIDE) | st.none(), ties, st.booleans(), st.booleans())
def test_a_step_after_a_restore_equals_one_without(
    plan: Plan, first: Wraps, other: Wraps | None, ties: Ties, distributed: bool, regrouped: bool
) -> None:
    """To the last bit under the same wrappers; others may add numbers up in another order (offloading does)."""
    second = other or first

    def set_up(wraps: Wraps, seed: int, regroup: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build(plan, wraps, ties, seed)
        if distributed:
            model = nn.parallel.DistributedDataParallel(model)
        parameters = list(model.parameters())
        groups = [{"params": [parameter]} for parameter in reversed(parameters)] if regroup else [{"params": parameters}]
        if second == first:
            return model, torch.optim.AdamW(groups, lr=0.01)
        return model, torch.optim.SGD(groups, lr=0.01, momentum=0.9)  # AdamW makes much of the sign of nearly nothing

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(number))
        model(x).tanh().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return dict(sorted(optimizer_state(model, optimizer)[0].items()))

    with torch.compiler.set_stance("force_eager"):
        model, optimizer = set_up(first, 0, False)
        for number in range(2):
            step(model, optimizer, number)
        kept = copy.deepcopy(state(model))
        tensors, description = copy.deepcopy(optimizer_state(model, optimizer))
        again, restored = set_up(second, 1, regrouped)
        onym.load_state_dict(again, kept)
        load_optimizer_state(again, restored, tensors, description)
        assert equal(state(again), state(model))
        assert equal(moments(again, restored), moments(model, optimizer))
        for number in range(2, 4):
            step(model, optimizer, number)
            step(again, restored, number)
        tolerance = 0.0 if second == first else 1e-4
        assert equal(state(again), state(model), tolerance)
        assert equal(moments(again, restored), moments(model, optimizer), tolerance)
