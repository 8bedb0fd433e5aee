"""What docs/format.md says of the files is so: a reader of ten lines, and the schema in the package, agree with real ones."""

from __future__ import annotations

import json
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import onym
from onym.checkpoint.steps import step_folder
from onym.cli.main import main
from onym.format.reader import read_checkpoint
from onym.format.safetensors import as_bytes


def schema(name: str) -> Any:
    return json.loads(files("onym.format").joinpath(f"{name}.schema.json").read_text())


def save_run(folder: Path) -> Path:
    """A checkpoint with everything in it."""
    model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=60, tie_embeddings=True))
    model.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    with onym.Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            large = torch.arange(2_500_000)  # 20 MB: hashed in blocks
            state = {"model": model, "optimizer": optimizer, "values": [1.5, torch.ones(2)], "large": large}
            checkpointer.save(step, state, {"loss": 2.0, "broken": float("nan")}, files={"notes.txt": "Grüße"})
    return step_folder(folder, 2)


def hash_by_the_words(data: bytes, entry: dict[str, Any]) -> str:
    if len(data) <= 4_194_304:
        assert "blocks" not in entry
        return blake3(data).hexdigest()
    hashes = [blake3(data[start : start + 4_194_304]) for start in range(0, len(data), 4_194_304)]
    assert entry["blocks"] == "".join(each.hexdigest() for each in hashes)
    return blake3(b"".join(each.digest() for each in hashes)).hexdigest()


def test_a_checkpoint_fits_the_schema(tmp_path: Path) -> None:
    manifest = json.loads((save_run(tmp_path) / "manifest.json").read_text())
    jsonschema.validate(manifest, schema("manifest"))
    assert manifest["provenance"]["parent"]["step"] == 1
    for field in ("identity", "files", "blake3"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in manifest.items() if key != field}, schema("manifest"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, "version": 2}, schema("manifest"))


