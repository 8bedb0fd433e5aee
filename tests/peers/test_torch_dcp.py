"""The cases of PyTorch's own tests of torch.distributed.checkpoint that use storage (test_file_system_checkpoint_cpu,
test_state_dict_utils, test_planner, test_format_utils, test_async …), as tables: what torch's writer and reader do, ours do."""

from __future__ import annotations

import gc
import io
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import onym
from onym.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
PAIRS = {
    "torch": (dcp.FileSystemWriter, dcp.FileSystemReader),
    "onym": (onym.DCPWriter, onym.DCPReader),
    "torch, onym": (dcp.FileSystemWriter, onym.DCPReader),  # a run that switches in mid-flight
}
pairs = pytest.mark.parametrize(("writer", "reader"), PAIRS.values(), ids=PAIRS)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


class AppState:
    """As in PyTorch's tutorial."""

    def __init__(self, filled: bool) -> None:
        self.model = model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        if filled:
            self.model(torch.rand(5, 3)).sum().backward()
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def stream(content: bytes, at: int) -> io.BytesIO:
    value = io.BytesIO(content)
    value.seek(at)
    return value


STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "a model's own": lambda: dict(model().state_dict()),
    "model and more": lambda: {"model": model().state_dict(), "step": 3, "lr": 1e-3, "seen": [1, 2, None], "name": "x"},
    "a tuple": lambda: {"model": model().state_dict(), "x": (torch.ones(2), 3)},
    "random": lambda: {"model": model().state_dict(), "rng": (torch.get_rng_state(), 7), "np": (1, (2, 3))},
    "nested": lambda: {"a": {"b": {"c": [torch.ones(1), {"d": torch.zeros(2)}]}, "e": 5}, "f": {"g": (1, torch.ones(3))}},
    "another name": lambda: {"net": model().state_dict()},
    "state_dict": lambda: {"state_dict": model().state_dict(), "epoch": 1},
    "an unknown name": lambda: {"whatever": model().state_dict()},
    "with a loose tensor": lambda: {"net": model().state_dict(), "rng": torch.get_rng_state()},
    "two models": lambda: {"generator": model().state_dict(), "discriminator": nn.Linear(2, 1).state_dict()},
    "an optimizer alone": lambda: {"optimizer": AppState(True).state_dict()["optimizer"]},
    "an app": lambda: {"app": AppState(True).state_dict()},
    "nothing": dict,
    "no tensor": lambda: {"step": 3, "names": ["a", "b"]},
    "one tensor": lambda: {"rng": torch.get_rng_state()},
    "an empty tensor": lambda: {"model": {"e": torch.empty(0, 3)}, "s": torch.tensor(5)},
    "bytes": lambda: {"model": model().state_dict(), "dataloader": b"\x80\x04.", "none": b""},
    "bytes inside": lambda: {"loader": {"rank0": b"abc", "list": [b"1", b"2"], "pair": (b"3", 4)}},
    "a stream": lambda: {"model": model().state_dict(), "x": stream(b"hello", 0), "y": {"z": stream(b"there", 3)}},
    "special numbers": lambda: {"x": [float("inf"), float("-inf"), 10**30, True], "y": OrderedDict(a=1)},
    "keys with dots": lambda: {"a.b": torch.ones(1), "c": {"d.e": torch.zeros(1), 5: torch.ones(2)}},
    "tied": lambda: (lambda t: {"a": t, "b": t, "x": (t, 1), "model": {"c": t, "d": t}, "view": t[1:], "t": t.t()})(
        torch.rand(2, 2)
    ),
    "an object's name and more": lambda: {"x": (torch.ones(1), 2), "x.0": torch.zeros(2), "x.1": 5, "x0": torch.ones(3)},
    "numpy": lambda: {"np": {"x": np.arange(3.0), "state": np.random.RandomState(0).get_state()}, "y": np.float32(1.5).item()},
    "torch's own": lambda: {"x": {"dtype": torch.bfloat16, "size": torch.Size((2, 3)), "device": torch.device("cpu")}},
    "float8": lambda: {"w": torch.ones(4).to(torch.float8_e4m3fn), "s": torch.ones(4).to(torch.float8_e8m0fnu)},
}


