"""What is written is what is read, or a sentence says why not."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from onym.checkpoint.retention import Retention, write_step
from onym.checkpoint.steps import find_checkpoint, newest_good, step_folder, steps
from onym.errors import CheckpointError, StorageError
from onym.format.manifest import MANIFEST, MODEL, NO_HASH, OPTIMIZER, Manifest, sealed
from onym.format.pth import write_pth
from onym.format.reader import read_checkpoint
from onym.format.writer import About, write_folder, write_safetensors

# Those that the safetensors format has no name for are kept as bytes, or as pairs of real numbers.
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
    *(torch.complex32, torch.complex64, torch.complex128, torch.uint4, torch.int4, torch.bits8, torch.bits16),
]


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((4, 3), value), "a.bias": torch.arange(3.0), "b": torch.tensor(7)}


def write(path: Path, value: float = 1.0) -> Path:
    write_folder(path, {MODEL: state(value), OPTIMIZER: {"state.x.a": torch.ones(2)}}, {"notes.txt": "hello\n"})
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], ending: str) -> None:
    count = torch.Size(shape).numel() * dtype.itemsize
    tensor = torch.arange(count, dtype=torch.uint8).remainder(2).view(dtype).reshape(shape)
    path = tmp_path / f"x{ending}"
    if ending == "":
        write_folder(path, {MODEL: {"t": tensor}}, {})
    elif ending == ".pth" and dtype in (torch.int4, torch.uint4):
        with pytest.raises(CheckpointError, match=r"int4 is not recognized.*save to \.safetensors"):
            write_pth(path, {"t": tensor})
        return
    else:
        (write_safetensors if ending == ".safetensors" else write_pth)(path, {"t": tensor})
    back = read_checkpoint(path).tensor("t")
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bytes(back.reshape(-1).view(torch.uint8).numpy()) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_views_are_written_alone_and_ties_once(tmp_path: Path, ending: str) -> None:
    big = torch.randn(1000, 1000)
    values = {"row": big[3], "transposed": big[:2, :3].T, "head": big[:2, :3], "tied": big[3]}
    path = tmp_path / f"x{ending}"
    if ending == "":
        write_folder(path, {MODEL: values}, {})
    else:
        (write_safetensors if ending == ".safetensors" else write_pth)(path, values)
    size = path.stat().st_size if path.is_file() else (path / MODEL).stat().st_size
    assert size < 12_000, "one row and two corners, not a million numbers"
    opened = read_checkpoint(path)
    assert sorted(opened.names) == sorted(values)
    for name, value in values.items():
        assert torch.equal(opened.tensor(name), value), name
    back = opened.model.state()
    assert back["row"].data_ptr() == back["tied"].data_ptr()


def test_a_folder_opens_with_its_texts_and_other_tensors(tmp_path: Path) -> None:
    opened = read_checkpoint(write(tmp_path / "x"))
    assert opened.text("notes.txt") == "hello\n"
    assert opened.text("absent.txt") is None
    assert opened.tensors(OPTIMIZER).names == ["state.x.a"]
    opened.verify()
    with pytest.raises(CheckpointError, match="no tensor 'zzz'"):
        opened.tensor("zzz")
    with pytest.raises(CheckpointError, match=r"holds no trainer\.safetensors"):
        opened.tensors("trainer.safetensors")


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "notes.txt", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "grow"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / "x")
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2 if name == MANIFEST else -2] ^= 0x10
    elif damage == "truncate":
        del content[-1 if name != MANIFEST else -10 :]
    elif damage == "empty":
        content.clear()
    elif damage == "grow":
        content += b"}" if name == MANIFEST else b"\0"
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        opened = read_checkpoint(path)
        opened.verify()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_flipped_bit_in_any_byte_gives_the_right_tensors_or_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    (write_safetensors if ending == ".safetensors" else write_pth)(path, state())
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.unlink()  # not written over: an earlier reader may have it mapped
        path.write_bytes(content)
        try:
            found = read_checkpoint(path).model.state()
        except CheckpointError:
            continue
        assert all(torch.equal(found[name], value) for name, value in state().items()), position


@pytest.mark.parametrize("ending", [".safetensors", ""])
@pytest.mark.parametrize(("was", "becomes"), [(b'"F32"', b'"I32"'), (b"[4,3]", b"[3,4]"), (b'"a.bias":{', b'"a.bIas":{')])
def test_a_tensor_that_is_described_otherwise_is_damage(tmp_path: Path, ending: str, was: bytes, becomes: bytes) -> None:
    path = tmp_path / f"x{ending}"
    write_safetensors(path, state()) if ending else write(path)
    file = path if ending else path / MODEL
    content = file.read_bytes()
    at = content.rindex(was, 0, 8 + int.from_bytes(content[:8], "little"))  # in the format's own header
    file.write_bytes(content[:at] + becomes + content[at + len(was) :])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(path).model.state()


def test_the_configuration_in_a_single_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, state(), "gpt", {"n_heads": 4})
    assert read_checkpoint(path).config == {"n_heads": 4}
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"n_heads\\": 4', b'\\"n_heads\\": 2'))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=r"x\.safetensors' is damaged"):
        read_checkpoint(path)


def test_a_pth_from_before_torch_1_6_opens(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pth").tensor("a.bias"), torch.arange(3.0))


def test_a_header_is_not_believed_blindly(tmp_path: Path) -> None:
    for number, content in enumerate(
        [(2**63).to_bytes(8, "little") + b"{", (100).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0{}extra", b"{" * 9]
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path).model.state()


def test_a_manifest_names_files_in_its_own_folder_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    (tmp_path / "secret").write_text("hello\n")
    values = json.loads((path / MANIFEST).read_text().replace("notes.txt", "../secret"))
    # Whoever made the file can make its hash.
    (path / MANIFEST).write_text(sealed(json.dumps({**values, "blake3": NO_HASH})))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(path)


def test_a_later_version_says_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    values = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(CheckpointError, match="format version 2, this Onym reads up to 1: pip install --upgrade onym"):
        read_checkpoint(path)


def test_nothing_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/exploded",)

    for number, content in enumerate([Bomb(), {"weight": torch.ones(1), "bomb": Bomb()}]):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="would run code"):
            read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no zip", b"\x80\x02.", b"{}"])
def test_what_is_no_weight_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_checkpoint(path)


def test_nested_state_dicts_are_explained(tmp_path: Path) -> None:
    torch.save({"model_state_dict": state(), "step": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"no tensors at its top level; it has model_state_dict, step"):
        read_checkpoint(tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "y.pth")


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"count is a set, which cannot be saved"):
        write_safetensors(tmp_path / "x.safetensors", {"count": {3}})
    with pytest.raises(CheckpointError, match="w has no values yet"):
        write_safetensors(tmp_path / "x.safetensors", {"w": torch.empty(2, device="meta")})
    with pytest.raises(CheckpointError, match=r"w is torch\.sparse_coo, .*to_dense"):
        write_pth(tmp_path / "x.pth", {"w": torch.eye(2).to_sparse()})
    with pytest.raises(CheckpointError, match=r"w is quantized"):
        write_pth(tmp_path / "x.pth", {"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_survives_json(tmp_path: Path) -> None:
    text = (write(tmp_path / "x") / MANIFEST).read_text()
    assert Manifest.from_json(text, "x").to_json() == text


@pytest.mark.parametrize("what", ["a file of the user's", "no manifest", "another program's manifest", "a file"])
def test_nothing_that_onym_did_not_write_is_replaced(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_text("mine")
    else:
        write(path)
        if what == "a file of the user's":
            (path / "README.md").write_text("mine")
        elif what == "no manifest":
            (path / MANIFEST).unlink()
        else:
            (path / MANIFEST).write_text('{"name": "a web page"}')
    before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()}
    with pytest.raises(StorageError, match="Onym did not write"):
        write(path, value=2.0)
    assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()} == before


def test_a_model_folder_is_replaced_by_its_successor(tmp_path: Path) -> None:
    write(tmp_path / "x")
    assert read_checkpoint(write(tmp_path / "x", value=2.0)).tensor("a.weight")[0, 0] == 2
    (tmp_path / "empty").mkdir()
    read_checkpoint(write(tmp_path / "empty")).verify()


# --- a run's steps ---------------------------------------------------------------------------------------------------------


def write_steps(directory: Path, *numbers: int, keep_last: int = 10) -> None:
    for number in numbers:
        write = partial(write_folder, tensors={MODEL: state(number)}, texts={}, about=About(step=number))
        write_step(directory, number, write, retention=Retention(keep_last))


def test_the_newest_steps_are_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 10, 100, keep_last=2)
    assert steps(tmp_path) == [10, 100]
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["step-000000010", "step-000000100"]


def test_latest_passes_over_damaged_steps_and_deletes_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    (step_folder(tmp_path, 4) / MANIFEST).unlink()
    model = step_folder(tmp_path, 3) / MODEL
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    found = newest_good(tmp_path)
    assert found is not None
    assert found.checkpoint.tensor("a.weight")[0, 0] == 2
    assert [path.name for path, _ in found.skipped] == ["step-000000004", "step-000000003"]
    assert steps(tmp_path) == [1, 2, 3, 4]

    write_steps(tmp_path, 4)  # training continues and comes to the damaged step again
    assert (tmp_path / "aside-1-step-000000004" / MODEL).exists()
    assert find_checkpoint(tmp_path).checkpoint.tensor("a.weight")[0, 0] == 4


def test_a_run_that_goes_on_from_before_a_damaged_step_keeps_what_it_writes(tmp_path: Path) -> None:
    write_steps(tmp_path, 600, 900)
    model = step_folder(tmp_path, 900) / MODEL
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    write_steps(tmp_path, 650, keep_last=1)
    assert steps(tmp_path) == [650]
    assert (tmp_path / "aside-1-step-000000900" / MODEL).exists(), "renamed, not deleted"
    assert find_checkpoint(tmp_path).checkpoint.tensor("a.weight")[0, 0] == 650


def test_no_step_is_none_and_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "absent") is None
    write_steps(tmp_path, 1)
    (step_folder(tmp_path, 1) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"All 1 checkpoints .* are damaged"):
        newest_good(tmp_path)


def test_a_step_is_found_by_number(tmp_path: Path) -> None:
    write_steps(tmp_path / "checkpoints", 1, 2)
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert find_checkpoint(path, 1).checkpoint.tensor("a.weight")[0, 0] == 1
        assert find_checkpoint(path).checkpoint.tensor("a.weight")[0, 0] == 2
    with pytest.raises(CheckpointError, match="no step 3; it has 1, 2"):
        find_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match="nothing at"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is no run, so there is no step 2"):
        find_checkpoint(step_folder(tmp_path / "checkpoints", 1), 2)
