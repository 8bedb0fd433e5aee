"""``save_state`` and ``load_state``: any nested state comes back equal, and nothing else is ever loaded."""

from __future__ import annotations

import collections
import enum
import io
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import onym
from onym.cli.main import main
from onym.errors import CheckpointError, ConfigError, OnymError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
tensors = st.builds(
    lambda dtype, shape, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)
arrays = st.builds(
    lambda dtype, shape: np.ones(shape, dtype),
    st.sampled_from(["f4", ">f8", "i2", "u1", "?", "c8", "f2"]),
    st.lists(st.integers(0, 3), max_size=3),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=20)
keys = st.text() | st.integers() | st.booleans()
nested = st.recursive(
    plain | tensors | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and one.dtype.newbyteorder("=") == other.dtype and bool(np.all(one == other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(nested)
def test_any_state_comes_back_equal(state: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.ckpt")
        try:
            onym.save_state(state, path)
        except CheckpointError as error:  # keys that are equal as text, or that no header can have
            assert "Two tensors would be stored" in str(error) or "cannot be a tensor's name" in str(error)
            assert not path.exists()
            return
        assert same(state, onym.load_state(path))
        assert main(["verify", str(path)]) == 0
        for name, value in load_file(path).items():
            assert name.startswith("state")
            assert isinstance(value, torch.Tensor)


def test_what_trainers_keep(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(3)
    state = {
        "state_dict": model.state_dict(),
        "optimizers": [optimizer.state_dict()],
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
        "generator": generator,
        "stream": io.BytesIO(b"abc"),
        "counter": collections.Counter("aab"),
        "nan": float("nan"),
        "same": model.weight,
    }
    onym.save_state(state, tmp_path / "last.ckpt")
    found = onym.load_state(tmp_path / "last.ckpt")
    assert list(found) == list(state)
    assert same(dict(state["state_dict"]), dict(found["state_dict"]))
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(found["optimizers"][0])
    assert same(other.state_dict(), optimizer.state_dict())
    random.setstate(found["rng"]["python"])
    np.random.set_state(found["rng"]["numpy"])
    torch.set_rng_state(found["rng"]["torch"])
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=found["generator"]))
    assert found["same"].data_ptr() == found["state_dict"]["weight"].data_ptr(), "one tensor, as it was"


def test_the_model_in_it_loads_by_the_same_path(tmp_path: Path) -> None:
    model: Any = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), backend="eager")
    path = tmp_path / "last.ckpt"
    onym.save_state({"epoch": 3, "state_dict": model.state_dict(), "rng": {"a": torch.ones(3)}}, path)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    onym.load(path, into=other)
    assert same(
        dict(other.state_dict()), {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}
    )
    assert onym.open_checkpoint(path).origin.contents.within == "state_dict"
    assert main(["inspect", str(path)]) == 0
    assert main(["convert", str(path), str(path.parent / "y.safetensors")]) == 0
    assert set(load_file(path.parent / "y.safetensors")) == set(other.state_dict())


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"a": {1, 2}}, r"state\.a is a set.*sorted list"),
        ({"a": [print]}, r"state\.a\.0 is a builtin_function_or_method"),
        (enum.Enum("Colour", "RED").RED, r"state\.value is a Colour"),  # type: ignore[attr-defined]
        (np.array([None]), r"state\.value is a ndarray"),
        (np.array(["text"]), r"state\.value is a ndarray"),
        ({"a": torch.ones(2, device="meta")}, "has no values"),
        ({"a": nn.Linear(1, 1)}, "is a Linear"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "Two tensors would be stored"),
    ],
)
def test_what_cannot_be_kept_is_said_and_nothing_is_lost(tmp_path: Path, value: Any, sentence: str) -> None:
    onym.save_state([1], tmp_path / "x")
    with pytest.raises(CheckpointError, match=sentence):
        onym.save_state(value, tmp_path / "x")
    assert onym.load_state(tmp_path / "x") == [1]
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_what_is_nested_too_deep_or_holds_itself(tmp_path: Path) -> None:
    itself: list[Any] = []
    itself.append(itself)
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    for value in (itself, deep, {"a": [deep]}):
        with pytest.raises(CheckpointError, match="nested too deep, or holds itself"):
            onym.save_state(value, tmp_path / "x")
        with pytest.raises(CheckpointError, match="nested too deep, or holds itself"):
            onym.Checkpointer(tmp_path / "run", background=False).save(1, {"model": nn.Linear(1, 1), "data": value})
    assert not (tmp_path / "x").exists()