def emptied(value: Any) -> Any:
    """The same structure with other values."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return type(value)((key, emptied(item)) for key, item in value.items())
    if isinstance(value, list) and any(isinstance(item, torch.Tensor | dict) for item in value):
        return [emptied(item) for item in value]
    return None


def require_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(*(each.reshape(-1).contiguous().view(torch.uint8) for each in (one, other)))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            require_equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            require_equal(first, second)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert (one == other).all()
    elif isinstance(one, io.BytesIO):
        assert (one.getvalue(), one.tell()) == (other.getvalue(), other.tell())
    else:
        assert one == other


@pairs
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("case", STATES)
def test_any_state_comes_back(tmp_path: Path, case: str, flat: bool, writer: Any, reader: Any) -> None:
    if case == "numpy" and (writer, reader) == PAIRS["torch, onym"]:
        pytest.skip("a class that torch.load does not know by itself")
    state = STATES[case]()
    dcp.save(state, storage_writer=writer(tmp_path / "x"), planner=DefaultSavePlanner(flat, flat), no_dist=True)
    into = emptied(state)
    dcp.load(into, storage_reader=reader(tmp_path / "x"), planner=DefaultLoadPlanner(flat, flat), no_dist=True)
    require_equal(into, state)


@pairs
@pytest.mark.parametrize("case", [case for case in STATES if case not in ("nothing", "keys with dots", "numpy")])
def test_a_state_is_built_from_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, writer: Any, reader: Any
) -> None:
    """By ``dcp_to_torch_save``, and by its keys."""
    state = STATES[case]()
    dcp.save(state, storage_writer=writer(tmp_path / "x"), no_dist=True)
    monkeypatch.setattr(format_utils, "FileSystemReader", reader)
    format_utils.dcp_to_torch_save(tmp_path / "x", tmp_path / "x.pth")
    require_equal(dict(torch.load(tmp_path / "x.pth", weights_only=False)), {**plain(state)})
    key = next(iter(state))
    require_equal(_load_state_dict_from_keys(key, storage_reader=reader(tmp_path / "x")), {key: plain(state)[key]})


def plain(value: Any) -> Any:
    """With dicts as DCP builds them: of the plain kind, with texts as keys."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) and any(isinstance(x, dict) for x in value) else value


@pairs
def test_an_app_state_is_saved_and_loaded_as_in_the_tutorial(tmp_path: Path, writer: Any, reader: Any) -> None:
    app, other = AppState(True), AppState(False)
    dcp.save({"app": app}, storage_writer=writer(tmp_path / "x"), no_dist=True)
    dcp.load({"app": other}, storage_reader=reader(tmp_path / "x"), no_dist=True)
    require_equal(plain(other.state_dict()), plain(app.state_dict()))


@pairs
def test_a_reader_that_is_used_again_reads_what_is_there_now(tmp_path: Path, writer: Any, reader: Any) -> None:
    again, into = reader(tmp_path / "x"), {"x": torch.zeros(1)}
    for number in (1.0, 2.0, 3.0):
        dcp.save({"x": torch.tensor([number])}, storage_writer=writer(tmp_path / "x"), no_dist=True)
        dcp.load(into, storage_reader=again, no_dist=True)
        assert into["x"].item() == number


@pytest.fixture
def no_cached_plans() -> Iterator[None]:
    caches = [cache for name, cache in vars(SavePlanner).items() if name.startswith("_cached")]
    for cache in caches:
        cache.clear()
    yield
    for cache in caches:
        cache.clear()


@pairs
@pytest.mark.usefixtures("no_cached_plans")
def test_plans_may_be_cached(tmp_path: Path, writer: Any, reader: Any) -> None:
    for number in range(4):
        state = {"model": {f"w{number // 2}": torch.full((3,), float(number))}, "step": number}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, checkpoint_id=tmp_path / str(number), storage_writer=writer(tmp_path), planner=planner, no_dist=True)
        into = emptied(state)
        dcp.load(into, checkpoint_id=tmp_path / str(number), storage_reader=reader(tmp_path), no_dist=True)
        require_equal(into, state)


@pairs
def test_what_the_file_system_pair_has_ours_has(tmp_path: Path, writer: Any, reader: Any) -> None:
    there = writer(tmp_path / "x")
    assert there.checkpoint_id == tmp_path / "x"
    assert there.storage_meta().checkpoint_id == tmp_path / "x"
    assert there.validate_checkpoint_id(str(tmp_path / "x"))
    state = {"model": {"w": torch.ones(3)}, "step": 3}
    saved = dcp.save(state, storage_writer=there, no_dist=True)
    back = reader(tmp_path / "x")
    assert back.checkpoint_id == tmp_path / "x"
    read = back.read_metadata()
    assert saved.storage_meta.save_id == there.storage_meta().save_id
    assert read.storage_meta.load_id == back.load_id
    assert {index.fqn for index in saved.storage_data} == {index.fqn for index in read.storage_data} == {"model.w", "step"}
    assert all((tmp_path / "x" / each.relative_path).is_file() for each in read.storage_data.values())
    assert read.planner_data == {"model.w": ("model", "w"), "step": ("step",)}


