"""Where the model is in the folders that trainers write: found, or the way to it is said."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import onym
from onym.cli.main import main
from onym.errors import CheckpointError, NoWeightsError

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)


def loads(path: Path, model: nn.Module, **options: Any) -> None:
    other = Model()
    onym.load(path, into=other, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------------


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class AppState:
    """PyTorch's tutorial."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, optimizer_of(model)

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: Any) -> None: ...


def states(model: nn.Module) -> dict[str, tuple[dict[str, Any], str | None]]:
    state = model.state_dict()
    other = {name: value + 1 for name, value in state.items()}
    rng = torch.get_rng_state()
    return {
        "rng beside it": ({"model": state, "rng": rng}, "model"),
        "rngs beside it": ({"model": state, "rng_state": {"torch": rng, "cuda": rng}}, "model"),
        "a scalar beside it": ({"net": state, "step": torch.tensor(3), "epoch": 4}, "net"),
        "an average beside it": ({"model": state, "ema": other}, "model"),
        "the tutorial's": ({"app": AppState(model)}, "app.model"),
        "a trainer's": ({"state": {"model": state, "optimizer": optimizer_of(model).state_dict()}, "loss": 3.0}, "state.model"),
        "alone": (dict(state), None),
        "at the root, with an optimizer": ({**state, "optimizer": {"state.first.weight.exp_avg": other["first.weight"]}}, None),
        "with the loop's state": ({"model": state, "train_state": {"step": torch.tensor(1)}, "dataloader": {"0": 1}}, "model"),
    }


@pytest.mark.parametrize("name", states(Model()))
def test_dcp_with_other_things_beside_the_model(tmp_path: Path, name: str) -> None:
    model = Model()
    content, within = states(model)[name]
    model.load_state_dict(model.state_dict())
    right = {key: value.clone() for key, value in model.state_dict().items()}
    if name == "the tutorial's":
        right = {key: value.clone() for key, value in content["app"].model.state_dict().items()}
    dcp.save(content, checkpoint_id=tmp_path / "step", no_dist=True)
    found = onym.open_checkpoint(tmp_path / "step")
    assert found.origin.contents.within == within
    assert set(found.names) == set(right)
    loads(tmp_path / "step", model)
    assert main(["convert", str(tmp_path / "step"), str(tmp_path / "x.safetensors")]) == 0
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "x.safetensors")) == set(right)
    if name == "an average beside it":
        assert torch.equal(
            onym.open_checkpoint(tmp_path / "step", part="ema").tensor("first.bias"), content["ema"]["first.bias"]
        )


