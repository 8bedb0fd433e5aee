"""Files that somebody made to do harm: opening one runs nothing, hangs nowhere, takes bounded memory, and is refused in a
sentence, or gives what is in it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onym
from onym import Checkpointer
from onym.checkpoint.retention import Retention, write_step
from onym.checkpoint.steps import newest_good, pin, steps
from onym.errors import CheckpointError, OnymError
from onym.format.manifest import (
    CONFIG,
    HEADER_KEY,
    MANIFEST,
    MODEL,
    NO_HASH,
    OPTIMIZER,
    TRAINER,
    Manifest,
    TensorEntry,
    identity_of,
    sealed,
)
from onym.format.pth import write_pth
from onym.format.reader import read_checkpoint
from onym.format.writer import About, write_folder, write_safetensors

PROVE = os.environ.get("ONYM_PROVE") == "1"
posix = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms as POSIX has them")
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*nested tensors", "ignore:.*TypedStorage")

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**63, 2**70, 10**400, math.nan, math.inf, "", "x", "../x", "\ud800", "\0", "float32\n"),
    *([], [[]], [1, -1], ["\ud800"], {}, {"x": 1}, {"\ud800": {}}, {"$tensor": "nope"}),
]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """A minute for a test of milliseconds, and 3 GB besides what the process has; then it has failed."""

    def give_up(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    if sys.platform != "linux":
        yield
        return
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 3_000_000_000, limits[1]))
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(600 if PROVE else 60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def state() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2), "count": torch.tensor(7)}


def everything(path: Path) -> dict[str, Any]:
    """All that can be read of it, checked in each way there is."""
    opened = read_checkpoint(path)
    found = opened.model.state()
    for name in opened.names:
        opened.model.tensor(name)
    opened.verify()
    return found


def settled(path: Path) -> dict[str, Any] | None:
    """What is in it, or None where it was refused. Any other error is a defect."""
    try:
        return everything(path)
    except CheckpointError:
        return None


def equal(found: dict[str, Any], right: dict[str, Tensor]) -> bool:
    return found.keys() == right.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in right.items()
    )


def single(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: Any = 0, end: Any = 4, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [start, end]}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value in a JSON value; of a list the first two."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    if isinstance(value, dict):
        return {key: replaced(part, path[1:], by) if key == path[0] else part for key, part in value.items()}
    return [replaced(part, path[1:], by) if number == path[0] else part for number, part in enumerate(value)]


def without(value: Any, path: tuple[Any, ...]) -> Any:
    if len(path) > 1:
        return replaced(value, path[:1], without(value[path[0]], path[1:]))
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if key != path[0]}
    return value[: path[0]] + value[path[0] + 1 :]


def variants(value: Any, odd: list[Any]) -> Iterator[Any]:
    """With each value in it replaced by each odd one, and left out."""
    for path in places(value):
        for by in odd:
            yield replaced(value, path, by)
        if path:
            yield without(value, path)


def resealed(values: Any, *, identity: bool = False) -> str:
    """The text of a manifest or header with a right hash of itself; whoever makes a file can make that."""
    if not isinstance(values, dict):
        return json.dumps(values)
    if identity:
        with contextlib.suppress(Exception):
            tensors = values["tensors"].get(MODEL, values["tensors"])
            values = {**values, "identity": identity_of({name: TensorEntry(**each) for name, each in tensors.items()})}
    return sealed(json.dumps({**{key: part for key, part in values.items() if key != "blake3"}, "blake3": NO_HASH}))


def file_entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "blake3": blake3(content).hexdigest(), "hashed": len(content)}


def folder(path: Path) -> dict[str, Any]:
    """A real one, and what its manifest says."""
    config = {"vocab_size": 5}
    write_folder(
        path,
        {MODEL: {**state(), "tied": (tied := torch.zeros(2)), "tied_too": tied}, OPTIMIZER: {"state.x.a": torch.ones(2)}},
        {"notes.txt": "hello\n", CONFIG: json.dumps(config)},
        About("gpt", 3, {"val_loss": 3.5}, {"step": 2, "identity": "x"}),
    )
    values: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return values


# --- the header of a .safetensors file ---------------------------------------------------------------------------------------

HEADERS: dict[str, tuple[Any, bytes]] = {
    "a hole before": ({"a": entry(4, 8)}, bytes(8)),
    "a hole between": ({"a": entry(), "b": entry(5, 9)}, bytes(9)),
    "trailing bytes": ({"a": entry()}, bytes(5)),
    "too few bytes": ({"a": entry()}, bytes(3)),
    "an overlap": ({"a": entry(), "b": entry(2, 6)}, bytes(6)),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(4)),
    "backwards": ({"a": entry(4, 0)}, bytes(4)),
    "negative offsets": ({"a": entry(-4, 0)}, bytes(4)),
    "huge offsets": ({"a": entry(2**63, 2**63 + 4)}, bytes(4)),
    "offsets beyond all numbers": ({"a": entry(0, 10**400)}, bytes(4)),
    "float offsets": ({"a": entry(0.0, 4.0)}, bytes(4)),
    "NaN offsets": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,NaN]}}', bytes(4)),
    "infinite offsets": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,Infinity]}}', bytes(4)),
    "an infinite shape": (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}', bytes(4)),
    "boolean offsets": ({"a": entry(False, True, [1])}, bytes(1)),
    "offsets as texts": ({"a": entry("0", "4")}, bytes(4)),
    "one offset": ({"a": {**entry(), "data_offsets": [0]}}, bytes(4)),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 2, 4]}}, bytes(4)),
    "a boolean shape": ({"a": entry(0, 1, [True])}, bytes(1)),
    "a float shape": ({"a": entry(0, 4, [4.0])}, bytes(4)),
    "a negative shape": ({"a": entry(0, 4, [-2, -2])}, bytes(4)),
    "a shape as text": ({"a": entry(0, 4, "4")}, bytes(4)),
    "a shape as an object": ({"a": entry(0, 4, {"4": 4})}, bytes(4)),
    "a shape that is too large": ({"a": entry(0, 4, [8])}, bytes(4)),
    "a shape that overflows": ({"a": entry(0, 4, [2**62, 4, 2**62])}, bytes(4)),
    "a shape that overflows to nothing": ({"a": entry(0, 0, [2**32, 2**32])}, b""),
    "a huge empty shape": ({"a": entry(0, 0, [0, 2**62, 2**62], "F32")}, b""),
    "65 dimensions": ({"a": entry(0, 1, [1] * 65)}, bytes(1)),
    "a million dimensions": ({"a": entry(0, 1, [1] * 1_000_000)}, bytes(1)),
    "an unknown dtype": ({"a": entry(0, 4, [4], "F3")}, bytes(4)),
    "no dtype": ({"a": entry(0, 4, [4], None)}, bytes(4)),
    "torch's name of a dtype": ({"a": entry(0, 12, [3], "float32")}, bytes(12)),
    "torch's name of a dtype, and another size": ({"a": entry(0, 5, [3], "float32")}, bytes(5)),
    "a quantized dtype": ({"a": entry(0, 4, [4], "quint8")}, bytes(4)),
    "__doc__ for a dtype": ({"a": entry(0, 4, [4], "__doc__")}, bytes(4)),
    "a function for a dtype": ({"a": entry(0, 4, [4], "load")}, bytes(4)),
    "a module for a dtype": ({"a": entry(0, 4, [4], "onnx")}, bytes(4)),
    "a dtype with a line break": ({"a": entry(0, 4, [1], "F32\n")}, bytes(4)),
    "an entry that is a number": ({"a": 5}, b""),
    "an entry that is null": ({"a": None}, b""),
    "an entry that is a list": ({"a": ["U8", [4], [0, 4]]}, bytes(4)),
    "a list": ([], b""),
    "a number": (b"7", b""),
    "nothing": (b"", b""),
    "no JSON": (b'{"a"', b""),
    "two values": (b"{}{}", b""),
    "a tensor twice": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "offsets twice": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"data_offsets":[0,4]}}', bytes(4)),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b""),
    "metadata of numbers": ({"__metadata__": {"format": 5}}, b""),
    "metadata that is a list": ({"__metadata__": ["pt"]}, b""),
    "metadata that is a text": ({"__metadata__": "pt"}, b""),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode(), bytes(4)),
    "not UTF-8": (b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16-le"), bytes(4)),
    "nested, not closed": (b'{"a":' + b"[" * 1_000_000, b""),
    "nested lists": (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", b""),
    "nested objects": (b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000, b""),
    "nested as deep as Python goes": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    path = single(tmp_path / "x.safetensors", *HEADERS[case])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        everything(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry()}, bytes(4)),
        ({"a": entry(4, 8), "b": entry()}, bytes(8)),
        ({"a": entry(0, 1, [1] * 64)}, bytes(1)),
        ({}, b""),
    ],
    ids=["plain", "in another order", "64 dimensions", "no tensor"],
)
def test_a_header_that_is_only_unusual_is_read(tmp_path: Path, header: Any, data: bytes) -> None:
    assert everything(single(tmp_path / "x.safetensors", header, data)).keys() == header.keys()


@pytest.mark.parametrize("length", [0, 1, 2, 10**6, 10**8 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("rest", [b"", b"{", b"{}", b"{" + b" " * 100])
def test_the_length_of_a_header_is_not_believed(tmp_path: Path, length: int, rest: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + rest)
    if (length, rest) != (2, b"{}"):
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            everything(path)


def test_a_sparse_file_with_a_header_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**40) + b"{")
        try:
            file.truncate(2**40 + 100)
        except OSError:
            pytest.skip("no sparse files of this size here")
    with pytest.raises(CheckpointError, match="up to 100,000,000 are read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("start", "unit", "end"),
    [
        (b'{"a":[', b"300,", b"1]}"),
        (b'{"a":{},"b":[', b'{"a":1},', b"{}]}"),
        (b"{", b'"a":0,', b'"b":0}'),
        (b"{", b'"a":{},', b'"b":{}}'),
        (b'{"__metadata__":{', b'"a":{},', b'"b":{}}}'),
    ],
)
def test_a_header_of_16_megabytes_is_refused_before_it_is_parsed(tmp_path: Path, start: bytes, unit: bytes, end: bytes) -> None:
    text = start + unit * (16_000_000 // len(unit)) + end
    path = single(tmp_path / "x.safetensors", text)
    times = [time.process_time()]
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_checkpoint(path)
    times.append(time.process_time())
    json.loads(text)
    times.append(time.process_time())
    assert times[1] - times[0] < 0.6 * (times[2] - times[1])


def test_every_odd_value_in_a_header_is_settled(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(4, 8, [2, 1, 1], "F16")}
    for number, variant in enumerate(variants(header, ODD)):
        settled(single(tmp_path / f"{number}.safetensors", variant, bytes(8)))


def test_metadata_name_no_tensor_by_chance(tmp_path: Path) -> None:
    """Stock safetensors notes a tied tensor's names there, and ``"format": "pt"`` too."""
    path = single(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "pt": entry()}, bytes(4))
    assert read_checkpoint(path).names == ["pt"]


