"""What modules store of their own making: what is written opens again, and what nobody could open is refused at saving."""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import onym
from onym.errors import CheckpointError
from onym.format.extra_state import EXTRA_KEY
from onym.format.hashing import NO_HASH
from onym.format.manifest import sealed
from onym.format.safetensors_file import open_safetensors


class Colour(enum.Enum):
    RED = 1


class Making(nn.Module):
    """A module with something of its own making in its state."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.line, self.value = nn.Linear(1, 1), value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


PLACES = ("m.pth", "m.safetensors", "m")


@pytest.mark.parametrize(
    ("value", "says", "places"),
    [
        (io.BytesIO(b"scales"), "_extra_state is a BytesIO", ("m.pth",)),
        ({"deep": [1, np.zeros(3)]}, r"_extra_state\.deep\.1 is a ndarray", ("m.pth",)),
        ({"scale": np.float64(0.5)}, "_extra_state is a dict, which torch.load", ("m.pth",)),
        (Path("x"), "_extra_state is a PosixPath", PLACES),
        ((Colour.RED,), r"_extra_state\.0 is a Colour", PLACES),
        (collections.deque([1]), "_extra_state is a deque", PLACES),
        (threading.Lock(), "_extra_state is a lock", PLACES),
        ({"weight": Making(1)}, r"_extra_state\.weight is a Making", PLACES),
    ],
)
def test_what_nobody_could_open_is_not_written(value: Any, says: str, places: tuple[str, ...], tmp_path: Path) -> None:
    for name in places:
        with pytest.raises(CheckpointError, match=says):
            onym.save(nn.Sequential(Making(value)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


VALUE = {
    "amax": torch.arange(3.0),
    "history": [1, 2.5, float("inf"), None, ("a", True)],
    "by layer": {0: torch.ones(2, 2, dtype=torch.bfloat16), 1: "text"},
    "kept": collections.OrderedDict(x=b"bytes", y=torch.tensor(3)),
    "empty": {},
}


def equal(one: Any, other: Any) -> bool:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, io.BytesIO):
        return bool(one.getvalue() == other.getvalue())
    same: bool = one == other
    return same


class Two(nn.Module):
    """Two modules with something of their own making, one with a tensor of the model in it."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = Making(first), Making(second)
        self.last = nn.Linear(2, 2)


@pytest.mark.parametrize("place", [*PLACES, "steps"])
@pytest.mark.parametrize("verify", [True, False])
def test_values_and_tensors_come_back(place: str, verify: bool, tmp_path: Path) -> None:
    model = Two(VALUE, 7)
    model.second.value = {"shared": model.last.weight.detach()}
    compiled: Any = torch.compile(model)
    for wrapped in (model, compiled):
        if place == "steps":
            with onym.Checkpointer(tmp_path / place) as checkpointer:
                checkpointer.save(1, {"model": wrapped})
        else:
            onym.save(wrapped, tmp_path / place)
        fresh = Two(None, None)
        report = onym.load(tmp_path / place, into=fresh, verify=verify)
        assert equal(fresh.first.value, VALUE)
        assert torch.equal(fresh.second.value["shared"], model.last.weight)
        assert not report.unexpected
        fresh.first.value["amax"].zero_()  # memory of its own
        checkpoint = onym.open_checkpoint(tmp_path / place)
        checkpoint.verify()
        if place != "steps":
            assert sorted(checkpoint.names) == sorted(onym.state_dict(model))
            assert equal(checkpoint.model.tensor("first._extra_state", verify=verify), VALUE)


def test_bytes_in_memory_and_numbers_of_numpy_come_back_as_from_a_checkpointer(tmp_path: Path) -> None:
    for name in ("m.safetensors", "m"):
        onym.save(Making([io.BytesIO(b"scales"), np.float64(0.5), np.int64(3)]), tmp_path / name)
        fresh = Making(None)
        onym.load(tmp_path / name, into=fresh)
        assert equal(fresh.value, [io.BytesIO(b"scales"), 0.5, 3])


@pytest.mark.parametrize("file", ["m.safetensors", "m/model.safetensors"])
def test_everybody_else_sees_the_tensors_of_the_model_and_further_ones(file: str, tmp_path: Path) -> None:
    model = Two(VALUE, 7)
    onym.save(model, tmp_path / file.partition("/")[0])
    theirs = safetensors.torch.load_file(tmp_path / file)
    plain = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert plain.keys() <= theirs.keys()
    assert {name for name in theirs if name not in plain} == {
        f"first._extra_state.{path}" for path in ("amax", "by layer.0", "kept.x", "kept.y")
    }
    fresh = Two(None, None)
    left = fresh.load_state_dict(theirs, strict=False)
    assert set(left.missing_keys) == {"first._extra_state", "second._extra_state"}
    assert torch.equal(fresh.last.weight, model.last.weight)
    if "/" in file:  # alone, without its folder, it still has them
        onym.load((tmp_path / "m/model.safetensors").rename(tmp_path / "alone.safetensors"), into=fresh)
        assert equal(fresh.first.value, VALUE)


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 2