@pytest.mark.parametrize("writer", [dcp.FileSystemWriter, onym.DCPWriter])
def test_a_checkpoint_is_not_replaced_against_the_will(tmp_path: Path, writer: Any) -> None:
    dcp.save({"x": torch.ones(1)}, storage_writer=writer(tmp_path / "x", overwrite=False), no_dist=True)
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        dcp.save({"x": torch.zeros(1)}, storage_writer=writer(tmp_path / "x", overwrite=False), no_dist=True)
    into = {"x": torch.zeros(1)}
    dcp.load(into, storage_reader=PAIRS["onym"][1](tmp_path / "x"), no_dist=True)
    assert into["x"].item() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.zeros(1)}, storage_writer=writer(tmp_path / "x", overwrite=True), no_dist=True)


@pairs
def test_part_of_a_state_and_of_a_tensor(tmp_path: Path, writer: Any, reader: Any) -> None:
    dcp.save({"a": torch.arange(6.0), "b": {"c": 1}}, storage_writer=writer(tmp_path / "x"), no_dist=True)
    into = {"b": {"c": 0}}
    dcp.load(into, storage_reader=reader(tmp_path / "x"), no_dist=True)
    assert into == {"b": {"c": 1}}
    more = {"b": {"c": 0}, "z": torch.zeros(1)}
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(more, storage_reader=reader(tmp_path / "x"), no_dist=True)
    dcp.load(more, storage_reader=reader(tmp_path / "x"), planner=DefaultLoadPlanner(allow_partial_load=True), no_dist=True)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"a": torch.zeros(5)}, storage_reader=reader(tmp_path / "x"), no_dist=True)


@pairs
def test_a_writer_can_be_sent_to_a_process_between_saves(tmp_path: Path, writer: Any, reader: Any) -> None:
    """As ``async_save`` does with ``AsyncCheckpointerType.PROCESS``."""
    again = writer(tmp_path / "x")
    for number in (1.0, 2.0):
        again = pickle.loads(pickle.dumps(again))
        dcp.save({"x": torch.tensor([number])}, storage_writer=again, no_dist=True)
    into = {"x": torch.zeros(1)}
    dcp.load(into, storage_reader=pickle.loads(pickle.dumps(reader(tmp_path / "x"))), no_dist=True)
    assert into["x"].item() == 2


@pairs
def test_a_save_in_the_background(tmp_path: Path, writer: Any, reader: Any) -> None:
    state = STATES["model and more"]()
    with torch.inference_mode(False):
        dcp.async_save(state, storage_writer=writer(tmp_path / "x"), no_dist=True).result()
    into = emptied(state)
    dcp.load(into, storage_reader=reader(tmp_path / "x"), no_dist=True)
    require_equal(into, state)


# --- of which model a folder is, without torch.distributed ------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize(
    "case", ["a model's own", "model and more", "a tuple", "another name", "state_dict", "with a loose tensor", "bytes"]
)
def test_the_model_is_found(tmp_path: Path, case: str, flat: bool) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=flat)
    dcp.save(STATES[case](), storage_writer=onym.DCPWriter(tmp_path / "x"), planner=planner, no_dist=True)
    other = model()
    onym.load(tmp_path / "x", into=other)
    require_equal(dict(other.state_dict()), dict(model().state_dict()))
    assert main(["verify", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("case", ["an app", "an unknown name"])
def test_the_model_is_found_inside(tmp_path: Path, case: str) -> None:
    dcp.save(STATES[case](), storage_writer=onym.DCPWriter(tmp_path / "x"), no_dist=True)
    assert onym.open_checkpoint(tmp_path / "x").names == list(model().state_dict())


@pytest.mark.parametrize(
    ("case", "has"),
    [
        ("two models", "discriminator, generator"),
        ("an optimizer alone", "optimizer"),
        ("nothing", "nothing"),
        ("no tensor", "names, step"),
        ("bytes inside", "loader"),
    ],
)
def test_where_there_is_no_model_that_is_said(tmp_path: Path, case: str, has: str, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save(STATES[case](), storage_writer=onym.DCPWriter(tmp_path / "x"), no_dist=True)
    with pytest.raises(onym.OnymError, match=rf"holds no model that is known by its name; it has {has}\. part= .*dcp.load"):
        onym.open_checkpoint(tmp_path / "x")
    assert main(["verify", str(tmp_path / "x")]) == 0
    for file in (tmp_path / "x").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert main(["verify", str(tmp_path / "x")]) == 1
    assert main(["inspect", str(tmp_path / "x")]) != 0
    assert "Traceback" not in capsys.readouterr().err


def test_one_of_several_models_is_opened_by_its_key(tmp_path: Path) -> None:
    dcp.save(STATES["two models"](), storage_writer=onym.DCPWriter(tmp_path / "x"), no_dist=True)
    other = model()
    onym.load(tmp_path / "x", into=other, part="generator")
    require_equal(dict(other.state_dict()), dict(model().state_dict()))
    assert onym.open_checkpoint(tmp_path / "x", part="discriminator").names == ["weight", "bias"]
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "g.safetensors"), "--part", "generator"]) == 0
    with pytest.raises(onym.OnymError, match=r"has no part 'generatr'.*it has discriminator, generator"):
        onym.open_checkpoint(tmp_path / "x", part="generatr")
    more = {"model": model().state_dict(), "ema": {"a": torch.ones(1)}, "step": 3}
    dcp.save(more, storage_writer=onym.DCPWriter(tmp_path / "y"), no_dist=True)
    assert onym.open_checkpoint(tmp_path / "y", part="ema").names == ["a"]
    assert onym.open_checkpoint(tmp_path / "y", part="model").names == list(model().state_dict())
    with pytest.raises(onym.OnymError, match=r"has no part 'step'"):
        onym.open_checkpoint(tmp_path / "y", part="step")


