"""A zoo of what people have: each broken in its own way, each with a sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.convert.write import convert
from onym.errors import CheckpointError, OnymError
from tests.convert import peers
from tests.convert.test_writing import ours


def two_halves(path: Path) -> Path:
    model = peers.book()
    state = model.state_dict()
    torch.save({**{f"_orig_mod.{name}": value for name, value in state.items()}, **state}, path / "x.pth")
    return path / "x.pth"


def sharded(path: Path) -> Path:
    peers.huggingface().save_pretrained(path / "hf", max_shard_size="100KB")
    return path / "hf"


def a_shard_missing(path: Path) -> Path:
    next((sharded(path)).glob("model-00002*")).unlink()
    return path / "hf"


def a_shard_missing_without_an_index(path: Path) -> Path:
    folder = a_shard_missing(path)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def a_wrong_index(path: Path) -> Path:
    folder = sharded(path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    placed = index["weight_map"]
    first = next(iter(placed))
    placed[first] = next(file for file in placed.values() if file != placed[first])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def an_index_that_points_outside(path: Path) -> Path:
    folder = sharded(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../../x.safetensors"}}))
    return folder


def a_truncated_zip(path: Path) -> Path:
    torch.save(peers.book().state_dict(), path / "x.pth")
    content = (path / "x.pth").read_bytes()
    (path / "x.pth").write_bytes(content[: len(content) // 2])
    return path / "x.pth"


def a_program(path: Path) -> Path:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path / "x.pt")
    return path / "x.pt"


def parts_of_two_processes(path: Path) -> Path:
    (path / "llama").mkdir()
    for rank in (0, 1):  # each has a half of every matrix, under the same names
        torch.save({"layers.0.attention.wq.weight": torch.ones(2, 4)}, path / "llama" / f"consolidated.{rank:02}.pth")
    return path / "llama"


def parts_that_are_no_steps(path: Path) -> Path:
    (path / "parts").mkdir()
    state = peers.book().state_dict()
    names = sorted(state)
    for number, part in enumerate((names[:20], names[20:]), 1):
        torch.save({name: state[name] for name in part}, path / "parts" / f"part_{number}.pth")
    return path / "parts"


def an_optimizer(path: Path) -> Path:
    torch.save(torch.optim.AdamW(peers.book().parameters()).state_dict(), path / "optimizer.pth")
    return path / "optimizer.pth"


def two_models(path: Path) -> Path:
    torch.save({"generator": peers.book().state_dict(), "critic": peers.book_fast().state_dict()}, path / "x.pth")
    return path / "x.pth"


def another_config(path: Path) -> Path:
    peers.huggingface().save_pretrained(path / "hf")
    values = json.loads((path / "hf" / "config.json").read_text())
    (path / "hf" / "config.json").write_text(json.dumps({**values, "n_layer": 12}))
    return path / "hf"


def other_arguments(path: Path) -> Path:
    peers.nanogpt(path / "ckpt.pt")
    content = torch.load(path / "ckpt.pt", weights_only=True)
    content["model_args"]["block_size"] = 1024
    torch.save(content, path / "ckpt.pt")
    return path / "ckpt.pt"


def a_layer_missing(path: Path) -> Path:
    state = {name: value for name, value in peers.book().state_dict().items() if "trf_blocks.1." not in name}
    torch.save(state, path / "x.pth")
    return path / "x.pth"


def a_key_missing(path: Path) -> Path:
    state = {name: value for name, value in peers.book().state_dict().items() if name != "trf_blocks.1.att.W_key.weight"}
    torch.save(state, path / "x.pth")
    return path / "x.pth"


def a_wrong_shape(path: Path) -> Path:
    state = peers.book().state_dict()
    state["trf_blocks.2.ff.layers.0.weight"] = torch.ones(3, 64)
    torch.save(state, path / "x.pth")
    return path / "x.pth"


def merged_never(path: Path) -> Path:
    state = peers.book().state_dict()
    state["trf_blocks.0.att.W_query.lora.A"] = torch.ones(64, 4)
    torch.save(state, path / "x.pth")
    return path / "x.pth"


def not_a_state_dict(path: Path) -> Path:
    torch.save([1, 2, 3], path / "x.pth")
    return path / "x.pth"


def an_empty_folder(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def several_files(path: Path) -> Path:
    (path / "many").mkdir()
    for name in ("first.pth", "second.pth"):
        torch.save(peers.book().state_dict(), path / "many" / name)
    return path / "many"


def a_distributed_one_cut_short(path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": peers.book().state_dict()}, checkpoint_id=path / "step")
    file = next((path / "step").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10_000])
    return path / "step"


ZOO: dict[Callable[[Path], Path], str] = {
    two_halves: r"would both be 'tok_emb.weight': the file holds two models",
    a_shard_missing: r"names \d+ files, and 1 of them are missing \(model-00002",
    a_shard_missing_without_an_index: r"holds \d+ of \d+ files: number 2 is missing",
    a_wrong_index: r"index.json' is wrong: .* does not hold .*, which it is said to",
    an_index_that_points_outside: "names a file outside its folder",
    a_truncated_zip: "is cut short: it begins as a file of torch.save, and the list at its end is missing",
    a_program: "is a program of torch.jit.save: code",
    parts_of_two_processes: r"what several processes had of one model \(consolidated.00.pth, consolidated.01.pth\)",
    parts_that_are_no_steps: r"several files with weights \(part_1.pth, part_2.pth\): name one",
    an_optimizer: "holds the state of an optimizer, not of a model",
    two_models: "holds 2 models, 'generator', 'critic': say which with --part",
    another_config: "config.json says n_layer=12, and the tensors have 3",
    other_arguments: "model_args says block_size=1024, and the tensors have 24",
    a_layer_missing: "of its 3 layers, 1 is missing",
    a_key_missing: r"of 38 tensors 1 are missing, trf_blocks.1.att.W_query.weight",
    a_wrong_shape: r"trf_blocks.2.ff.layers.0.weight is \[3, 64\] as ours, and a model of this width needs \[256, 64\]",
    merged_never: "has LoRA's matrices .* which have to be merged",
    not_a_state_dict: "holds a list, not a state dict",
    an_empty_folder: "holds no weights, neither Onym's nor another program's",
    several_files: r"several files with weights \(first.pth, second.pth\): name one",
    a_distributed_one_cut_short: "is shorter than it was written, and holds a chunk of",
}


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.__name__)
def test_each_has_its_sentence(tmp_path: Path, animal: Callable[[Path], Path]) -> None:
    path = animal(tmp_path)
    with pytest.raises(CheckpointError, match=ZOO[animal]):
        onym.load_model(path)
    with pytest.raises(CheckpointError, match=ZOO[animal]):
        convert(path, tmp_path / "there", to="huggingface")
    assert not (tmp_path / "there").exists()


def test_of_two_models_one_can_be_chosen(tmp_path: Path) -> None:
    path = two_models(tmp_path)
    model = onym.load_model(path, part="critic")
    assert torch.equal(model.tok_emb.weight, peers_value(path, "critic"))


def peers_value(path: Path, part: str) -> torch.Tensor:
    return torch.load(path, weights_only=True)[part]["tok_emb.weight"]


# --- pickles with code ------------------------------------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SPRUNG}",)


SPRUNG = Path("sprung")


def within(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = {"state": {"inner": value}}
    return value


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("where", ["beside the model", "in the model", "in its place"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, where: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = dict(peers.book().state_dict())
    content = {
        "beside the model": {"model": state, "args": Trap()},
        "in the model": {"model": {**state, "trap": Trap()}},
        "in its place": Trap(),
    }[where]
    torch.save(within(depth, content), "x.pth", _use_new_zipfile_serialization=zipped)
    for use in (onym.load_model, onym.open_checkpoint):
        with pytest.raises(CheckpointError, match=r"would run code that is stored in it.*posix.system"):
            use("x.pth")
    with pytest.raises(CheckpointError, match="would run code"):
        convert("x.pth", "y.safetensors")
    assert not SPRUNG.exists()


def test_a_folder_with_such_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hf").mkdir()
    torch.save({"w": Trap()}, "hf/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        onym.load_model("hf")
    Path("sharded").mkdir()
    Path("sharded/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
    torch.save({"w": Trap()}, "sharded/a.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        onym.load_model("sharded")
    assert not SPRUNG.exists()


def test_the_metadata_of_a_distributed_checkpoint_may_name_its_own_classes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id="step")
    assert torch.equal(onym.open_checkpoint("step").tensor("w"), torch.ones(3))
    metadata = pickle.loads(Path("step/.metadata").read_bytes())
    metadata.planner_data = Trap()
    Path("step/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"asks for posix.system, which no checkpoint needs"):
        onym.open_checkpoint("step")
    file = next(Path("step").glob("*.distcp"))
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id="other")
    metadata = pickle.loads(Path("other/.metadata").read_bytes())
    torch.save({"w": Trap()}, "piece")
    content = Path("piece").read_bytes()
    info = next(iter(metadata.storage_data.values()))
    info.length, info.offset = len(content), 0
    Path("other/.metadata").write_bytes(pickle.dumps(metadata))
    Path("other", file.name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a chunk of (model\.)?w"):
        onym.open_checkpoint("other").tensor("w")
    assert not SPRUNG.exists()


def test_a_distributed_checkpoint_changes_no_class_of_torchs(tmp_path: Path) -> None:
    """BUILD sets what it likes on what it is given, and a class can be given: so none of torch's is."""
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    (tmp_path / "step").mkdir()
    before = {kind: dict(vars(kind)) for kind in (Metadata, MetadataIndex)}
    for kind in before:
        program = (
            b"\x80\x04c" + f"{kind.__module__}\n{kind.__name__}\n".encode()  # the class itself
            + b"N}\x8c\x08__hash__NsX\x05\x00\x00\x00bogusK\x01s\x86b."  # (None, {…}) is set on it
        )  # fmt: skip
        loaded = pickle.loads(program)
        assert loaded is kind, "pickle itself does it"
        assert loaded.bogus == 1
        for name in ("bogus", "__hash__"):
            if name in before[kind]:
                setattr(kind, name, before[kind][name])
            else:
                delattr(kind, name)
        (tmp_path / "step" / ".metadata").write_bytes(program)
        with pytest.raises(CheckpointError, match=r"is damaged|is no metadata"):
            onym.open_checkpoint(tmp_path / "step")
        assert dict(vars(kind)) == before[kind]


