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

from onym.errors import CheckpointError, ConfigError
from onym.state.optimizer import load_optimizer_state, optimizer_state
from onym.state.rng import load_rng_state, rng_state

Make = Callable[[list[Any]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nested": lambda p: Nested(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}


class Nested(torch.optim.Optimizer):
    """Keeps dicts and lists for each parameter, as second-order methods do, in fp32 whatever the parameter is in."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"rate": (0.01, 0.9)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, blocks={"left": torch.zeros(parameter.shape), 7: [torch.zeros(2), None]}, mode="fast")
                state["count"] += 1
                rate, momentum = group["rate"]
                state["blocks"]["left"].mul_(momentum).add_(parameter.grad.float())
                state["blocks"][7][0] += state["count"]
                parameter.sub_((rate * state["blocks"]["left"]).to(parameter.dtype))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(x).square().mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)  # type: ignore[arg-type]


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
    with pytest.raises(CheckpointError, match=r"unequal weight_decay \(0.01, 0.5\)"):
        load_optimizer_state(model, joined, tensors, values)
    fewer = torch.optim.AdamW(parameters[:2])
    with pytest.raises(
        CheckpointError, match=r"2 of the stored parameters are in the model but not optimised \(frozen\?\): 2.weight, 2.bias"
    ):
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


def test_groups_are_split_joined_and_reordered_by_name() -> None:
    model = network()
    first, second, third, fourth = model.parameters()
    optimizer = torch.optim.AdamW(
        [{"params": [first, third], "lr": 0.1}, {"params": [second, fourth], "lr": 0.2, "weight_decay": 0.0}], betas=(0.8, 0.9)
    )
    train(model, optimizer, 2)
    stored = through_json(*optimizer_state(model, optimizer))

    regrouped = torch.optim.AdamW([{"params": [fourth]}, {"params": [third]}, {"params": [second]}, {"params": [first]}])
    report = load_optimizer_state(torch.compile(model), regrouped, *stored)  # type: ignore[arg-type]
    assert sorted(report.restored) == sorted(model.state_dict())
    assert [group["lr"] for group in regrouped.param_groups] == [0.2, 0.1, 0.2, 0.1]
    assert [group["weight_decay"] for group in regrouped.param_groups] == [0.0, 0.01, 0.0, 0.01]
    assert all(group["betas"] == (0.8, 0.9) for group in regrouped.param_groups)
    for parameter in model.parameters():
        assert torch.equal(regrouped.state[parameter]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])

    joined = torch.optim.AdamW(model.parameters(), lr=7.0)
    with pytest.raises(CheckpointError, match=r"unequal lr, weight_decay .*accept=\[\"hyperparameters\"\]"):
        load_optimizer_state(model, joined, *stored)
    report = load_optimizer_state(model, joined, *stored, accept=["hyperparameters"])
    assert report.kept == ["group 0: lr", "group 0: weight_decay"]
    assert joined.param_groups[0]["lr"] == 7.0
    assert joined.param_groups[0]["betas"] == (0.8, 0.9), "what they had in common is restored"
    assert torch.equal(joined.state[first]["exp_avg"], optimizer.state[first]["exp_avg"])


def test_parameters_frozen_or_added_since_are_told_and_accepted() -> None:
    model = network()
    optimizer = MAKERS["adamw"](list(model.parameters()))
    train(model, optimizer, 2)
    stored = through_json(*optimizer_state(model, optimizer))

    grown = nn.Sequential(*model, nn.Linear(2, 2))
    more = MAKERS["adamw"](list(grown[2].parameters()) + list(grown[3].parameters()))
    with pytest.raises(CheckpointError, match=r"no stored state: 3\.weight, 3\.bias") as caught:
        load_optimizer_state(grown, more, *stored)
    assert "(frozen?): 0.weight, 0.bias" in str(caught.value), "one sentence a difference, all at once"
    with pytest.raises(CheckpointError, match="frozen"):
        load_optimizer_state(grown, more, *stored, accept=["added"])
    assert not more.state
    report = load_optimizer_state(grown, more, *stored, accept=["added", "removed"])
    assert (report.fresh, report.dropped) == (["3.weight", "3.bias"], ["0.weight", "0.bias"])
    assert set(more.state) == set(grown[2].parameters())
    with pytest.raises(ConfigError, match="not 'everything'"):
        load_optimizer_state(grown, more, *stored, accept=["everything"])  # type: ignore[list-item]


def test_two_optimizers_side_by_side_are_one_state() -> None:
    muon = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    model = network()
    matrices, rest = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() < 2]
    both = {"muon": muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(rest, lr=0.01)}
    for optimizer in both.values():
        train(model, optimizer, 2)
    tensors, description = through_json(*optimizer_state(model, both))
    assert {"state.momentum_buffer.0.weight", "state.exp_avg.0.bias"} <= set(tensors)

    again = [torch.optim.AdamW(reversed(rest), lr=9.0), muon(matrices, lr=9.0)]  # a list for a dict, in another order
    load_optimizer_state(model, again, tensors, description)
    assert [optimizer.param_groups[0]["lr"] for optimizer in again] == [0.01, 0.02]
    assert torch.equal(again[1].state[matrices[0]]["momentum_buffer"], tensors["state.momentum_buffer.0.weight"])

    one = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="stored by Muon, this is AdamW"):
        load_optimizer_state(model, one, tensors, description)
    with pytest.raises(CheckpointError, match=r"0\.weight is optimised twice"):
        optimizer_state(model, [one, *both.values()])


def test_state_of_another_shape_or_order_is_refused() -> None:
    model = network()
    optimizer = MAKERS["lbfgs"](list(model.parameters()))
    train(model, optimizer, 1)
    stored = through_json(*optimizer_state(model, optimizer))
    with pytest.raises(CheckpointError, match="in the order of its parameters"):
        load_optimizer_state(model, MAKERS["lbfgs"](list(model.parameters())[::-1]), *stored)
    wider = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(CheckpointError, match=r"2\.weight is for the shape \[2, 8\], the parameter has \[3, 8\]"):
        load_optimizer_state(wider, MAKERS["lbfgs"](list(wider.parameters())), *stored)
    with pytest.raises(CheckpointError, match="fresh optimizer"):
        load_optimizer_state(model, optimizer, {}, {})


def test_state_keeps_its_dtype_and_is_no_second_name_for_the_stored_tensors() -> None:
    model = network().to(torch.bfloat16)
    optimizer = Nested(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, description = optimizer_state(model, optimizer)  # live tensors, not copied
    other = Nested(model.parameters())
    load_optimizer_state(model, other, tensors, description)
    first = next(model.parameters())
    assert other.state[first]["blocks"]["left"].dtype == torch.float32, "torch would have cast it to bfloat16"
    before = optimizer.state[first]["blocks"]["left"].clone()
    other.step()
    assert torch.equal(optimizer.state[first]["blocks"]["left"], before)


def test_a_step_counter_stays_where_the_live_optimizer_wants_it_and_fused_stays_its_choice() -> None:
    model = network()
    fused = MAKERS["adamw fused"](list(model.parameters()))
    train(model, fused, 1)
    stored = through_json(*optimizer_state(model, fused))
    plain = MAKERS["adamw"](list(model.parameters()))
    load_optimizer_state(model, plain, *stored)
    assert plain.param_groups[0]["fused"] is None
    step = plain.state[next(model.parameters())]["step"]
    assert (step.dtype, step.device.type, step.item()) == (torch.float32, "cpu", 1.0)
    train(model, plain, 1)


def test_a_tied_parameter_is_found_under_any_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self, *order: str) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(2))
            for name in order:
                self.register_parameter(name, weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first * x  # type: ignore[operator,no-any-return]

    model, other = Tied("first", "second"), Tied("second", "first")
    optimizer = MAKERS["adamw"](list(model.parameters()))
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    again = MAKERS["adamw"](list(other.parameters()))
    assert load_optimizer_state(other, again, *optimizer_state(model, optimizer)).restored == ["second"]


def test_names_that_torch_keeps_in_the_groups_do_not_matter() -> None:
    model = network()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(compiled.named_parameters(), lr=0.01)  # type: ignore[attr-defined]
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["param_names"][0] == "_orig_mod.0.weight"
    stored = through_json(*optimizer_state(model, optimizer))
    assert "_orig_mod" not in json.dumps(stored[1])
    load_optimizer_state(model, torch.optim.AdamW(model.parameters()), *stored)


def test_what_cannot_be_kept_is_said() -> None:
    model = network()

    class Counting(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "calls": 3}

    with pytest.raises(CheckpointError, match="Counting has 'calls'"):
        optimizer_state(model, Counting(model.parameters()))
    optimizer = MAKERS["sgd with momentum"](list(model.parameters()))
    optimizer.state[next(model.parameters())]["schedule"] = lambda step: step
    with pytest.raises(CheckpointError, match=r"state\.schedule\.0\.weight is a function, .* Build it anew"):
        optimizer_state(model, optimizer)
    with pytest.raises(ConfigError, match=r"not a torch\.optim\.Optimizer"):
        optimizer_state(model, model)  # type: ignore[arg-type]


def test_state_of_another_class_is_accepted_as_hyperparameters_alone() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    train(model, sgd, 1)
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="stored by SGD, this is AdamW"):
        load_optimizer_state(model, adamw, *optimizer_state(model, sgd))
    report = load_optimizer_state(model, adamw, *optimizer_state(model, sgd), accept="optimizer")  # type: ignore[arg-type]
    assert (report.restored, report.fresh) == ([], list(model.state_dict()))
    assert adamw.param_groups[0]["lr"] == 0.25
    assert "momentum" not in adamw.param_groups[0]
    train(model, adamw, 1)


def test_two_states_for_what_is_one_parameter_now_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + 2 * self.b(x)  # type: ignore[no-any-return]

    untied, tied = Pair(False), Pair(True)
    optimizer = MAKERS["sgd with momentum"](list(untied.parameters()))
    untied(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"a\.weight and b\.weight are one parameter here"):
        load_optimizer_state(tied, MAKERS["adamw"](list(tied.parameters())), *optimizer_state(untied, optimizer))


def test_hyperparameters_that_are_tensors_of_one_number() -> None:
    def make(rate: float, beta: float) -> torch.optim.Optimizer:
        betas: Any = (torch.tensor(beta), torch.tensor(0.999))
        return torch.optim.AdamW(model.parameters(), lr=torch.tensor([rate]), betas=betas, foreach=False)

    model = network()
    other = make(9.0, 0.5)
    load_optimizer_state(model, other, *through_json(*optimizer_state(model, make(0.125, 0.25))))
    group = other.param_groups[0]
    assert (group["lr"].tolist(), group["betas"][0].item()) == ([0.125], 0.25)


def test_a_step_that_was_captured_goes_on_reading_the_memory_that_was_restored() -> None:
    """As a CUDA graph does, or a compiled step: the rate's tensor, and of a capturable optimizer the state's too."""

    def made(rate: float, steps: int, *, capturable: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate))
        train(model, optimizer, steps)
        for group in optimizer.param_groups:
            group["capturable"] = capturable  # which is asked of a GPU's parameters alone, at a step
        return model, optimizer

    stored = made(0.125, 3, capturable=False)
    for capturable in (True, False):
        model, optimizer = made(9.0, 1, capturable=capturable)
        rate, states = optimizer.param_groups[0]["lr"], [dict(state) for state in optimizer.state.values()]
        load_optimizer_state(model, optimizer, *through_json(*optimizer_state(*stored)))
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == 0.125
        for before, now, theirs in zip(states, optimizer.state.values(), stored[1].state.values(), strict=True):
            assert all((now[key] is before[key]) == capturable for key in now)
            assert all(torch.equal(now[key], theirs[key]) for key in now)


def test_groups_that_share_a_rates_tensor_can_be_restored_to_different_rates() -> None:
    model = network()
    halves = list(model.parameters())[:2], list(model.parameters())[2:]
    source = torch.optim.AdamW(
        [{"params": half, "lr": torch.tensor(rate)} for half, rate in zip(halves, (0.5, 0.25), strict=True)]
    )
    rate = torch.tensor(9.0)
    other = torch.optim.AdamW([{"params": half, "lr": rate} for half in halves])
    load_optimizer_state(model, other, *through_json(*optimizer_state(model, source)))
    assert [float(group["lr"]) for group in other.param_groups] == [0.5, 0.25]
    equal = torch.optim.AdamW([{"params": half, "lr": torch.tensor(0.5)} for half in halves])
    other = torch.optim.AdamW([{"params": half, "lr": rate} for half in halves])
    load_optimizer_state(model, other, *through_json(*optimizer_state(model, equal)))
    assert all(group["lr"] is rate for group in other.param_groups), "a schedule of one's own goes on setting both"
    assert float(rate) == 0.5


def test_mistakes_of_a_person_get_a_sentence() -> None:
    model = network()
    optimizer = MAKERS["adamw"](list(model.parameters()))
    train(model, optimizer, 1)
    with pytest.raises(ConfigError, match="This is a AdamW, not a torch"):
        optimizer_state(optimizer, model)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no optimizer state"):
        load_optimizer_state(model, optimizer, {}, None)  # type: ignore[arg-type]
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(CheckpointError, match=r"shape \[2\], which is in none of its groups"):
        optimizer_state(model, optimizer)
