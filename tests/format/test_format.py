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
from torch import nn

import onym
from onym.checkpoint.steps import step_folder
from onym.format.reader import read_checkpoint


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
