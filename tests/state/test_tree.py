"""Schedulers, scalers and whatever else has a state_dict, as tensors and JSON."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as schedules

from onym.errors import CheckpointError
from onym.state.tree import flatten, unflatten


def there_and_back(value: Any) -> Any:
    tensors, structure = flatten(value, "x")
    return unflatten(json.loads(json.dumps(structure, allow_nan=False)), tensors)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.booleans()
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.lists(st.tuples(keys, inner)).map(dict)
    ),
    max_leaves=20,
)


@given(nested)
def test_any_structure_comes_back_as_it_was(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert repr(back) == repr(value), "types too, where 1 == True == 1.0"


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 10),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.1, 20),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "milestones": lambda o: schedules.MultiStepLR(o, [2, 4, 4]),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "sequence": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.1), schedules.ExponentialLR(o, 0.9)], [3]),
    "chained": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.1), schedules.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_of_torch_goes_on_as_it_would_have(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            optimizer.step()
            scheduler.step(*([1.0 + step] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        return make(optimizer), optimizer

    scheduler, optimizer = fresh()
    rates(scheduler, optimizer, 4)
    state, groups = there_and_back(scheduler.state_dict()), there_and_back(optimizer.param_groups[0]["lr"])
    again, other = fresh()
    again.load_state_dict(state)
    other.param_groups[0]["lr"] = groups
    assert rates(again, other, 6) == rates(scheduler, optimizer, 6)


def test_a_gradient_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(there_and_back(scaler.state_dict()))
    assert again.state_dict() == scaler.state_dict()


def test_tensors_numbers_and_kinds_of_dicts_come_back() -> None:
    value = {
        "t": torch.arange(3),
        "deep": [(torch.ones(2, dtype=torch.bfloat16), {"$tensor": "not one"})],
        "counter": Counter({2: 1, 4: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "numpy": [np.float64(0.5), np.int64(3)],
        "odd": [math.inf, -math.inf],
    }
    back = there_and_back(value)
    assert torch.equal(back.pop("t"), value.pop("t"))  # type: ignore[arg-type]
    assert torch.equal(back["deep"][0][0], value["deep"][0][0])
    assert back["deep"][0][0].dtype == torch.bfloat16
    assert back.pop("deep")[0][1] == {"$tensor": "not one"}
    value.pop("deep")
    assert back == value
    assert type(back["counter"]) is Counter
    assert list(back["ordered"]) == ["b", "a"]
    assert math.isnan(there_and_back(math.nan))


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"f": lambda x: x}]}, r"x\.a\.1\.f is a function.*Build it anew"),
        ({"a": {1, 2}}, r"x\.a is a set.*sorted list"),
        ({"a": np.array([None])}, r"x\.a is a ndarray.*from_numpy"),
        ({"a": Colour.RED}, r"x\.a is a Colour"),
        ({"a": torch.strided}, r"x\.a is a layout"),
        ({"1": torch.zeros(1), 1: torch.zeros(1)}, r"Two tensors would be stored under the name 'x\.1'"),
    ],
)
def test_what_cannot_be_kept_is_named_with_its_path_and_a_remedy(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        flatten(value, "x")


def test_a_damaged_structure_is_said_to_be_one() -> None:
    with pytest.raises(CheckpointError, match=r"'x\.t' is named"):
        unflatten({"t": {"$tensor": "x.t"}}, {})
    with pytest.raises(CheckpointError, match=r"'\$later'"):
        unflatten({"$later": 1}, {})


def test_nothing_is_kept_until_the_garbage_collector_runs() -> None:
    """A tensor that is taken out keeps its memory, or the file that it is mapped from, as long as anything refers to it."""
    gc.disable()
    try:
        tensor = torch.ones(3)
        alive = weakref.ref(tensor)
        structure = flatten({"a": [tensor, {1: 2}]}, "x")[1]
        del tensor
        assert alive() is None
        tensors = {"x.a.0": torch.ones(3)}
        alive = weakref.ref(tensors["x.a.0"])
        unflatten(structure, tensors)
        del tensors
        assert alive() is None
    finally:
        gc.enable()