# --- what Onym writes into such a header -----------------------------------------------------------------------------------


def own_header(path: Path, change: Callable[[dict[str, Any]], Any], *, identity: bool = True) -> Path:
    """A single file of Onym's, with something else said of its tensors, and rightly sealed."""
    write_safetensors(path, {**state(), "tied": (tied := torch.zeros(2)), "tied_too": tied}, "gpt", {"vocab_size": 5})
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    ours = json.loads(header["__metadata__"][HEADER_KEY])
    header["__metadata__"][HEADER_KEY] = resealed(change(ours), identity=identity)
    path.unlink()
    return single(path, header, content[length:])


def test_every_odd_value_in_onyms_own_header_is_settled(tmp_path: Path) -> None:
    ours: dict[str, Any] = {}
    path = own_header(tmp_path / "x.safetensors", lambda values: ours.update(values) or values)
    assert equal({name: found for name, found in everything(path).items() if name in state()}, state())
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:length]), content[length:]
    opened = 0
    for number, variant in enumerate(variants(ours, ODD)):
        header["__metadata__"][HEADER_KEY] = resealed(variant, identity=bool(number % 2))
        path.unlink()
        found = settled(single(path, header, data))
        opened += found is not None
        if found is not None and "weight" in found:
            assert torch.equal(found["weight"], state()["weight"]), variant
    assert opened > 20, "a changed time or host is no damage"