def test_everything_that_a_distributed_checkpoint_asks_for_is_told(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "step")
    metadata = pickle.loads((tmp_path / "step" / ".metadata").read_bytes())
    metadata.planner_data = [Trap(), {"deep": (eval, print)}]
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"asks for builtins.eval, builtins.print, posix.system, which no checkpoint needs"
    ):
        onym.open_checkpoint(tmp_path / "step")


@pytest.mark.parametrize("case", range(40))
def test_a_flipped_or_cut_file_is_never_wrong_values(tmp_path: Path, case: int) -> None:
    """Whatever is wrong with a file's bytes: a sentence, or the right values."""
    import random

    chance = random.Random(case)
    name = chance.choice(["x.pth", "ckpt.pt", "step", "hf"])
    model: Any = peers.book()
    if name == "x.pth":
        torch.save({"model": model.state_dict()}, tmp_path / name)
    elif name == "ckpt.pt":
        model = peers.nanogpt(tmp_path / name)
    elif name == "step":
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / name)
    else:
        model = peers.huggingface()
        torch.save(model.state_dict(), tmp_path / "x.bin")
        name = "x.bin"
    right = onym.load_model(tmp_path / name, n_heads=4).state_dict()
    path = tmp_path / name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 3])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    file.write_bytes(content)
    try:
        found = onym.load_model(path, n_heads=4).state_dict()
    except OnymError:
        return
    assert all(torch.equal(value, found[name]) for name, value in right.items())


def test_a_file_of_ours_is_no_foreign_one(tmp_path: Path) -> None:
    ours(tmp_path / "x.safetensors")
    assert onym.open_checkpoint(tmp_path / "x.safetensors").origin is None
