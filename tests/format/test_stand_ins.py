"""Files with objects of other people's classes beside the tensors, or whole modules: tensors are read, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import os
import pathlib
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onym
from onym.cli.main import main
from onym.errors import CheckpointError, NoWeightsError, OnymError
from onym.format.pickles import require_bounded
from onym.format.pth import read_pickle
from onym.format.stand_ins import StandIn, is_harmful

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TypedStorage")


class Colour(enum.Enum):
    RED = 1


class StateDict(dict):  # type: ignore[type-arg]
    """As libraries derive theirs."""


class Odd:
    """With everything that an object may pickle."""

    def __init__(self) -> None:
        self.inner, self.tensor = {"a": [1]}, torch.ones(2)

    def __reduce__(self) -> Any:
        return Odd, (), self.__dict__, iter([1, 2]), iter([("key", torch.zeros(3))])

    def append(self, value: Any) -> None: ...

    def __setitem__(self, key: str, value: Any) -> None: ...


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = nn.Parameter(torch.randn(3, 3).t())  # no contiguous one
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.norm(self.first(value)))
        return out


BESIDE: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1, nested=argparse.Namespace(x=[1])),
    "numpy scalar": np.float64(3.5),
    "numpy array": np.arange(4),
    "Path": pathlib.Path("x"),
    "datetime": datetime.datetime(2026, 11, 29),
    "enum": Colour.RED,
    "enum as key": {Colour.RED: 1},
    "a class": Colour,
    "a function": os.path.join,
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "Counter": collections.Counter("aab"),
    "frozenset": frozenset([1]),
    "complex": 1j,
    "slice": slice(1, 2),
    "range": range(3),
    "odd": Odd(),
    "generator": torch.Generator().get_state(),
    "device": torch.device("cuda", 1),
}
LAYOUTS = [(protocol, zipped) for protocol in (2, 3, 4, 5) for zipped in (True, False)]


def assert_loads(path: Path, right: nn.Module) -> None:
    model = Model()
    onym.load(path, into=model)
    for name, value in right.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("what", BESIDE)
def test_an_object_beside_the_tensors(tmp_path: Path, what: str) -> None:
    model = Model()
    for number, (protocol, zipped) in enumerate(LAYOUTS):
        for container in (dict, StateDict, collections.OrderedDict):
            path = tmp_path / f"{number}-{container.__name__}.pth"
            content = {"model": container(model.state_dict()), "it": BESIDE[what], "epoch": 3}
            torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            assert_loads(path, model)


def test_they_are_listed_as_what_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": Model().state_dict(), "args": argparse.Namespace(), "more": [Odd()]}, path)
    assert onym.open_checkpoint(path).origin.contents.foreign == {"args": "argparse.Namespace", "more.0": f"{__name__}.Odd"}
    assert main(["inspect", str(path)]) == 0
    assert "args: argparse.Namespace" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_whole_module(tmp_path: Path, compiled: bool, within: bool) -> None:
    model = Model()
    saved: Any = torch.compile(model, backend="eager") if compiled else model
    for number, (protocol, zipped) in enumerate(LAYOUTS):
        path = tmp_path / f"{number}.pt"
        content = {"model": saved, "ema": None, "train_args": argparse.Namespace()} if within else saved
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert_loads(path, model)
        assert "mask" not in onym.open_checkpoint(path).names


def test_a_parameter_in_a_class_of_its_own(tmp_path: Path) -> None:
    class Special(torch.Tensor):
        pass

    globals()["Special"] = Special
    Special.__qualname__ = "Special"
    torch.save({"w": torch.ones(3).as_subclass(Special), "x": argparse.Namespace()}, tmp_path / "x.pth")
    assert torch.equal(onym.open_checkpoint(tmp_path / "x.pth").tensor("w"), torch.ones(3))


def test_a_value_of_the_state_itself_is_not_given_to_a_module(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "_extra_state": argparse.Namespace()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"_extra_state in .* is a argparse.Namespace, which is not read"):
        onym.open_checkpoint(tmp_path / "x.pth").model.state()


def test_converted_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    assert main(["convert", str(tmp_path / "x.pth"), "--in-place"]) == 2
    assert "args: argparse.Namespace" in capsys.readouterr().err
    assert (tmp_path / "x.pth").read_bytes() == before
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors")]) == 0
    assert_loads(tmp_path / "y.safetensors", model)


# --- verify: whole, and no weights ------------------------------------------------------------------------------------------


def test_whole_but_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = torch.optim.AdamW(Model().parameters())
    contents = {
        "training_args.bin": (argparse.Namespace(lr=1), "holds a argparse.Namespace"),
        "optimizer.pt": (optimizer.state_dict(), "the state of an optimizer"),
        "list.pt": ([1, 2], "holds a list"),
    }
    for name, (content, sentence) in contents.items():
        torch.save(content, tmp_path / name)
        assert main(["verify", str(tmp_path / name)]) == 3
        printed = capsys.readouterr().out
        assert "whole, but holds no weights that can be read" in printed
        assert sentence in printed
        assert "DAMAGED" not in printed
    broken = (tmp_path / "list.pt").read_bytes().replace(b"K\x01K\x02", b"K\x01K\x03")
    (tmp_path / "list.pt").write_bytes(broken)
    assert main(["verify", str(tmp_path / "list.pt")]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def tar_of(folder: Path) -> bytes:
    import io
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(folder, "x")
    return stream.getvalue()


def test_first_bytes_tell_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    cases: dict[bytes, tuple[str, int]] = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n": ("git lfs pull", 3),
        b"<!DOCTYPE html><html><body>Sign in</body></html>": ("a web page", 3),
        b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": ("a web page or an error in XML", 3),
        b"": ("is empty", 1),
        bytes(10_000): ("zero bytes", 1),
        b"\x1f\x8b" + bytes(100): ("is a gzip archive", 3),
        tar_of(tmp_path / "folder"): ("is a tar archive", 3),
        b"GGUF" + bytes(100): ("is a GGUF file", 3),
        b"some text": ("neither safetensors nor written by torch.save", 3),
    }
    for number, (content, (sentence, code)) in enumerate(cases.items()):
        for end in ("", ".pth", ".safetensors", ".bin"):
            path = tmp_path / f"{number}{end}"
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=sentence):
                onym.load(path, into=Model())
            expected = 1 if content == b"some text" and end else code
            assert main(["verify", str(path)]) == expected, (sentence, end)
            assert main(["inspect", str(path)]) == 2
    capsys.readouterr()


def test_programs_of_torch(tmp_path: Path) -> None:
    exported = torch.export.export(Model().eval(), (torch.ones(2, 4),))
    torch.export.save(exported, tmp_path / "x.pt2")
    with pytest.raises(NoWeightsError, match=r"torch.export.save \(.pt2\)"):
        onym.open_checkpoint(tmp_path / "x.pt2")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("model.pth", b"x")
    with pytest.raises(NoWeightsError, match=r"is a zip, and not one of torch.save"):
        onym.open_checkpoint(tmp_path / "x.zip")


# --- harm -------------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._what = (function, arguments)

    def __reduce__(self) -> Any:
        return self._what


class Trap:
    """A real class that this process has: it says so when it is made, looked up or given a state."""

    sprung = False

    def __init__(self) -> None:
        Trap.sprung = True

    def __reduce__(self) -> Any:
        return Trap, (), {"x": 1}

    def __setstate__(self, state: Any) -> None:
        Trap.sprung = True


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_class_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, zipped: bool) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unheard_of.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Thing: pass\n")
    import unheard_of  # type: ignore[import-not-found]

    (tmp_path / "imported").unlink()
    path = tmp_path / "x.pth"
    content = {"w": torch.ones(2), "a": unheard_of.Thing(), "b": Trap(), "c": Call(Trap), "d": Call(print, "said")}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    del sys.modules["unheard_of"]
    Trap.sprung = False
    read = read_pickle(path)
    said = "__builtin__.print" if protocol == 2 else "builtins.print"
    assert set(read.foreign.values()) == {"unheard_of.Thing", f"{__name__}.Trap", said}
    assert not Trap.sprung
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "harmful",
    [
        Call(os.system, "true"),
        Call(eval, "1"),
        Call(exec, ""),
        Call(open, "/dev/null"),
        Call(__import__, "os"),
        eval,
        os.system,
    ],
    ids=["system", "eval", "exec", "open", "import", "eval itself", "system itself"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_runs_programs_is_refused(tmp_path: Path, harmful: Any, zipped: bool) -> None:
    for number, content in enumerate([{"w": torch.ones(2), "x": [harmful]}, harmful, {"model": Model(), "x": {1: harmful}}]):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="would run code that is stored in it"):
            onym.open_checkpoint(path)
    assert is_harmful("posix.system", "x")


def zip_of(pickled: bytes, path: Path, parts: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", b"3\n")
        for name, data in (parts or {}).items():
            archive.writestr(f"x/{name}", data)
    return path


FOREIGN = b"cargparse\nNamespace\n0"  # so that torch refuses it, and it is read here


@pytest.mark.parametrize(
    "named",
    ["collections OrderedDict", "torch Size", "torch float32", "torch._utils _rebuild_tensor_v2", "builtins set", "x y",
     "collections defaultdict", "torch FloatStorage", "copyreg _reconstructor", "torch._tensor _rebuild_from_type_v2"],
)  # fmt: skip
@pytest.mark.parametrize(
    "state", [b"}X\x05\x00\x00\x00bogusK\x01s", b"N}X\x05\x00\x00\x00bogusK\x01s\x86"], ids=["dict", "slots"]
)
def test_nothing_of_this_process_is_changed(tmp_path: Path, named: str, state: bytes) -> None:
    """BUILD sets attributes on what a pickle was given."""
    module, name = named.split()
    pickled = b"\x80\x02" + FOREIGN + f"c{module}\n{name}\n".encode() + state + b"b."
    real = [collections.OrderedDict, torch.Size, tuple, set, torch.float32, torch._utils._rebuild_tensor_v2, StandIn]
    before = [dir(each) for each in real]
    with pytest.raises(OnymError):
        onym.open_checkpoint(zip_of(pickled, tmp_path / "x.pth"))
    assert [dir(each) for each in real] == before
    assert not any(hasattr(each, "bogus") for each in real)


def tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
    """As torch writes it, with what numbers one likes."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    import io

    stream = io.BytesIO()
    arguments = (Storage(), offset, size, stride, False, collections.OrderedDict())
    Pickler(stream, 2).dump({"w": Call(torch._utils._rebuild_tensor_v2, *arguments), "x": argparse.Namespace()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("offset", "size", "stride", "count", "opens"),
    [
        (0, (4,), (1,), 4, True),
        (1, (3,), (1,), 4, True),
        (0, (2, 2), (1, 2), 4, True),
        (0, (0, 5), (5, 1), 4, True),
        (0, (), (), 4, True),
        (1, (4,), (1,), 4, False),
        (0, (5,), (1,), 4, False),
        (0, (4,), (2,), 4, False),
        (-1, (1,), (1,), 4, False),
        (0, (2,), (-1,), 4, False),
        (0, (2**40,), (0,), 4, False),
        (0, (4,), (1,), 5, False),
        (0, (2**62,), (1,), 2**62, False),
        (0, (4, 1), (1,), 4, False),
    ],
)
def test_a_tensor_is_within_its_bytes(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int, opens: bool
) -> None:
    values = struct.pack("<4f", 1, 2, 3, 4)
    path = zip_of(tensor_pickle(offset, size, stride, count), tmp_path / "x.pth", {"data/0": values})
    if not opens:
        with pytest.raises(CheckpointError):
            onym.open_checkpoint(path).tensor("w")
        return
    right = torch.tensor([1.0, 2, 3, 4]).as_strided(size, stride, offset)
    assert torch.equal(onym.open_checkpoint(path).tensor("w"), right)


def test_what_would_grow_out_of_all_proportion(tmp_path: Path) -> None:
    doubling = b"\x80\x04" + FOREIGN + b"(t" + b"2\x86" * 60 + b"}X\x01\x00\x00\x00aK\x01s0."  # ((),()) with itself, 60 times
    for stacked in (
        b"\x80\x04" + FOREIGN + b")" + b"2\x86" * 60 + b".",
        b"\x80\x04" + FOREIGN + b"]" + b"2a" * 60 + b".",
        doubling,
    ):
        with pytest.raises(CheckpointError):
            onym.open_checkpoint(zip_of(stacked, tmp_path / "x.pth"))
    many = b"\x80\x02" + b"".join(f"cm\nn{number}\n0".encode() for number in range(20_000)) + b"}."
    with pytest.raises(CheckpointError):
        onym.open_checkpoint(zip_of(many, tmp_path / "x.pth"))
    registered = b"\x80\x02" + FOREIGN + b"\x82\x01."
    with pytest.raises(CheckpointError, match="only its own program can read"):
        require_bounded(registered, "x")


def test_a_content_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": Model().state_dict(), "x": argparse.Namespace()}
    content |= {f"self{number}": content for number in range(200)}
    content["x"].self = content
    module = Model()
    object.__setattr__(module, "x", 1)
    module._modules["again"] = module
    torch.save(content, tmp_path / "x.pth")
    torch.save({"model": module}, tmp_path / "y.pth")
    for name in ("x.pth", "y.pth"):
        assert onym.open_checkpoint(tmp_path / name).tensor("first.weight").shape == (3, 4)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", range(60))
def test_a_flipped_or_cut_file_is_a_sentence_or_the_values(tmp_path: Path, case: int, zipped: bool) -> None:
    chance = random.Random(case)
    model = Model()
    content: Any = {"model": model.state_dict(), "args": argparse.Namespace(a=Odd())} if case % 2 else model
    path = tmp_path / "x.pth"
    torch.save(content, path, pickle_protocol=chance.choice([2, 4]), _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 3])):
        data[chance.randrange(min(len(data), 1500) if chance.random() < 0.7 else len(data))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)
    try:
        opened = onym.open_checkpoint(path)
        if zipped:  # the others have no checksums
            opened.verify()
        found = opened.model.state()
    except OnymError:
        return
    if zipped:
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items() if name in found)