@pytest.mark.parametrize(
    "text", ["", "5", "[]", "{", '{"blake3": "' + NO_HASH + '"}', "[" * 100_000, '{"a":' * 100_000, "\ud800"]
)
def test_what_is_no_header_of_onyms_is_refused(tmp_path: Path, text: str) -> None:
    path = single(tmp_path / "x.safetensors", {"__metadata__": {HEADER_KEY: text}, "a": entry()}, bytes(4))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        everything(path)


# --- a manifest -------------------------------------------------------------------------------------------------------------


def test_every_odd_value_in_a_manifest_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "x"
    values = folder(path)
    assert everything(path).keys() == {*state(), "tied", "tied_too"}
    opened = 0
    for number, variant in enumerate(variants(values, ODD)):
        (path / MANIFEST).write_text(resealed(variant, identity=bool(number % 2)))
        found = settled(path)
        opened += found is not None
        if found is not None and "weight" in found:
            assert torch.equal(found["weight"], state()["weight"]), variant
    assert opened > 20, "a changed time or host is no damage"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "/",
            "../secret",
            "./notes.txt",
            "sub/notes.txt",
            "..\\secret",
            "C:\\secret",
            "/dev/zero",
            "/etc/passwd",
        ),
        *("link", "zero", "pipe", "directory", "absent", "n" * 300, "a\0b", "\ud800", "\udc80", "notes.txt\n", "notes.txt/"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "tensors"])
