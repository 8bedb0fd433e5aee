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
import resource
import signal
import struct
import subprocess
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
    arguments: Any = (Storage(), offset, size, stride, False, collections.OrderedDict())
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


# --- what a pickle makes of a few bytes --------------------------------------------------------------------------------------


def _number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def _tensor(size: tuple[int, ...], elements: int = 0) -> bytes:
    """The opcodes of a tensor whose strides are zeros."""
    storage = b"(" + _text(b"storage") + b"ctorch\nFloatStorage\n" + _text(b"0") + _text(b"cpu") + _number(elements) + b"tQ"
    shape = b"(" + b"".join(map(_number, size)) + b"t"
    strides = b"(" + _number(0) * len(size) + b"t"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + _number(0)
        + shape
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


_LONG, _MANY = _text(b"a" * 1_000_000), _tensor((2**26, 0))  # as many empty tensors
_SHARED = b")" + b"2\x86" * 23 + b"q\x000"  # a tuple of 2**24 parts, which are one
_ABOVE = b"cm\nM\n)R}" + _text(b"_modules")
HARD = {
    "a hash again and again": _SHARED + b"}h\x00Ns0" * 1000 + b"}",
    "a hash that takes all stack": b"})" + b"\x85" * 1_000_000 + b"Ns",
    "integers of one hash": b"}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 40_000))
    + b"u",
    **{f"{name.split()[-1]} of a tensor": f"c{name.replace(' ', chr(10))}\n".encode() + _MANY + b"\x85R" for name in (
        "builtins set", "torch Size", "collections OrderedDict", "collections Counter")},
    "OrderedDict of a list of one": b"ccollections\nOrderedDict\n](" + _MANY + b"e\x85R",
    "arguments that are a tensor": b"ctorch\nSize\n" + _MANY + b"R",
    "a state that is a tensor": b"ccollections\nOrderedDict\n)R" + _MANY + b"b",
    "a state that is a list of one": b"ccollections\nOrderedDict\n)R](" + _MANY + b"eb",
    "a size that is a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + _MANY + b"NNNtR",
    "by another function": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nctorch\nTensor\n" + _MANY + b"\x85}tR",
    "a text in other encodings": b"c_codecs\nencode\n" * 41 + _text(b"a") + _text(b"latin1") + b"\x86R"
    + (_text(b"hex") + b"\x86R") * 40,
    "a slow encoding": b"c_codecs\nencode\n" + _text(("\u4e00\u5e00\u6e00" * 30_000).encode()) + _text(b"punycode") + b"\x86R",
    "memory by a tensor's class": b"ctorch\nTensor\n" + _number(2**28) + b"\x85R",
    "memory by a storage's class": b"ctorch\nFloatStorage\n" + _number(2**28) + b"\x85R",
    "a place far away": b"}r" + struct.pack("<I", 2**30),
    "a bytearray": b"cbuiltins\nbytearray\n" + _number(2**30) + b"\x85R",
    "names of keys": b"}" + _LONG + b"](" + b"N" * 500_000 + b"es",
    "modules in modules": b"cm\nM\n)R}bq\x000"
    + b"".join(_ABOVE + b"}(" + _text(b"a") + b"h%c" % n + _text(b"b") + b"h%cusbq%c0" % (n, n + 1) for n in range(60))
    + b"h" + bytes([60]),
    "names of modules": _tensor((), 1) + b"q\x010cm\nM\n)R}" + _text(b"_parameters") + b"}("
    + b"".join(_text(b"%05d" % n) + b"h\x01" for n in range(50_000)) + b"usbq\x020" + _ABOVE + b"}" + _LONG + b"h\x02ssb",
    "a number of thousands of digits": b"}\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000 + b"Ns",
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_no_time_and_memory_out_of_proportion(tmp_path: Path, name: str, foreign: bool) -> None:
    """In a process of its own: some of these took all stack."""
    path = zip_of(b"\x80\x02" + (FOREIGN if foreign else b"") + HARD[name] + b".", tmp_path / "x.pth", {"data/0": bytes(4)})
    code = os.waitstatus_to_exitcode(_opened_apart(path))
    assert code == 0


