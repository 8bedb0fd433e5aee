"""Accelerate: several processes, several models, objects of the user's own, and options that would not go together."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onym.errors import CheckpointError, ConfigError

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from onym.integrations.accelerate import load_state, save_state
from tests.integrations.test_accelerate import Run, same

pytestmark = pytest.mark.filterwarnings("ignore")


class Own:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def fresh(*models: nn.Module) -> Any:
    accelerator = Accelerator(cpu=True)
    accelerator._models.clear()
    accelerator._custom_objects.clear()
    return accelerator, *(accelerator.prepare(model) for model in models)


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}])
def test_several_models_and_objects(tmp_path: Path, options: dict[str, Any]) -> None:
    accelerator, _, _ = fresh(nn.Linear(2, 1), torch.compile(nn.Linear(3, 1), backend="eager"))
    accelerator.register_for_checkpointing(Own(7))
    save_state(accelerator, tmp_path / "x", **options)
    saved = [model.state_dict() for model in accelerator._models]
    other, one, two = fresh(torch.compile(nn.Linear(2, 1), backend="eager"), nn.Linear(3, 1))
    own = Own(0)
    other.register_for_checkpointing(own)
    load_state(other, tmp_path / "x")
    assert own.value == 7
    assert torch.equal(one._orig_mod.weight, saved[0]["weight"])
    assert torch.equal(two.weight, saved[1]["_orig_mod.weight"])
    if not options:
        assert set(load_file(tmp_path / "x" / "model_1.safetensors")) == {"weight", "bias"}


def test_more_models_than_were_saved_is_said(tmp_path: Path) -> None:
    for options in ({}, {"safe_serialization": False}):
        accelerator, _ = fresh(nn.Linear(2, 1))
        save_state(accelerator, tmp_path / "x", **options)
        other, _, _ = fresh(nn.Linear(2, 1), nn.Linear(2, 1))
        with pytest.raises(CheckpointError, match="has 1 models, and 2 are prepared"):
            load_state(other, tmp_path / "x")


def test_an_attribute_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 1)
    accelerator, _ = fresh(model)
    save_state(accelerator, tmp_path / "x")
    assert set(load_file(tmp_path / "x" / "model.safetensors")) == {"module.weight", "module.bias"}
    before = model.module.weight.detach().clone()
    model.module.weight.data.zero_()
    load_state(accelerator, tmp_path / "x")
    assert torch.equal(model.module.weight, before)


def test_tied_weights(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model

    accelerator, model = fresh(tied())
    save_state(accelerator, tmp_path / "x")
    other, again = fresh(tied())
    load_state(other, tmp_path / "x")
    assert torch.equal(again[1].weight, model[0].weight)
    assert again[1].weight is again[0].weight


def test_strict_is_passed_on(tmp_path: Path) -> None:
    accelerator, model = fresh(nn.Sequential(nn.Linear(2, 1)))
    save_state(accelerator, tmp_path / "x")
    other, again = fresh(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)))
    load_state(other, tmp_path / "x", strict=False)
    assert torch.equal(again[0].weight, model[0].weight)


def test_names_that_accelerate_gives_are_refused(tmp_path: Path) -> None:
    accelerator, _ = fresh(nn.Linear(2, 1))
    accelerator.project_configuration = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    with pytest.raises(ConfigError, match="automatic_checkpoint_naming"):
        save_state(accelerator, tmp_path / "x")
    assert not list(tmp_path.iterdir())


PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from accelerate.utils import DataLoaderConfiguration
from onym.storage.disk import disk
from tests.integrations.test_accelerate import *
folder, last, compiled = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "compiled"
run = Run(compiled, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
assert run.accelerator.num_processes == 2
torch.manual_seed(run.accelerator.process_index)
found = last_checkpoint(folder)
if found is not None:
    load_state(run.accelerator, found)
run.train(int(found.rpartition("-")[2]) if found else 0, last, folder)
state = [run.values(), torch.rand(2)]
def full(descriptor):
    raise OSError(28, "No space left on device")
kept = disk.flush
if run.accelerator.is_main_process:
    disk.flush = full
try:
    save_state(run.accelerator, folder / "epoch-99", background=False)
except OnymError as error:
    print("REFUSED", flush=True)
disk.flush = kept
if run.accelerator.is_main_process:
    (folder / f"epoch-{last}" / "optimizer.bin").write_bytes(b"damaged")
run.accelerator.wait_for_everyone()
try:
    load_state(run.accelerator, folder / f"epoch-{last}")
except OnymError as error:
    print("DAMAGED", flush=True)
torch.save(state, folder.with_name(f"{folder.name}-{run.accelerator.process_index}.pth"))
os._exit(0)  # a thread of gloo that lets go of a tensor while Python ends is a SIGABRT (torch 2.13)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def run(folder: str, last: int, kind: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        said = subprocess.run(
            [*command, str(tmp_path / "program.py"), str(tmp_path / folder), str(last), kind], timeout=180, check=True,
            text=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, stdout=subprocess.PIPE,
        ).stdout  # fmt: skip
        assert said.count("REFUSED") == said.count("DAMAGED") == 2, "no process waits for one that failed"

    run("straight", 4, "plain")
    run("resumed", 3, "compiled")
    run("resumed", 4, "plain")
    for rank in range(2):
        (one, drawn), (two, again) = (torch.load(tmp_path / f"{name}-{rank}.pth") for name in ("straight", "resumed"))
        assert same(one, two)
        assert torch.equal(drawn, again)
    assert set(load_file(tmp_path / "resumed" / "epoch-4" / "model.safetensors")) == set(Run().net.state_dict())