@posix
def test_a_manifest_reaches_nothing_but_files_of_its_own_folder(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "x"
    values = folder(path)
    replacing = "notes.txt" if kind == "text" else OPTIMIZER
    content = (path / replacing).read_bytes()
    for place in (tmp_path / "secret", path / "sub" / "notes.txt"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    (path / "link").symlink_to(tmp_path / "secret")
    (path / "zero").symlink_to("/dev/zero")
    (path / "directory").mkdir()
    os.mkfifo(path / "pipe")
    values["files"][name] = values["files"].pop(replacing)
    if kind == "tensors":
        values["tensors"][name] = values["tensors"].pop(replacing)
    (path / MANIFEST).write_text(resealed(values))
    with pytest.raises(CheckpointError):
        opened = read_checkpoint(path)
        opened.text(name)
        opened.verify()
    values["files"][str(tmp_path / "secret")] = values["files"].pop(name)
    values["tensors"].pop(name, None)
    (path / MANIFEST).write_text(resealed(values))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(path)


def writer(step: int, **metrics: float) -> Callable[[Path], Manifest]:
    return lambda path: write_folder(path, {MODEL: state()}, {}, About(step=step, metrics=metrics))


@pytest.mark.parametrize("what", ["a pipe", "endless", "a directory", "a link into itself", "a broken link", "none"])
@posix
def test_a_manifest_that_is_no_file_is_passed_over(tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        write_step(run, step, writer(step, loss=float(step)), retention=Retention(9))
    manifest = run / "step-000000003" / MANIFEST
    manifest.unlink()
    if what == "a pipe":
        os.mkfifo(manifest)
    elif what == "a directory":
        manifest.mkdir()
    elif what != "none":
        manifest.symlink_to({"endless": "/dev/zero", "a link into itself": manifest, "a broken link": "nowhere"}[what])
    with pytest.raises(CheckpointError):
        read_checkpoint(manifest.parent)
    found = newest_good(run)
    assert found is not None
    assert found.checkpoint.path.name == "step-000000002"
    Retention(1, best="loss").reasons(run)
    write_step(run, 3, writer(3), retention=Retention(1, best="loss"))
    assert steps(run) == [1, 3]


@pytest.mark.parametrize("what", ["a pipe", "endless", "a folder", "no text", "many digits", "other digits", "nothing"])
@posix
def test_a_pin_that_is_none_unpins_no_other(tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    write_step(run, 1, writer(1), retention=Retention(1))
    pin(run, 1, "good")
    odd = run / "odd.pin"
    if what == "a pipe":
        os.mkfifo(odd)
    elif what == "endless":
        odd.symlink_to("/dev/zero")
    elif what == "a folder":
        odd.mkdir()
    else:
        contents = {
            "no text": b"\xff\xfe",
            "many digits": b"9" * 5000,
            "other digits": "٣".encode(),
            "nothing": b"",
        }
        odd.write_bytes(contents[what])
    write_step(run, 2, writer(2), retention=Retention(1))
    assert steps(run) == [1, 2], "what is pinned stays"
    assert torch.equal(onym.open_checkpoint(run, step="good").tensor("weight"), state()["weight"])


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"5",
            b"[]",
            b"null",
            b'"x"',
            b"{}",
            b"{",
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            b"\0" * 1000,
            b"NaN",
            b"[" * 1_000_000,
        ),
        b'{"a":' * 1_000_000,
        b'{"format": "onym-checkpoint", "version": 1, "version": 1}',
        b'{"format": "onym-checkpoint", "version": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format": "onym-checkpoint", "version": ' + b"9" * 5000 + b"}",
        b'{"format": "onym-checkpoint", "version": 1e999}',
        b'{"format": "onym-checkpoint", "version": true, "blake3": "' + NO_HASH.encode() + b'"}',
    ],
    ids=range(18),
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x"
    folder(path)
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError):
        everything(path)


def test_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    folder(path)
    text = (path / MANIFEST).read_text()
    for name in ('"weight"', '"notes.txt"', '"files"', '"val_loss"'):
        at = text.rindex(name) if name != '"weight"' else text.index(name)
        end = text.index("\n" if name != '"files"' else "\n}", at)
        doubled = text[:at] + text[at:end].rstrip(",}") + "," * 1 + text[at:]
        twice = doubled if name != '"val_loss"' else text.replace('"val_loss": 3.5', '"val_loss": 3.5, "val_loss": 3.5')
        hash_at = twice.rindex('"blake3": "') + len('"blake3": "')
        (path / MANIFEST).write_text(sealed(twice[:hash_at] + NO_HASH + twice[hash_at + 64 :]))
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)


ALIASES: dict[str, Callable[[dict[str, Any]], None]] = {
    "of itself": lambda tensors: tensors["weight"].update(aliases=["weight"]),
    "of another tensor": lambda tensors: tensors["weight"].update(aliases=["bias"]),
    "twice": lambda tensors: tensors["weight"].update(aliases=["w", "w"]),
    "of two tensors": lambda tensors: [tensors[name].update(aliases=["w"]) for name in ("weight", "bias")] and None,
    "a number": lambda tensors: tensors["weight"].update(aliases=[5]),
    "a text": lambda tensors: tensors["weight"].update(aliases="xy"),
}


@pytest.mark.parametrize("case", ALIASES)
@pytest.mark.parametrize("kind", ["folder", "single"])
def test_a_further_name_that_is_another_tensors_is_refused(tmp_path: Path, case: str, kind: str) -> None:
    path = tmp_path / ("x" if kind == "folder" else "x.safetensors")
    if kind == "folder":
        values = folder(path)
        ALIASES[case](values["tensors"][MODEL])
        (path / MANIFEST).write_text(resealed(values, identity=True))
    else:
        own_header(path, lambda values: ALIASES[case](values["tensors"]) or values)
    with pytest.raises(CheckpointError):
        everything(path)