def _opened_apart(path: Path) -> int:
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 800_000_000,) * 2)
        signal.alarm(20)
        try:
            onym.open_checkpoint(path).model.state()
        except CheckpointError as error:
            os._exit(2 if "MemoryError" in str(error) or "RuntimeError" in str(error) else 0)
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("name", ["_inductor", "_dynamo", "onnx", "_export"])
def test_no_module_of_torchs_is_imported(tmp_path: Path, name: str) -> None:
    """``getattr(torch, name)`` imports these."""
    path = zip_of(b"\x80\x02" + FOREIGN + f"ctorch\n{name}\n0}}.".encode(), tmp_path / "x.pth")
    program = f"""
import sys, onym, onym.convert.opening, torch, torch.utils.serialization.config
before = set(sys.modules)
try:
    onym.open_checkpoint({str(path)!r})
except onym.errors.CheckpointError:
    pass
assert not [name for name in set(sys.modules) - before if name.startswith("torch")], "imported"
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_zip_that_can_be_read_as_two(tmp_path: Path) -> None:
    """Python and torch find the list of its parts in different ways: what is checked would not be what is loaded."""
    one = zip_of(tensor_pickle(0, (4,), (1,)), tmp_path / "one", {"data/0": bytes(16)}).read_bytes()
    other = zip_of(tensor_pickle(0, (4,), (1,)), tmp_path / "other", {"data/0": b"\1" * 16}).read_bytes()
    (tmp_path / "x.pth").write_bytes(one + other)
    with pytest.raises(CheckpointError, match="can be read as two different ones"):
        onym.open_checkpoint(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name in ("x/data.pkl", "x/data.pk2"):
            archive.writestr(name, tensor_pickle(0, (4,), (1,)))
        archive.writestr("x/data/0", bytes(16))
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes().replace(b"data.pk2", b"data.pkl"))
    with pytest.raises(CheckpointError, match="can be read as two different ones"):
        onym.open_checkpoint(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(one + b"after it")
    with pytest.raises(CheckpointError):
        onym.open_checkpoint(tmp_path / "x.pth")


# --- healthy files ------------------------------------------------------------------------------------------------------------


class Learner:
    """As fastai exports one: the model is in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.settings = model, argparse.Namespace(lr=1)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_where_else_the_model_can_be(tmp_path: Path, protocol: int, zipped: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    contents: dict[str, tuple[Any, str]] = {
        "beside a key that is a number": ({"model": model.state_dict(), 1: 2, "x": argparse.Namespace()}, "model"),
        "a pair": ((model.state_dict(), optimizer), "0"),
        "a list with a module": ([model, optimizer], "0"),
        "an object": (Learner(model), "model"),
        "beside a bytearray": ({"model": model.state_dict(), "x": bytearray(b"abc")}, "model"),
        "beside a set of objects": ({"model": model.state_dict(), "x": {pathlib.Path("x"), Colour.RED}}, "model"),
    }
    for name, (content, within) in contents.items():
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert onym.open_checkpoint(tmp_path / "x.pt").origin.contents.within == within, name
        assert_loads(tmp_path / "x.pt", model)


def test_two_models_in_a_list(tmp_path: Path) -> None:
    torch.save([Model().state_dict(), Model().state_dict()], tmp_path / "x.pt")
    with pytest.raises(NoWeightsError, match=r"holds 2 models, '0', '1'"):
        onym.open_checkpoint(tmp_path / "x.pt")
    assert "first.weight" in onym.open_checkpoint(tmp_path / "x.pt", part="1").names


def test_a_buffer_that_is_expanded(tmp_path: Path) -> None:
    torch.save({"model": {"mask": torch.ones(1).expand(2, 500)}, "x": argparse.Namespace()}, tmp_path / "x.pt")
    assert torch.equal(onym.open_checkpoint(tmp_path / "x.pt").tensor("mask"), torch.ones(2, 500))


def test_a_plain_pickle(tmp_path: Path) -> None:
    """As detectron2's model zoo has them."""
    for protocol in (2, 3, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(3)}}, protocol))
        with pytest.raises(NoWeightsError, match="is a plain pickle, not written by torch"):
            onym.open_checkpoint(tmp_path / "x.pkl")


def test_bytearray_is_called_or_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "x": bytearray(b"abc")}, tmp_path / "x.pth")
    assert torch.equal(onym.open_checkpoint(tmp_path / "x.pth").tensor("w"), torch.ones(1))
    for odd in ([bytearray], {"a": bytearray}, {bytearray}):
        torch.save({"w": torch.ones(1), "x": odd}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="holds the class bytearray"):
            onym.open_checkpoint(tmp_path / "x.pth")
