"""Files repaired in place: the old one is there until the new one is verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onym.convert.repair import repair
from onym.errors import CheckpointError, StorageError
from tests.convert import peers


def test_names_in_a_bare_state_dict(tmp_path: Path) -> None:
    model = peers.book()
    torch.save(torch.compile(model).state_dict(), tmp_path / "model.pth")
    repaired = repair(tmp_path / "model.pth")
    assert (repaired.wrappers, repaired.compared) == ({"_orig_mod": 47}, 47)
    peers.book().load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
    before = (tmp_path / "model.pth").read_bytes()
    assert repair(tmp_path / "model.pth").done == "nothing: its names are clean"
    assert (tmp_path / "model.pth").read_bytes() == before


def test_everything_else_in_the_file_stays(tmp_path: Path) -> None:
    peers.nanogpt(tmp_path / "ckpt.pt", compiled=True)
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    repair(tmp_path / "ckpt.pt")
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert list(after) == list(before)
    assert [f"_orig_mod.{name}" for name in after["model"]] == list(before["model"])
    assert all(torch.equal(value, after["model"][name.removeprefix("_orig_mod.")]) for name, value in before["model"].items())
    assert after["model"]["lm_head.weight"].data_ptr() == after["model"]["transformer.wte.weight"].data_ptr()
    assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    assert torch.equal(after["optimizer"]["state"][3]["exp_avg"], before["optimizer"]["state"][3]["exp_avg"])
    assert (after["iter_num"], after["config"]) == (before["iter_num"], before["config"])


def test_the_names_in_an_optimizers_groups(tmp_path: Path) -> None:
    model = torch.compile(peers.book())
    optimizer = torch.optim.AdamW(model.named_parameters())
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "x.pth")
    repair(tmp_path / "x.pth")
    groups = torch.load(tmp_path / "x.pth", weights_only=True)["optimizer_state_dict"]["param_groups"]
    assert groups[0]["param_names"][0] == "tok_emb.weight"


def test_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = peers.book().state_dict()
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "x.safetensors")
    repair(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    model = peers.huggingface()
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    right = json.loads(path.read_text())["weight_map"]
    assert repair(tmp_path / "hf").done == "nothing: its index fits its files"
    wrong = dict(right)
    first, *_, last = wrong
    wrong[first] = right[last]
    del wrong[last]
    path.write_text(json.dumps({"weight_map": wrong}))
    assert "the index now lists" in repair(tmp_path / "hf").done
    assert json.loads(path.read_text())["weight_map"] == right
    (tmp_path / "hf" / right[first]).unlink()
    with pytest.raises(CheckpointError, match="nowhere else, so fetch them again"):
        repair(tmp_path / "hf")


def test_a_dry_run_and_a_backup_in_the_way(tmp_path: Path) -> None:
    torch.save(torch.compile(peers.book()).state_dict(), tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    assert repair(tmp_path / "model.pth", dry_run=True).done == "47 of 47 tensors renamed"
    (tmp_path / "model.pth.bak").write_text("mine")
    with pytest.raises(StorageError, match=r"model.pth.bak' is there already"):
        repair(tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "model.pth.bak").read_text() == "mine"


def test_a_wrong_result_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onym.convert import repair as module

    torch.save(torch.compile(peers.book()).state_dict(), tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    real = module.write_pickle
    spoil = lambda value: value + 1 if isinstance(value, torch.Tensor) else value  # noqa: E731
    monkeypatch.setattr(
        module,
        "write_pickle",
        lambda path, content, size: real(path, {name: spoil(value) for name, value in content.items()}, size),
    )
    with pytest.raises(CheckpointError, match="is not the source's"):
        repair(tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_what_cannot_be_repaired_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="is no weight file, or it is damaged"):
        repair(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="nothing at"):
        repair(tmp_path / "absent.pth")


class Lit(torch.nn.Module):
    """What a Lightning module is to its checkpoint: the model is an attribute of it."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.model = torch.compile(peers.book()) if compiled else peers.book()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_module_really_calls_its_own_stays(tmp_path: Path, compiled: bool) -> None:
    torch.save({"state_dict": Lit(compiled).state_dict(), "epoch": 3, "pytorch-lightning_version": "2.6"}, tmp_path / "x.ckpt")
    before = (tmp_path / "x.ckpt").read_bytes()
    repair(tmp_path / "x.ckpt")
    Lit(False).load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"], strict=True)
    assert compiled or (tmp_path / "x.ckpt").read_bytes() == before


def test_no_prefix_is_added_that_another_class_of_the_same_program_has(tmp_path: Path) -> None:
    bare = peers.huggingface().transformer
    torch.save(bare.state_dict(), tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    assert repair(tmp_path / "x.pth").done == "nothing: its names are clean"
    assert (tmp_path / "x.pth").read_bytes() == before


def test_an_average_keeps_its_own_names(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(peers.book())
    torch.save(torch.compile(averaged).state_dict(), tmp_path / "x.pth")
    repair(tmp_path / "x.pth")
    averaged.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)


def test_what_else_is_in_the_file_is_said_to_be_left(tmp_path: Path) -> None:
    state = torch.compile(peers.book()).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": dict(state)}, tmp_path / "x.pth")
    assert "state_dict_ema left as it is" in repair(tmp_path / "x.pth").done


def test_shards_with_polluted_names_are_sent_to_convert(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "hf").mkdir()
    state = {f"_orig_mod.{name}": value.contiguous() for name, value in peers.book().state_dict().items()}
    placed = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, tmp_path / "hf" / file)
        placed |= dict.fromkeys(names, file)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(CheckpointError, match=r"onym convert .* writes them anew without; nothing was changed"):
        repair(tmp_path / "hf")


@pytest.mark.parametrize("map", [[1], {"a": [3]}, None, {"a": "../x.safetensors"}])
def test_an_index_that_is_none_has_its_sentence(tmp_path: Path, map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map}))
    with pytest.raises(CheckpointError, match="fetch them again"):
        repair(tmp_path)