@pytest.mark.parametrize(
    "dtype",
    [
        *("__doc__", "float32\n", "Float32", "torch.float32", " float32", "", "float", "load", "nn", "onnx", "quint8", "qint8"),
        *("quint4x2", "bits8", "uint1", "int1", "float8_e8m0fnu", "bool", "\ud800", "dtype", "__class__"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "single"])
def test_a_dtype_is_one_or_refused(tmp_path: Path, dtype: str, kind: str) -> None:
    """The tensor is of bytes, as which dtypes without a name in the format are kept."""
    path, values = tmp_path / ("x" if kind == "folder" else "x.safetensors"), {"weight": torch.arange(2, dtype=torch.uint8)}
    write_folder(path, {MODEL: values}, {}) if kind == "folder" else write_safetensors(path, values)
    if kind == "folder":
        about = json.loads((path / MANIFEST).read_text())
        about["tensors"][MODEL]["weight"]["dtype"] = dtype
        (path / MANIFEST).write_text(resealed(about, identity=True))
    else:
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        ours = json.loads(header["__metadata__"][HEADER_KEY])
        ours["tensors"]["weight"]["dtype"] = dtype
        header["__metadata__"][HEADER_KEY] = resealed(ours, identity=True)
        path.unlink()
        single(path, header, content[length:])
    found = settled(path)
    if found is not None:
        assert dtype in ("bits8", "uint1", "int1", "float8_e8m0fnu"), "no dtype of a plain tensor of bytes"
        assert found["weight"].nbytes == 2


def test_a_pickle_in_place_of_a_tensor_file_is_no_tensor_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    values = folder(path)
    content = pickle.dumps(Call(os.system, f"touch {tmp_path}/exploded"))
    torch.save(state(), tmp_path / "zip.pth")
    for data in (content, (tmp_path / "zip.pth").read_bytes(), content[:8] + b"{" + content):
        (path / MODEL).unlink()
        (path / MODEL).write_bytes(data)
        values["files"][MODEL] = file_entry(data)
        (path / MANIFEST).write_text(resealed(values))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            everything(path)
    assert not (tmp_path / "exploded").exists()


CONFIGS = [
    *("5", "null", '"x"', "[]", "[1]", "{}", "true", "", "{", "NaN", '{"n_layers": 1e999}', '{"n_layers": true}', '{"zzz": 1}'),
    *('{"vocab_size": 10000000000000}', '{"emb_dim": -12}', '{"self": 1}', '{"vocab_size": []}', "[" * 100_000),
    '{"n_layers": 1000000000, "emb_dim": 1, "n_heads": 1, "vocab_size": 1, "context_length": 1}',
    '{"n_heads": 1000000000000, "emb_dim": 1000000000000}',
    '{"emb_dim": 1000000007, "n_heads": 2}',
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("into", ["build", "gpt", "linear"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, config: str, into: str) -> None:
    """And one of a model that the weights are not of, before it is built: it may be larger than the machine."""
    path = tmp_path / "x"
    write_folder(path, {MODEL: state()}, {CONFIG: "{}"}, About("gpt"))
    values = json.loads((path / MANIFEST).read_text())
    (path / CONFIG).write_text(config)
    values["files"][CONFIG] = file_entry(config.encode())
    (path / MANIFEST).write_text(resealed(values))
    with alarm(20), pytest.raises(OnymError):
        if into == "build":
            onym.load_model(path)
        else:
            small = onym.GPTConfig(vocab_size=5, context_length=4, emb_dim=4, n_heads=1, n_layers=1)
            onym.load(path, into=onym.GPT(small) if into == "gpt" else nn.Linear(4, 4))


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(60)


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "a\ud800b", "", "/" * 5000, "~", "a/" * 3000])
def test_a_path_that_cannot_be_one_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an empty path is the folder that the program runs in
    with pytest.raises(OnymError):
        onym.open_checkpoint(path)
    with pytest.raises(OnymError):
        onym.load_model(path)


@pytest.mark.parametrize("what", ["a pipe", "endless", "nothing", "a link into itself"])
@posix
def test_a_path_to_no_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.safetensors"
    if what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"endless": "/dev/zero", "nothing": "/dev/null", "a link into itself": path}[what])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


# --- a checkpoint's trainer.json --------------------------------------------------------------------------------------------


def objects() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    extra = {"epoch": 3, "pair": (1.5, torch.ones(2)), "by": {1: math.inf}}
    return {"model": model, "optimizer": optimizer, "scheduler": schedule, "extra": extra}