def test_dcp_with_two_models_asks_which(tmp_path: Path) -> None:
    state = Model().state_dict()
    dcp.save({"actor": state, "critic": state}, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(CheckpointError, match=r"holds 2 models, 'actor', 'critic': say which with --part"):
        onym.open_checkpoint(tmp_path / "step")
    assert "first.weight" in onym.open_checkpoint(tmp_path / "step", part="critic").names


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_files_of_pytorchs_huggingface_writer(tmp_path: Path, distributed: bool, files: int) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    model = Model()
    state = {name: value for name, value in model.state_dict().items() if value.dim()}
    index = {name: 1 + number % files for number, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(str(tmp_path / "x"), fqn_to_index_mapping=index, save_distributed=distributed)
    dcp.save(state, storage_writer=writer, no_dist=True)
    found = onym.open_checkpoint(tmp_path / "x")
    assert set(found.names) == set(state)
    assert all(torch.equal(found.tensor(name), value) for name, value in state.items())


def test_files_of_pytorchs_huggingface_writer_of_several_ranks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = torch.arange(30.0).reshape(5, 6)
    pieces = {1: (whole[:3], [0, 0]), 2: (whole[3:], [3, 0])}
    for rank, (piece, offsets) in pieces.items():
        import json

        info = {"w": {"saved_offsets": offsets}, "b": {"saved_offsets": [0]}}
        tensors = {"w": piece.contiguous(), "b": torch.ones(2)}  # b is replicated
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, tmp_path / name, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0"})
    found = onym.open_checkpoint(tmp_path)
    assert torch.equal(found.tensor("w"), whole)
    assert torch.equal(found.tensor("b"), torch.ones(2))
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks what rank 1 wrote"):
        onym.open_checkpoint(tmp_path)


@pytest.mark.parametrize("pieces", [[(0, 2, torch.float32), (1, 1, torch.float32), (3, 1, torch.float32)],
                                    [(0, 2, torch.float32), (2, 2, torch.int32)]], ids=["a hole", "another dtype"])  # fmt: skip
def test_chunks_that_do_not_make_up_the_tensor(tmp_path: Path, pieces: list[tuple[int, int, torch.dtype]]) -> None:
    """The number of elements is right in both."""
    import json

    from safetensors.torch import save_file

    for rank, (start, count, dtype) in enumerate(pieces, 1):
        info = json.dumps({"w": {"saved_offsets": [start]}})
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file({"w": torch.ones(count, dtype=dtype)}, tmp_path / name, {"DCP_SHARDING_INFO": info})
    with pytest.raises(CheckpointError, match="has chunks"):
        onym.open_checkpoint(tmp_path)


def odd_metadata() -> dict[str, Any]:
    """What is changed in a good ``.metadata``, by a function."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    def paths(value: Any) -> Any:
        return lambda content: setattr(content, "planner_data", value)

    def chunks(size: list[int], *offsets: int) -> Any:
        def change(content: Any) -> None:
            entry = content.state_dict_metadata["model.first.weight"]
            stored = next(info for index, info in content.storage_data.items() if index.fqn == "model.first.weight")
            entry.size = torch.Size(size)
            entry.chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([3, 4])) for at in offsets]
            content.storage_data |= {MetadataIndex("model.first.weight", each.offsets): stored for each in entry.chunks}

        return change

    itself: list[Any] = []
    itself.append(itself)
    odd: list[Any] = [5, None, ([],), ({}, "x"), itself]
    return {
        **{f"paths {str(each)[:20]}": paths({"model.first.weight": each}) for each in odd},
        "no paths": lambda content: delattr(content, "planner_data"),
        "two at one place": paths({"model.first.weight": ("model", "first.bias")}),
        "the same bytes again and again": chunks([3 * 20_000, 4], *range(0, 3 * 20_000, 3)),
        "an overlap and a hole": chunks([9, 4], 0, 1, 6),
        "another rank": chunks([12], 0),
    }


@pytest.mark.parametrize("name", odd_metadata())
def test_odd_metadata_of_dcp(tmp_path: Path, name: str) -> None:
    import pickle

    model = Model()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "x", no_dist=True)
    content = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    odd_metadata()[name](content)
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(content))
    if "paths" in name:
        loads(tmp_path / "x", model)
        return
    with pytest.raises(CheckpointError):
        onym.open_checkpoint(tmp_path / "x")


# --- DeepSpeed --------------------------------------------------------------------------------------------------------------


def deepspeed(folder: Path, model: nn.Module, stage: int) -> None:
    """The files that DeepSpeed 0.1x writes, as its engine names and fills them."""
    step = folder / "global_step10"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("# DeepSpeed's script\n")
    common = {"ds_config": {"train_batch_size": 2}, "ds_version": "0.17.0", "args": argparse.Namespace(), "global_steps": 10}
    state = model.state_dict()
    if stage == 3:
        state = {name: torch.empty(0) for name in state}
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save({"module": state, "buffer_names": [], "optimizer": None, "param_shapes": [], **common}, step / name)
    flat = torch.cat([value.flatten().float() for value in model.state_dict().values()])
    inner = {
        "zero_stage": stage,
        "fp32_flat_groups": [flat],
        "single_partition_of_fp32_groups": [flat],
        "loss_scaler": common["args"],
    }
    torch.save({"optimizer_state_dict": inner, **common}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_folder(tmp_path: Path, stage: int) -> None:
    model = Model()
    deepspeed(tmp_path / "ds", model, stage)
    loads(tmp_path / "ds", model)
    loads(tmp_path / "ds" / "global_step10", model)


def test_deepspeeds_zero_3_names_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deepspeed(tmp_path / "ds", Model(), 3)
    for path in (tmp_path / "ds", tmp_path / "ds" / "global_step10"):
        with pytest.raises(CheckpointError, match=r"ZeRO-3 checkpoint of DeepSpeed.*zero_to_fp32.py"):
            onym.load(path, into=Model())
    assert main(["inspect", str(tmp_path / "ds")]) == 2
    assert "zero_to_fp32.py" in capsys.readouterr().err


# --- Hugging Face -----------------------------------------------------------------------------------------------------------


def test_a_trainers_output_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = {step: Model() for step in (9, 10, 100)}
    for step, model in models.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save(optimizer_of(model).state_dict(), folder / "optimizer.pt")
        save_file(model.state_dict(), folder / "model.safetensors")
        torch.save({"last_epoch": 3}, folder / "scheduler.pt")
        rng = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        torch.save(rng, folder / "rng_state.pth")
        torch.save(argparse.Namespace(lr=1), folder / "training_args.bin")
    (tmp_path / "runs").mkdir()
    loads(tmp_path, models[100])
    loads(tmp_path / "checkpoint-9", models[9])


def test_the_cache_of_huggingface_hub(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Model()
    root = tmp_path / "models--me--mine"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc123")
    save_file(model.state_dict(), root / "blobs" / "0123")
    for revision in ("abc123", "other"):
        (root / "snapshots" / revision).mkdir(parents=True)
    (root / "snapshots" / "abc123" / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    loads(root, model)
    loads(root / "snapshots" / "abc123", model)


@pytest.mark.parametrize("said", ["../outside", "/etc", "", "missing", "a/b"])
def test_a_pointer_out_of_the_folder_is_not_followed(tmp_path: Path, said: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    torch.save(Model().state_dict(), outside / "x.pth")
    for name in ("latest", "last_checkpoint"):
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / name).write_text(said)
        with pytest.raises(NoWeightsError, match="holds no weights"):
            onym.open_checkpoint(folder)


def test_folders_that_lead_to_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors.index.json"}}')
    (tmp_path / "deep").joinpath(*["step1"] * 600).mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model").symlink_to(".")
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "latest").write_text("latest")
    for name in ("index", "deep", "link", "latest"):
        with pytest.raises(CheckpointError):
            onym.open_checkpoint(tmp_path / name)
        assert main(["inspect", str(tmp_path / name)]) == 2
    capsys.readouterr()


def test_a_pointer_to_a_file(tmp_path: Path) -> None:
    """As detectron2 has it; with several files none of which is the newest by its name."""
    model = Model()
    (tmp_path / "last_checkpoint").write_text("model_final.pkl")
    torch.save({"model": model.state_dict(), "iteration": 3, "x": argparse.Namespace()}, tmp_path / "model_final.pkl")
    loads(tmp_path, model)