class Registered(Making):
    def __init__(self, config: Settings) -> None:
        super().__init__(None)
        self.config = config


@pytest.mark.parametrize("place", ["m.safetensors", "m", "steps"])
def test_a_model_is_built_with_them(place: str, tmp_path: Path) -> None:
    onym.register_architecture("registered with extra state", Registered, Settings)
    model = Registered(Settings())
    model.value = VALUE
    if place == "steps":
        with onym.Checkpointer(tmp_path / place) as checkpointer:
            checkpointer.save(1, {"model": model})
    else:
        onym.save(model, tmp_path / place)
    built = onym.load_model(tmp_path / place)
    assert isinstance(built, Registered)
    assert equal(built.value, VALUE)


def test_a_tensor_is_kept_as_one(tmp_path: Path) -> None:
    onym.save(Making(torch.ones(3)), tmp_path / "m.safetensors")
    assert "onym_extra_state" not in open_safetensors(tmp_path / "m.safetensors").metadata
    fresh = Making(None)
    onym.load(tmp_path / "m.safetensors", into=fresh)
    assert torch.equal(fresh.value, torch.ones(3))


def test_other_values_are_not_a_mismatch_and_missing_ones_are(tmp_path: Path) -> None:
    onym.save(Making({"a": 1}), tmp_path / "with")
    onym.save(nn.ModuleDict({"line": nn.Linear(1, 1)}), tmp_path / "without")
    fresh = Making([1, 2])
    onym.load(tmp_path / "with", into=fresh)
    assert fresh.value == {"a": 1}
    with pytest.raises(onym.MismatchError, match="_extra_state"):
        onym.load(tmp_path / "without", into=fresh)
    with pytest.raises(onym.MismatchError, match="_extra_state"):
        onym.load(tmp_path / "with", into=nn.ModuleDict({"line": nn.Linear(1, 1)}))
    assert onym.load(tmp_path / "without", into=fresh, strict=False).missing == ["_extra_state"]


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    class Odd(Making):
        def __init__(self) -> None:
            super().__init__({"weight": torch.ones(1)})
            self._extra_state = nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match=r"_extra_state\.weight' is a tensor's name"):
        onym.save(Odd(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_every_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    onym.save(Making({"a": torch.tensor([1.5]), "b": [2]}), path)
    whole = path.read_bytes()
    for position in range(8, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        fresh = Making(None)
        try:
            onym.load(path, into=fresh)
        except CheckpointError:
            continue
        assert equal(fresh.value, {"a": torch.tensor([1.5]), "b": [2]}), position


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"_extra_state": {"$tensor": "weight"}},
        {"_extra_state": {"$tensor": ["line.weight"]}},
        {"_extra_state": {"$tuple": 5}},
        {"_extra_state": {"$os.system": "true"}},
        {"_extra_state": {"$bytes": 3}},
        {"_extra_state": {"$bytesio": []}},
        {"_extra_state": {"$dict": [[[], 1]]}},
        {"_extra_state": {"$float": "x"}},
        {"line.weight": 1},
        {"_extra_state": {"$generator": ["cpu", "line.bias"]}},
        {"_extra_state": {"$generator": ["cuda:99", "line.bias"]}},
        {"_extra_state": {"$generator": "line.bias"}},
        {"_extra_state": {"$dtype": "torch.load"}},
        {"_extra_state": {"$device": ["cpu"]}},
        {"_extra_state": {"$size": "ab"}},
        {"_extra_state": {"$composite": {"kind": "os.system"}}},
        {"_extra_state": {"$composite": {"kind": "sparse_coo", "size": [-1], "parts": {}}}},
    ],
)
@pytest.mark.parametrize("tensors", [["line.bias"], ["nothing"], [3], [[]], 5, ["line.weight", "line.bias"]])
def test_hostile_values_are_refused(values: Any, tensors: Any, tmp_path: Path) -> None:
    text = sealed(json.dumps({"values": values, "tensors": tensors, "blake3": NO_HASH}))
    safetensors.torch.save_file(Making(None).line.state_dict(prefix="line."), tmp_path / "m.safetensors", {EXTRA_KEY: text})
    fresh = Making("before")
    with pytest.raises(CheckpointError):
        onym.load(tmp_path / "m.safetensors", into=fresh)
    assert fresh.value == "before"


def test_what_is_written_opens(tmp_path: Path) -> None:
    value = {"amax": torch.ones(3), "history": [1, 2.5, None, ("a", True)], "kept": collections.OrderedDict(x=b"bytes")}
    onym.save(Making(value), tmp_path / "m.pth")
    assert torch.load(tmp_path / "m.pth", weights_only=True)["_extra_state"]["history"] == value["history"]
    fresh = Making(None)
    onym.load(tmp_path / "m.pth", into=fresh)
    assert torch.equal(fresh.value.pop("amax"), torch.ones(3))
    assert fresh.value == {"history": value["history"], "kept": value["kept"]}