class Kept:
    """A checkpoint whose trainer.json is replaced by other texts, each rightly hashed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with Checkpointer(directory, background=False) as checkpointer:
            checkpointer.save(1, objects())
        self.path = directory / "step-000000001"
        self.values: dict[str, Any] = json.loads((self.path / TRAINER).read_text())
        self._manifest = json.loads((self.path / MANIFEST).read_text())

    def restored(self, values: Any, live: dict[str, Any]) -> bool:
        """Whether it was; any error but a refusal is a defect."""
        content = (values if isinstance(values, str) else json.dumps(values)).encode("utf-8", "surrogatepass")
        (self.path / TRAINER).write_bytes(content)
        self._manifest["files"][TRAINER] = file_entry(content)
        (self.path / MANIFEST).write_text(resealed(self._manifest))
        try:
            Checkpointer(self.directory).restore(live)
        except CheckpointError:
            return False
        return True


TREES: list[Any] = [
    *({"$tensor": "nope"}, {"$tensor": []}, {"$tensor": "rng.torch"}, {"$tuple": 5}, {"$dict": [1]}, {"$dict": [[[], 1]]}),
    *({"$dict": 5}, {"$counter": [["x", "y"]]}, {"$ordered": [[1, 2, 3]]}, {"$float": "x"}, {"$float": []}, {"$nope": 1}),
]


@pytest.mark.parametrize("odd", range(len(ODD) + len(TREES) + 1))
def test_every_odd_value_in_trainer_json_is_settled(tmp_path: Path, odd: int) -> None:
    kept = Kept(tmp_path / "run")
    live = objects()
    assert kept.restored(kept.values, live)
    every = list(places(kept.values))
    chosen = every if PROVE else random.Random(odd).sample(every, 8)
    before = random.getstate()
    try:
        for path in chosen:
            if odd < len(ODD) + len(TREES):
                kept.restored(replaced(kept.values, path, [*ODD, *TREES][odd]), live)
            elif path:
                kept.restored(without(kept.values, path), live)
            if odd % 4 == 0:
                live = objects()
    finally:
        random.setstate(before)


@pytest.mark.parametrize("depth", [100, 300, 900, 5000, 100_000])
@pytest.mark.parametrize("unit", [("[", "]"), ('{"a":', "}"), ('{"$tuple":[', "]}"), ('{"$dict":[[1,', "]]}")])
def test_what_is_nested_in_trainer_json_is_settled(tmp_path: Path, depth: int, unit: tuple[str, str]) -> None:
    kept = Kept(tmp_path / "run")
    nested = unit[0] * depth + "1" + unit[1] * depth
    for path in (("objects", "extra", "state"), ("objects", "optimizer", "state", "groups", 0, "hyperparameters", "lr")):
        kept.restored(json.dumps(replaced(kept.values, path, "HERE")).replace('"HERE"', nested), objects())


@pytest.mark.parametrize("text", ["", "5", "null", "[]", "{}", "{", "NaN", '{"objects": {}}', '{"rng": {}}', "[" * 100_000])
def test_what_is_no_trainer_json_is_refused(tmp_path: Path, text: str) -> None:
    kept = Kept(tmp_path / "run")
    assert not kept.restored(text, objects())


def test_what_is_refused_has_changed_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "run")
    wrong = [
        replaced(kept.values, ("objects", "optimizer", "state", "parameters"), {}),
        replaced(kept.values, ("objects", "optimizer", "state", "groups", 0, "hyperparameters", "lr"), {"$tensor": "nope"}),
        replaced(kept.values, ("objects", "scheduler", "state"), {"$nope": 1}),
        replaced(kept.values, ("rng", "numpy"), 5),
    ]
    for values in wrong:
        live = objects()
        weight, count = live["model"].weight.detach().clone(), live["optimizer"].state_dict()["state"][0]["step"].clone()
        drawn = random.getstate()
        assert not kept.restored(values, live)
        assert torch.equal(live["model"].weight, weight)
        assert torch.equal(live["optimizer"].state_dict()["state"][0]["step"], count)
        assert random.getstate() == drawn


# --- a .pth -----------------------------------------------------------------------------------------------------------------


class Call:
    """What a pickle says in order to have something called."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def pth(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip as torch writes it, with another pickle in it."""
    torch.save({"w": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    path.unlink()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    program = f"open({str(trace)!r}, 'w').close()"
    bombs = [
        Call(os.system, f"touch {trace}"),
        Call(eval, program),
        Call(exec, program),
        Call(open, str(trace), "w"),
        Call(subprocess.Popen, ["touch", str(trace)]),
        Call(torch.load, str(trace)),
        Call(functools.partial, eval, program),
        Call(__import__, "antigravity"),
        Call(torch.hub.load, "x", "y"),
    ]
    harmless = [Call(getattr, str, "format"), Call(Path, str(trace))]  # what a pickle of a nested class, and of a path, calls
    for new in (True, False):
        for call in harmless:
            torch.save({"weight": torch.ones(1), "x": call}, tmp_path / "harmless.pth", _use_new_zipfile_serialization=new)
            assert torch.equal(read_checkpoint(tmp_path / "harmless.pth").tensor("weight"), torch.ones(1))
            torch.save({"weight": call}, tmp_path / "harmless.pth", _use_new_zipfile_serialization=new)
            with pytest.raises(CheckpointError):
                read_checkpoint(tmp_path / "harmless.pth")
    for number, bomb in enumerate(bombs):
        for content in (bomb, {"weight": torch.ones(1), "x": bomb}, [bomb], OrderedDict([("weight", bomb)])):
            for new in (True, False):
                path = tmp_path / f"{number}.pth"
                torch.save(content, path, _use_new_zipfile_serialization=new)
                with pytest.raises(CheckpointError):
                    read_checkpoint(path)
                path.unlink()
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert not trace.exists()


REBUILT: dict[str, tuple[Any, ...]] = {
    "an offset beyond the end": (10**12, (2,), (1,)),
    "a negative offset": (-1, (2,), (1,)),
    "an offset beyond all numbers": (2**63, (2,), (1,)),
    "a size beyond the end": (0, (5,), (1,)),
    "a size beyond the machine": (0, (2**40,), (1,)),
    "sizes that overflow": (0, (2**62, 2**62), (1, 1)),
    "a negative size": (0, (-1,), (1,)),
    "a stride beyond the end": (0, (2, 2), (10**12, 1)),
    "a negative stride": (3, (4,), (-1,)),
    "strides that overflow": (0, (2, 2), (2**63 - 1, 2**63 - 1)),
    "fewer strides": (0, (2, 2), (1,)),
    "no numbers": ("x", None, {}),
    "floats": (0.5, (1.5,), (1.0,)),
    "nothing": (),
}


@pytest.mark.parametrize("case", REBUILT)
def test_a_tensor_that_reaches_out_of_its_memory_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.pth"
    storage = torch.arange(4.0)._typed_storage()
    torch.save({"w": Call(torch._utils._rebuild_tensor_v2, storage, *REBUILT[case], False, OrderedDict())}, path)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        everything(path)


def test_a_tensor_without_values_or_of_another_kind_is_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    tensors = {
        "meta": torch.ones(1, 2, device="meta"),
        "sparse": torch.ones(1, 2).to_sparse(),
        "broken sparse": Call(
            torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (torch.tensor([[9]]), torch.ones(1), (2,))
        ),
        "quantized": torch.quantize_per_tensor(torch.ones(1, 2), 1.0, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2)]),
        "a list": [1.0, 2.0],
        "a huge view": torch.ones(1).expand(2**40),
    }
    for tensor in tensors.values():
        torch.save({"weight": tensor, "bias": torch.ones(1)}, path)
        into = nn.Linear(2, 1)
        with pytest.raises(OnymError):
            onym.load(path, into=into)
        with contextlib.suppress(CheckpointError):
            assert read_checkpoint(path).tensor("weight").device.type == "cpu"
        path.unlink()


