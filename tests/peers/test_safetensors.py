"""The vectors of safetensors' own tests (tensor.rs, attacks/) as a table: what stock safetensors opens, Onym opens, with the
same bytes; what it refuses, Onym refuses. The cases where Onym is stricter are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import onym
from onym.format.reader import read_checkpoint
from onym.format.safetensors import as_bytes


def tensor(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWO = {"a": tensor("I32", [2, 2], 0, 16), "b": tensor("U8", [2, 2], 16, 20)}
VECTORS: dict[str, tuple[Any, bytes]] = {
    "nothing": ({}, b""),
    "padded with all white space": (b"{}\r \t\n", b""),
    "begun with all white space": (b"\r \t\n{}", b""),
    "metadata alone": ({"__metadata__": {"framework": "pt"}}, b""),
    "no metadata": ({"__metadata__": None}, b""),
    "two": (TWO, bytes(20)),
    "two, the other way round": (dict(reversed(TWO.items())), bytes(20)),
    "an empty shape": ({"a": tensor("I32", [], 0, 4)}, bytes(4)),
    "zero elements": ({"a": tensor("I32", [2, 0], 0, 0)}, b""),
    "zero elements twice": ({"a": tensor("I32", [2, 0], 0, 0), "b": tensor("I32", [0], 0, 0)}, b""),
    "a name that is empty": ({"": tensor("U8", [1], 0, 1)}, b"\1"),
    "further fields": ({"a": {**tensor("U8", [1], 0, 1), "more": 5}}, b"\1"),
    "F4": ({"a": tensor("F4", [1, 2], 0, 1)}, b"\1"),
    "F4 that ends within a byte": ({"a": tensor("F4", [1, 3], 0, 1)}, b"\1"),
    "F8_E8M0": ({"a": tensor("F8_E8M0", [2], 0, 2)}, b"\1\2"),
    "too long": (TWO, bytes(21)),
    "too short": (TWO, bytes(19)),
    "a hole": ({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, bytes(3)),
    "an overlap": ({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, bytes(3)),
    "another size": ({"a": tensor("I32", [2, 2], 0, 4)}, bytes(4)),
    "elements that overflow": ({"a": tensor("I32", [2, 18446744073709551614], 0, 16)}, bytes(16)),
    "bits that overflow": ({"a": tensor("I32", [2, 9223372036854775807], 0, 16)}, bytes(16)),
    "a negative offset": ({"a": tensor("U8", [1], -1, 0)}, bytes(1)),
    "no JSON": (b"{", b""),
    "no UTF-8": (b"\xff", b""),
    "a list": (b"[]", b""),
    "an unknown dtype": ({"a": tensor("F1", [1], 0, 1)}, bytes(1)),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "metadata that is false": ({"__metadata__": False}, b""),
    "metadata that is empty text": ({"__metadata__": ""}, b""),
    "metadata that is a list": ({"__metadata__": []}, b""),
}
ONE = json.dumps(tensor("U8", [1], 0, 1))
STRICTER = {"a tensor twice": (f'{{"a":{ONE},"a":{ONE}}}'.encode(), b"\1")}


def written(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("case", VECTORS)
def test_what_stock_safetensors_opens_is_opened(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "x.safetensors", *VECTORS[case])
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(onym.OnymError, match=r"x\.safetensors"):
            read_checkpoint(path).model.state()
        return
    ours = read_checkpoint(path).model.state()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        assert torch.equal(as_bytes(ours[name]), as_bytes(value))


@pytest.mark.parametrize("case", STRICTER)
def test_where_onym_is_stricter(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "x.safetensors", *STRICTER[case])
    assert load_file(path)
    with pytest.raises(onym.OnymError, match=r"x\.safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 100, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_is_not_there(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(onym.OnymError):
        read_checkpoint(path)


DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


@pytest.mark.parametrize("dtype", sorted({str(dtype).removeprefix("torch.") for dtype in DTYPES}))
def test_every_dtype_of_torchs_in_both_directions(tmp_path: Path, dtype: str) -> None:
    """Of those that stock safetensors stores; the others are kept too, as the same bytes."""
    kind = getattr(torch, dtype)
    if dtype.startswith(("q", "bits")) or dtype.lstrip("uint") in "1234567":
        pytest.skip("torch has only the name")
    value = torch.arange(32, dtype=torch.uint8).clamp(max=1 if dtype == "bool" else 255).view(kind).reshape(2, -1)
    model = torch.nn.Module()
    model.register_buffer("x", value)
    onym.save(model, tmp_path / "ours.safetensors")
    try:
        save_file({"x": value}, tmp_path / "theirs.safetensors")
    except (SafetensorError, KeyError, ValueError):
        assert dtype in ("complex32", "complex128"), "the only ones that it does not have"
        paths = [tmp_path / "ours.safetensors"]
    else:
        paths = [tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"]
        loaded = load_file(paths[0])["x"]
        assert (loaded.dtype, loaded.shape) == (kind, value.shape)
    for path in paths:
        back = onym.open_checkpoint(path).tensor("x")
        assert (back.dtype, back.shape) == (kind, value.shape)
        assert torch.equal(as_bytes(back), as_bytes(value))