def test_a_model_folder_and_a_file_fit_the_schema(tmp_path: Path) -> None:
    onym.save(nn.Linear(2, 1), tmp_path / "folder")
    jsonschema.validate(json.loads((tmp_path / "folder" / "manifest.json").read_text()), schema("manifest"))
    onym.save(nn.Linear(2, 1), tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    jsonschema.validate(json.loads(header["__metadata__"]["onym"]), schema("header"))


def test_a_reader_of_the_documents_words_agrees(tmp_path: Path) -> None:
    """Nothing of Onym's is used to check the hashes: only what docs/format.md says."""
    folder = save_run(tmp_path)
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    said = manifest["blake3"].encode()
    assert text.rstrip().endswith(said + b'"\n}')
    assert blake3(text.replace(said, b"0" * 64)).hexdigest() == said.decode()
    assert {entry.name for entry in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert blake3(content[: entry["hashed"]]).hexdigest() == entry["blake3"]
    lines = []
    for name, tensors in manifest["tensors"].items():
        content = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert manifest["files"][name]["hashed"] == 8 + length
        header = json.loads(content[8 : 8 + length])
        assert set(header) - {"__metadata__"} == set(tensors)
        for tensor, entry in tensors.items():
            start, end = header[tensor]["data_offsets"]
            assert hash_by_the_words(content[8 + length + start : 8 + length + end], entry) == entry["blake3"]
            if name == "model.safetensors":
                for each in (tensor, *entry.get("aliases", [])):
                    shape = ",".join(map(str, entry["shape"]))
                    lines.append((each.encode(), f"{len(each.encode())} {each} {entry['dtype']} {shape} {entry['blake3']}\n"))
    assert len(lines) == len(read_checkpoint(folder).names)
    assert blake3("".join(line for _, line in sorted(lines)).encode()).hexdigest() == manifest["identity"]
    assert blake3((folder / "config.json").read_bytes()).hexdigest() == manifest["provenance"]["config"]


def test_an_identity_is_the_weights_alone(tmp_path: Path) -> None:
    """Not the file, its order, or under which of its names a tied tensor is stored."""
    one, two = torch.ones(2), torch.zeros(3)
    from onym.format.writer import write_safetensors

    def identity(name: str, state: dict[str, torch.Tensor]) -> str | None:
        write_safetensors(tmp_path / f"{name}.safetensors", state)
        return read_checkpoint(tmp_path / f"{name}.safetensors").identity

    same = identity("a", {"x": one, "y": two, "tied": one})
    assert identity("b", {"tied": one, "y": two.clone(), "x": one}) == same
    assert identity("c", {"x": one, "y": two, "tied": one.clone()}) == same
    for number, other in enumerate(
        (
            {"x": one, "y": two},
            {"x": one, "z": two, "tied": one},
            {"x": one, "y": two.bool(), "tied": one},
            {"x": one, "y": two.view(3, 1), "tied": one},
            {"x": one, "y": two + 1, "tied": one},
        )
    ):
        assert identity(f"other{number}", other) != same


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """But for when they were written."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name in ("a", "b"):
        onym.save(model, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# --- what stock safetensors writes ------------------------------------------------------------------------------------------


def narrow() -> dict[str, torch.Tensor]:
    return {
        "scale": torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu).reshape(2, 4),
        "packed": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 4),
        "plain": torch.ones(3),
    }


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in narrow().items():
            self.register_buffer(name, value)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bytes(one), as_bytes(other))


@pytest.mark.parametrize("name", ["stock.safetensors", "ours.safetensors", "ours", "earlier.safetensors", "ours.pth"])
def test_dtypes_of_less_than_a_byte(tmp_path: Path, name: str) -> None:
    """F8_E8M0 and F4 by the format's names, both ways: two of F4 are one element of torch's."""
    if name == "stock.safetensors":
        save_file(narrow(), tmp_path / name)
    elif name == "earlier.safetensors":  # Onym once stored them as bytes
        onym.save(Narrow(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for theirs, ours in ((b'"F4","shape":[2,8]', b'"U8","shape":[2,4]'), (b'"F8_E8M0"', b'"U8"     ')):
            assert theirs in content
            content = content.replace(theirs, ours)
        (tmp_path / name).write_bytes(content)
    else:
        onym.save(Narrow(), tmp_path / name)
    opened = onym.open_checkpoint(tmp_path / name)
    for key, value in narrow().items():
        assert same_bytes(opened.tensor(key), value)
        assert same_bytes(opened.part(key, slice(1, 2)), value[1:2])
    model = Narrow()
    model.packed.zero_()
    model.scale.fill_(1.0)
    onym.load(tmp_path / name, into=model)
    assert all(same_bytes(getattr(model, key), value) for key, value in narrow().items())
    assert main(["convert", str(tmp_path / name), str(tmp_path / "copy.safetensors")]) == 0
    assert all(same_bytes(load_file(tmp_path / "copy.safetensors")[key], value) for key, value in narrow().items())
    assert main(["diff", str(tmp_path / name), str(tmp_path / "copy.safetensors")]) == 0
    model.packed.zero_()
    onym.save(model, tmp_path / "other.safetensors")
    assert main(["diff", str(tmp_path / name), str(tmp_path / "other.safetensors")]) == 1


def test_an_odd_number_of_four_bits_is_no_tensor_of_torchs_and_the_rest_is_read(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]},
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]},
        "w": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    opened = onym.open_checkpoint(tmp_path / "x.safetensors")
    assert opened.tensor("w").tolist() == [0, 0]
    for name, dtype in (("odd", "F4"), ("six", "F6_E2M3")):
        with pytest.raises(onym.OnymError, match=f"{name} in .* has the dtype {dtype}, which torch does not have"):
            opened.tensor(name)


@pytest.mark.parametrize("space", [" ", "\n", "\t\r\n  ", " " * 100])
def test_white_space_before_a_header(tmp_path: Path, space: str) -> None:
    """JSON allows it, and so do the format's own tests."""
    text = (space + json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}})).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2")
    assert load_file(path)["w"].tolist() == [1, 2]
    for opened in (onym.open_checkpoint(path), read_checkpoint(path), onym.open_checkpoint(tmp_path)):
        assert opened.tensor("w").tolist() == [1, 2]
    (tmp_path / "note.txt").write_text("Dear all")
    (tmp_path / "note.txt").write_text("Dearest everybody")
    with pytest.raises(onym.OnymError):
        onym.open_checkpoint(tmp_path / "note.txt")


@pytest.mark.parametrize("key", ["base", "best.model", "format", "layer.of.w", "weight"])
def test_metadata_that_names_a_tensor_is_no_further_name_of_it(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.safetensors"
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_file(model.state_dict(), path, metadata={key: "0.weight"})
    assert onym.open_checkpoint(path).names == list(load_file(path))
    onym.load(path, into=model)


def test_tied_tensors_as_stock_safetensors_writes_them(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    model = tied()
    save_model(model, str(tmp_path / "x.safetensors"))
    assert sorted(onym.open_checkpoint(tmp_path / "x.safetensors").names) == ["0.weight", "1.weight"]
    other = tied()
    onym.load(tmp_path / "x.safetensors", into=other)
    assert torch.equal(other[1].weight, model[0].weight)


@pytest.mark.parametrize("metadata", [0, "", False, [], 1, "pt", {"a": 1}, {"a": None}, [["a", "b"]]])
def test_metadata_of_another_kind_is_refused(tmp_path: Path, metadata: Any) -> None:
    text = json.dumps({"__metadata__": metadata, "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2")
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x.safetensors")
    with pytest.raises(onym.OnymError, match=r"x\.safetensors"):
        onym.open_checkpoint(tmp_path / "x.safetensors")