def test_a_deep_state_opens_as_far_as_a_model_could_be(tmp_path: Path) -> None:
    deep: Any = {"w": torch.ones(1)}
    for _ in range(300):
        deep = {"a": deep}
    onym.save_state({"model": nn.Linear(2, 1).state_dict(), "deep": deep}, tmp_path / "x")
    assert onym.open_checkpoint(tmp_path / "x").names == ["weight", "bias"]
    assert same(onym.load_state(tmp_path / "x")["deep"], deep)


@pytest.mark.parametrize("name", ["x\0y", "a" * 300])
def test_a_path_that_no_system_has(name: str, tmp_path: Path) -> None:
    place = str(tmp_path / name)
    for call in (
        lambda: onym.save(nn.Linear(1, 1), place),
        lambda: onym.save_state({}, place),
        lambda: onym.load_state(place),
        lambda: onym.load(place, into=nn.Linear(1, 1)),
        lambda: onym.Checkpointer(place).save(1, {"model": nn.Linear(1, 1)}),
        lambda: onym.Checkpointer(place).restore({"model": nn.Linear(1, 1)}),
    ):
        with pytest.raises(OnymError):
            call()


def test_other_files_are_no_state(tmp_path: Path) -> None:
    onym.save(nn.Linear(2, 1), tmp_path / "m.safetensors")
    torch.save({"a": 1}, tmp_path / "m.pth")
    for name in ("m.safetensors", "m.pth", "missing"):
        with pytest.raises(CheckpointError):
            onym.load_state(tmp_path / name)
    with pytest.raises(ConfigError, match="is a folder"):
        onym.save_state({}, tmp_path)


def test_values_with_arrays_are_compared(tmp_path: Path) -> None:
    class WithArray(nn.Linear):
        def __init__(self, array: np.ndarray[Any, Any]) -> None:
            super().__init__(1, 1)
            self.weight.data.zero_()
            self.bias.data.zero_()
            self.array = array

        def get_extra_state(self) -> Any:
            return {"array": self.array}

        def set_extra_state(self, state: Any) -> None: ...

    arrays = {"a": np.arange(3), "b": np.arange(3), "c": np.arange(4), "d": np.array([1.0, np.nan])}
    for name, array in arrays.items():
        onym.save(WithArray(array), tmp_path / f"{name}.safetensors")
    for one, other, code in (("a", "b", 0), ("a", "c", 1), ("a", "d", 1), ("d", "d", 0)):
        assert main(["diff", str(tmp_path / f"{one}.safetensors"), str(tmp_path / f"{other}.safetensors")]) == code


@pytest.mark.parametrize("case", range(60))
def test_a_damaged_file_is_never_another_state(tmp_path: Path, case: int) -> None:
    chance = random.Random(case)
    state = {"a": torch.arange(9.0), "b": [1, "text", 2.5], "c": {"d": np.arange(3), "e": b"bytes"}}
    path = tmp_path / "x"
    onym.save_state(state, path)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)
    try:
        found = onym.load_state(path)
    except OnymError:
        return
    assert same(state, found)


def test_a_killed_saver_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    onym.save_state({"step": -1, "w": torch.full((1000,), -1.0)}, path)
    program = textwrap.dedent(f"""
        import onym, torch
        for step in range(10_000):
            onym.save_state({{"step": step, "w": torch.full((1000,), float(step))}}, {str(path)!r})
            print(step, flush=True)
    """)
    chance = random.Random(5)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = [process.stdout.readline() for _ in range(chance.randrange(2, 40))][-1]
        process.kill()
        process.wait()
        found = onym.load_state(path)
        assert found["step"] >= int(last), "a save that returned is there"
        assert torch.equal(found["w"], torch.full((1000,), float(found["step"])))