def test_a_value_that_is_no_tensor_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.ones(1), "x": 5, "y": {"z": torch.ones(1)}}, path)
    opened = read_checkpoint(path)
    for name in ("x", "y"):
        with pytest.raises(CheckpointError, match=repr(name)):
            opened.tensor(name)


@pytest.mark.parametrize(
    "versions", [5, [1], "x", {"": 5}, {5: {}}, {"": {"version": "x"}}, {"": {"version": 10**400}}, {"": None}], ids=str
)
def test_odd_layout_versions_are_settled(tmp_path: Path, versions: Any) -> None:
    values = OrderedDict(nn.BatchNorm1d(2).state_dict())
    values._metadata = versions  # type: ignore[attr-defined]
    torch.save(values, tmp_path / "x.pth")
    with contextlib.suppress(CheckpointError):
        onym.load(tmp_path / "x.pth", into=nn.BatchNorm1d(2))


def test_a_zip_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    for number, level in enumerate((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
        path = pth(tmp_path / f"{number}.pth", pickle.dumps({"w": 1}, 2) + bytes(5_000_000), level)
        assert path.stat().st_size < 100_000
        with pytest.raises(CheckpointError, match="compressed zip"):
            read_checkpoint(path)
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "x.pth")
    overlapping = tmp_path / "overlapping.pth"
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        source, parts = (tmp_path / "x.pth").read_bytes(), archive.infolist()
        start = archive.start_dir
    many = parts + [part for part in parts if part.file_size > 1000] * 100  # the same bytes under one name again and again
    with overlapping.open("wb") as file:
        file.write(source[:start])
        archive = zipfile.ZipFile(file, "w")
        archive.filelist, archive.start_dir, archive._didModify = many, start, True  # type: ignore[attr-defined]
        archive.close()
    assert len(zipfile.ZipFile(overlapping).infolist()) > 100
    with pytest.raises(CheckpointError):
        everything(overlapping)


ODD_PICKLES: dict[str, bytes] = {
    "long numbers": b"\x80\x02(" + b"\x8a\xff" + b"\xff" * 255 + b"t.",
    "a number longer than the file": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7f.",
    "a list of nothing": b"\x80\x02]" + b"]a" * 1000 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 20_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.",
    "an unknown memo": b"\x80\x02h\x07.",
    "an empty stack": b"\x80\x02a.",
    "no end": b"\x80\x02}",
    "a persistent id of no storage": b"\x80\x02}X\x01\x00\x00\x00wX\x01\x00\x00\x00xQs.",
    "a storage that is not there": b"\x80\x02}X\x01\x00\x00\x00w(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x009X\x03\x00\x00\x00cpuK\x04tQs.",
    "a storage longer than the file": b"\x80\x02}X\x01\x00\x00\x00w(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0ftQs.",
    "another protocol": b"\x80\x05.",
}


@pytest.mark.parametrize("case", ODD_PICKLES)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        everything(pth(tmp_path / "x.pth", ODD_PICKLES[case]))
    (tmp_path / "y.pth").write_bytes(ODD_PICKLES[case])
    with pytest.raises(CheckpointError, match=r"y\.pth"):
        everything(tmp_path / "y.pth")


# --- time and memory --------------------------------------------------------------------------------------------------------

_BOMBS = """
import json, pathlib, resource, struct, sys, time, torch
from onym.errors import CheckpointError
from onym.format.reader import read_checkpoint

folder = pathlib.Path(sys.argv[1])

class Call:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call[0], self.call[1:]

def header(*texts):
    path = folder / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", sum(map(len, texts))))
        file.writelines(texts)
    return path

def manifest(*texts):
    (folder / "x").mkdir(exist_ok=True)
    with (folder / "x" / "manifest.json").open("wb") as file:
        file.writelines(texts)
    return folder / "x"

def pth(*call):
    path = folder / "x.pth"
    torch.save({"w": torch.ones(1), "x": Call(*call)}, path)
    return path

def keys(count):
    return b",".join(b'"%d":0' % number for number in range(count))

def tensors(count):
    return b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))

CASES = {
    "lists in a header": lambda: header(b'{"a":[', b"[]," * 32_000_000, b"[]]}"),
    "numbers in a header": lambda: header(b'{"a":[', b"300," * 24_000_000, b"1]}"),
    "texts in a header": lambda: header(b'{"a":[', b'"xy",' * 19_000_000, b'""]}'),
    "objects in a header": lambda: header(b'{"a":[', b"{}," * 32_000_000, b"{}]}"),
    "names in a header": lambda: header(b"{", keys(8_000_000), b"}"),
    "a million tensors": lambda: header(b"{", tensors(1_000_000), b"}"),
    "lists in a manifest": lambda: manifest(b'{"a":[', b"[]," * 85_000_000, b"[]]}"),
    "names in a manifest": lambda: manifest(b"{", keys(10_000_000), b"}"),
    "spaces in a manifest": lambda: manifest(b"{", b" " * 260_000_000, b"}"),
    "a manifest that is too large": lambda: manifest(b" " * 300_000_000),
    "a long array of bytes": lambda: pth(bytearray, 4_000_000_000),
    "a long array of arrays": lambda: pth(set, [(1,), bytearray]),
    "a large tensor": lambda: pth(torch.Tensor, 100_000, 20_000),
}

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1e6

limit = int((status("VmSize") + 3.5) * 1e9)
for name in sys.argv[2:]:
    path = CASES[name]()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    before, began = status("VmRSS"), time.monotonic()
    try:
        read_checkpoint(path).model.state()
        outcome = "opened"
    except CheckpointError:
        outcome = "refused"
    except BaseException as error:
        outcome = type(error).__name__
    print(json.dumps([name, outcome, status("VmHWM") - before, time.monotonic() - began]), flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for file in folder.rglob("*"):
        file.is_file() and file.unlink()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "cases",
    [
        ["lists in a header", "names in a header", "a long array of bytes", "a large tensor"],
        ["numbers in a header", "texts in a header", "objects in a header", "a long array of arrays"],
        ["a million tensors"],
        ["lists in a manifest", "names in a manifest", "spaces in a manifest", "a manifest that is too large"],
    ][: None if PROVE else 1],
    ids=lambda cases: cases[0],
)
def test_memory_stays_bounded(tmp_path: Path, cases: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BOMBS, str(tmp_path), *cases], capture_output=True, text=True, check=False, timeout=300
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[0] for result in results] == cases, done.stderr
    for name, outcome, gigabytes, seconds in results:
        assert outcome == ("opened" if name == "a million tensors" else "refused"), (name, outcome)
        assert gigabytes < 1.5, f"{name}: {gigabytes:.2f} GB"
        assert seconds < 30, f"{name}: {seconds:.1f} s"


def _tower(height: int, last: bytes) -> bytes:
    """A tuple of two that are one tuple of two …: as many leaves as atoms in the world, in 100 bytes."""
    floors = b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(1, height))
    return b"\x80\x02}q\x00K\x01K\x01\x86q\x01" + floors + last


def test_a_pickle_does_not_compute_for_ever(tmp_path: Path) -> None:
    """To hash such a tuple is to visit each leaf."""
    towers = {
        "key": _tower(60, b"K\x01s."),
        "set": b"\x80\x02c__builtin__\nset\nq\x00(" + _tower(60, b"")[5:] + b"t\x85R.",
        "value": _tower(60, b"X\x01\x00\x00\x00xs0(h\x3ct."),
    }
    paths = [str(pth(tmp_path / f"{name}.pth", data)) for name, data in towers.items()]
    program = (
        "import sys; from onym.errors import CheckpointError; from onym.format.reader import read_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_checkpoint(path).verify()\n"
        "    except CheckpointError: print('refused')"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *paths], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.fail("it hangs")
    assert done.stdout.split() == ["refused"] * 3, done.stderr


# --- chance -----------------------------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(0, 7)),
        st.tuples(st.just("set"), st.integers(0, 10**6), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("insert"), st.integers(0, 10**6), st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("delete"), st.integers(0, 10**6), st.integers(1, 200)),
        st.tuples(st.just("splice"), st.integers(0, 10**6), st.tuples(st.integers(0, 10**6), st.integers(1, 300))),
        st.tuples(st.just("zero"), st.integers(0, 10**6), st.integers(1, 200)),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    for kind, where, what in edits:
        at = where % (len(content) or 1)
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
        elif kind == "set":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + what :]
        elif kind == "splice":
            start = what[0] % (len(content) or 1)
            content = content[:at] + content[start : start + what[1]] + content[at:]
        elif kind == "zero":
            content = content[:at] + bytes(len(content[at : at + what])) + content[at + what :]
    return content


@functools.cache
def originals() -> Path:
    path = Path(tempfile.mkdtemp(prefix="onym-test-"))
    write_safetensors(path / "x.safetensors", state(), "gpt", {"vocab_size": 5})
    write_pth(path / "x.pth", state())
    write_folder(path / "x", {MODEL: state()}, {"notes.txt": "hello\n"})
    return path


@pytest.fixture(scope="module", autouse=True)
def _originals_go() -> Iterator[None]:
    yield
    shutil.rmtree(originals())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", f"x/{MANIFEST}", f"x/{MODEL}"])
@settings(deadline=None)
@given(edits=EDITS)
def test_whatever_happens_to_the_bytes(name: str, edits: list[tuple[str, int, Any]]) -> None:
    """The right tensors, or a refusal."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / name.partition("/")[0]
        source = originals() / top.name
        shutil.copytree(source, top) if source.is_dir() else shutil.copy(source, top)
        path = Path(folder) / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(edited(content, edits))
        found = settled(top)
        if found is not None:
            assert equal({key: value for key, value in found.items() if key in state()}, state()), found
            assert found.keys() == state().keys()


def test_the_originals_are_right() -> None:
    for name in ("x.safetensors", "x.pth", "x"):
        found = settled(originals() / name)
        assert found is not None
        assert equal(found, state())
    assert edited(b"abcdef", [("flip", 1, 0), ("delete", 3, 1)]) == b"accef"
    assert list(itertools.islice(places({"a": [1]}), 9)) == [(), ("a",), ("a", 0)]