# --- what is refused, and what fails ----------------------------------------------------------------------------------------


class Odd:
    """Of no kind that is saved."""


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_what_is_refused_is_refused_before_a_byte_is_written(
    tmp_path: Path, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onym.checkpoint.dcp.write_rank_files", lambda *args: pytest.fail("it writes"))
    planner = DefaultSavePlanner(flatten_state_dict=flat)
    for odd in (Odd(), {1, 2}, lambda: 0, [Odd()], {"x": Odd()}, (torch.ones(1), Odd())):
        with pytest.raises(CheckpointException, match=r"odd\S* is a \w+, which cannot be saved"):
            dcp.save(
                {"model": {"w": torch.ones(1)}, "odd": odd},
                storage_writer=onym.DCPWriter(tmp_path / "x"),
                planner=planner,
                no_dist=True,
            )
    assert not list(tmp_path.iterdir())


def test_a_save_that_failed_leaves_nothing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector: a loop that catches the error would keep the disk full."""
    from onym.storage.disk import Disk

    real = Disk.write
    calls = 0

    def full(disk: Any, descriptor: int, data: Any, position: int) -> int:
        nonlocal calls
        calls += 1
        if calls >= fail_at:
            raise OSError(28, "No space left on device")
        return real(disk, descriptor, data, position)

    monkeypatch.setattr(Disk, "write", full)
    gc.disable()
    try:
        writer = onym.DCPWriter(tmp_path / "x")
        for fail_at in range(1, 6):
            calls = 0
            with pytest.raises(CheckpointException, match="disk is full"):
                dcp.save({"model": {"w": torch.ones(9)}, "o": {"p": torch.ones(2)}}, storage_writer=writer, no_dist=True)
            assert not list(tmp_path.iterdir()), fail_at
    finally:
        gc.enable()
    monkeypatch.undo()
    dcp.save({"model": {"w": torch.ones(9)}}, storage_writer=writer, no_dist=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_nothing_of_a_folder_of_torchs_is_executed(tmp_path: Path) -> None:
    """An object in it of somebody's class is refused by its name, and can be allowed."""
    dcp.save({"w": torch.ones(1), "odd": Odd()}, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    into: dict[str, Any] = {"w": torch.zeros(1)}
    dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    assert into["w"].item() == 1
    into["odd"] = None
    with pytest.raises(CheckpointException, match=r"odd in .* needs \S+\.Odd, which is not looked up"):
        dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    with torch.serialization.safe_globals([Odd]):
        dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    assert isinstance(into["odd"], Odd)


class Call:
    """A pickle that calls something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "call", [(os.system, "touch trace"), (eval, "open('trace', 'w')"), (bytes, 4_000_000_000), (bytearray, 4_000_000_000)]
)
def test_a_folder_of_torchs_that_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dcp.save({"w": torch.ones(1), "odd": Call(*call)}, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    into: dict[str, Any] = {"w": torch.zeros(1), "odd": None}
    with pytest.raises(CheckpointException, match=r"is not looked up|was not read|out of all proportion|damaged|would build"):
        dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    metadata.planner_data = Call(*call)
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException, match=r"was not read|out of all proportion|would build|damaged"):
        dcp.load({"w": torch.zeros(1)}, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    assert not (tmp_path / "trace").exists()


def test_a_cast_that_overflows_is_told(tmp_path: Path) -> None:
    dcp.save({"w": torch.tensor([1.0, 1e30]), "i": torch.tensor([float("inf")])}, checkpoint_id=tmp_path / "x",
             storage_writer=onym.DCPWriter(), no_dist=True)  # fmt: skip
    into = {"w": torch.zeros(2, dtype=torch.float16), "i": torch.zeros(1, dtype=torch.float16)}
    with pytest.warns(UserWarning, match=r"became infinite in the smaller dtype of 1 tensors \(w\)"):
        dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "x", dtype="cast"), no_dist=True)
