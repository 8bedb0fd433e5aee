"""What torch's own functions get wrong, reproduced, and ours beside it.

Each row first shows torch's behaviour; where a later torch has mended it, the row is skipped and says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as dsd

import onym
from onym.errors import CheckpointError
from onym.state.optimizer import load_optimizer_state, optimizer_state

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrong_in_torch(still: bool) -> None:
    if not still:
        pytest.skip(f"torch {torch.__version__} has mended this")


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


class Blocks(nn.Module):
    """Two blocks, the first of them used twice."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = wrap(nn.Sequential(nn.Linear(3, 3)))
        self.second = wrap(nn.Sequential(nn.Linear(3, 3)))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.second(self.first(x)))  # type: ignore[no-any-return]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


NAMES = list(Blocks().state_dict())


def test_a_checkpointed_compiled_block_leaks_its_prefix() -> None:
    model = Blocks(lambda block: checkpoint_wrapper(compiled(block)))
    wrong_in_torch(any("_orig_mod" in name for name in dsd.get_model_state_dict(model)))
    assert list(onym.state_dict(model)) == NAMES


def test_a_shared_compiled_block_cannot_be_loaded() -> None:
    model = Blocks()
    model.first = model.again = compiled(model.first)
    state = copy.deepcopy(dict(Blocks().state_dict()))
    wrong_in_torch(raises(lambda: dsd.set_model_state_dict(model, dict(state))))
    assert onym.load_state_dict(model, state).loaded == NAMES


def test_the_callers_dict_is_renamed() -> None:
    model = nn.Sequential(compiled(nn.Linear(2, 2)))
    state = copy.deepcopy(dict(nn.Sequential(nn.Linear(2, 2)).state_dict()))
    given = dict(state)
    dsd.set_model_state_dict(model, given)
    wrong_in_torch(list(given) != list(state))
    given = dict(state)
    onym.load_state_dict(model, given)
    assert list(given) == list(state)


def test_a_tensor_is_lost_under_activation_checkpointing() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = nn.ModuleDict({"x": nn.Linear(2, 2)})
            self.x = nn.Linear(2, 2)

    model = nn.Sequential(checkpoint_wrapper(Inner()))
    wrong_in_torch(len(model.state_dict()) < 4)
    assert list(onym.state_dict(model)) == list(nn.Sequential(Inner()).state_dict())
    other = nn.Sequential(Inner())
    onym.load_state_dict(model, other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in onym.state_dict(model).items())


def test_a_mismatch_names_one_key_under_the_wrong_name() -> None:
    model = compiled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"0\.weight|Missing") as theirs:
        dsd.set_model_state_dict(model, {"0.weight": torch.ones(2, 3)})
    wrong_in_torch("1.weight" not in str(theirs.value) or "_orig_mod" in str(theirs.value))
    with pytest.raises(onym.MismatchError) as ours:
        onym.load_state_dict(model, {"0.weight": torch.ones(2, 3)})
    assert ours.value.differences.missing == ["0.bias", "1.weight", "1.bias"]
    assert ours.value.differences.shapes == {"0.weight": ((2, 3), (2, 2))}


def test_a_dtype_is_cast_without_a_word() -> None:
    model = nn.Linear(2, 2)
    half = nn.Linear(2, 2).to(torch.bfloat16).state_dict()
    wrong_in_torch(not raises(lambda: model.load_state_dict(half)))
    with pytest.raises(onym.MismatchError, match="Only dtypes differ"):
        onym.load_state_dict(model, half)


class StepSize(torch.optim.Optimizer):
    """Its step size is not called lr."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"step_size": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["count"] = torch.ones(())
                    parameter.sub_(group["step_size"] * (parameter.grad + 1))


def test_reading_an_optimizer_steps_it() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    dsd.get_optimizer_state_dict(model, StepSize(model.parameters()))
    wrong_in_torch(not torch.equal(model.weight, before))
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    assert optimizer_state(model, StepSize(model.parameters()))[0] == {}
    assert torch.equal(model.weight, before)


def test_a_split_group_loses_its_hyperparameters() -> None:
    model = nn.Linear(2, 2)
    one = torch.optim.AdamW(model.parameters(), lr=0.25)
    trained(model, one)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    theirs = torch.optim.AdamW(groups, lr=9.0)
    state = copy.deepcopy(dsd.get_optimizer_state_dict(model, one))

    def restore_and_step() -> None:
        dsd.set_optimizer_state_dict(model, theirs, state)
        trained(model, theirs)

    wrong_in_torch(raises(restore_and_step) or theirs.param_groups[0].get("lr") != 0.25)
    ours = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}], lr=9.0)
    load_optimizer_state(model, ours, *copy.deepcopy(optimizer_state(model, one)))
    assert [group["lr"] for group in ours.param_groups] == [0.25, 0.25]
    trained(model, ours)


def test_a_joined_group_takes_one_of_two_rates_silently() -> None:
    model = nn.Linear(2, 2)
    two = torch.optim.AdamW([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    trained(model, two)
    theirs = torch.optim.AdamW(model.parameters(), lr=9.0)
    wrong_in_torch(
        not raises(lambda: dsd.set_optimizer_state_dict(model, theirs, copy.deepcopy(dsd.get_optimizer_state_dict(model, two))))
    )
    with pytest.raises(CheckpointError, match=r"unequal lr \(0\.1, 0\.2\)"):
        load_optimizer_state(model, torch.optim.AdamW(model.parameters(), lr=9.0), *optimizer_state(model, two))


def test_an_optimizers_state_goes_by_position() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    first, second = model.parameters()
    optimizer = torch.optim.SGD(compiled(model).named_parameters(), lr=0.1, momentum=0.9)
    first.grad, second.grad = torch.ones(2, 2), torch.full((2, 2), 7.0)
    optimizer.step()
    other = torch.optim.SGD([second, first], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wrong_in_torch(other.state[first]["momentum_buffer"].unique().item() == 7.0)
    ours = torch.optim.SGD([second, first], lr=0.1, momentum=0.9)
    load_optimizer_state(model, ours, *optimizer_state(model, optimizer))
    assert ours.state[first]["momentum_buffer"].unique().item() == 1.0


def test_an_optimizers_state_is_cast_to_the_parameters_dtype() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((2, 2), 1.00001)
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wrong_in_torch(other.state[model.weight]["momentum_buffer"].dtype == torch.bfloat16)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    load_optimizer_state(model, ours, *optimizer_state(model, optimizer))
    assert ours.state[model.weight]["momentum_buffer"].dtype == torch.float32


def test_two_optimizers_share_restored_tensors() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    wrong_in_torch(other.state[model.weight]["momentum_buffer"] is optimizer.state[model.weight]["momentum_buffer"])
    load_optimizer_state(model, other, *optimizer_state(model, optimizer))
    assert (
        other.state[model.weight]["momentum_buffer"].data_ptr() != optimizer.state[model.weight]["momentum_buffer"].data_ptr()
    )


def test_assigning_takes_the_model_from_its_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    wrong_in_torch(optimizer.param_groups[0]["params"][0] is not model.weight)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    onym.load_state_dict(model, nn.Linear(2, 2).state_dict())
    assert optimizer.param_groups[0]["params"][0] is model.weight
