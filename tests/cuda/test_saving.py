"""What goes from a GPU into a file and back: the state at the call, through pinned memory, to where it is wanted."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onym
from onym import GPT, api
from onym.checkpoint.steps import step_folder
from onym.format.reader import read_checkpoint
from onym.state.optimizer import load_optimizer_state, optimizer_state
from onym.state.rng import rng_state
from tests.conftest import TINY
from tests.cuda.training import changed, new_stepper, on

# How torch computes AdamW's step decides where its counters are, and whether the rate may be a tensor.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "capturable": {"lr": 0.01, "capturable": True},
    "fused": {"lr": 0.01, "fused": True},
    "one kernel after the other": {"foreach": True},
}


def stored(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    checkpoint = read_checkpoint(step_folder(folder, step))
    assert checkpoint.manifest is not None
    files = [file for file in checkpoint.manifest.files if file.endswith(".safetensors")]
    return {f"{file}/{name}": value.clone() for file in files for name, value in checkpoint.tensors(file).state().items()}


def test_what_is_saved_is_the_state_at_the_call_while_steps_go_on(device: torch.device, tmp_path: Path) -> None:
    """Twice: the second time in the memory of the first, which on a GPU is pinned."""
    stepper = new_stepper(device, torch.bfloat16, optimizer="muon", ema=0.9)
    with onym.Checkpointer(tmp_path / "waiting", background=False) as waiting, onym.Checkpointer(tmp_path / "beside") as beside:
        places = []
        for step in (2, 4):
            for number in (step - 2, step - 1):
                stepper(on(device, number), 1e-2, number)
            waiting.save(step, stepper.state)
            data = [on(device, number) for number in (step, step + 1)]
            beside.save(step, stepper.state)
            for number, each in enumerate(data, step):
                stepper(each, 1e-2, number)
            beside.wait()
            buffers = beside._staging._buffers
            places.append({key: buffer.data_ptr() for key, buffer in buffers.items()})
            on_device = {buffer.is_pinned() for (file, _), buffer in buffers.items() if file == "model.safetensors"}
            assert on_device == {device.type == "cuda"}
    assert places[0] == places[1]
    for step in (2, 4):
        expected, found = stored(tmp_path / "waiting", step), stored(tmp_path / "beside", step)
        assert any("momentum" in name for name in expected)
        assert changed(expected, found) == []
    assert changed(stored(tmp_path / "beside", 2), stored(tmp_path / "beside", 4))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_restored_as_it_computes_here(device: torch.device, tmp_path: Path, kind: str) -> None:
    """Counters of steps where its kernel reads them; a rate that is a tensor stays that tensor, which a graph may have seen."""
    if device.type == "cpu" and kind == "capturable":
        pytest.skip("torch's capturable optimizers are a GPU's")
    options = OPTIMIZERS[kind]

    def trained(rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(device)
        own = {**options, "lr": torch.tensor(rate, device=device) if "lr" in options else rate}
        return model, torch.optim.AdamW(model.parameters(), **own)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = trained(0.01)
    for number in range(3):
        step(model, optimizer, number)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"model": model, "optimizer": optimizer})
    other, restored = trained(9.0)
    rate = restored.param_groups[0]["lr"]
    onym.Checkpointer(tmp_path).restore({"model": other, "optimizer": restored})
    beside = "cpu" if "foreach" in options else device.type
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert restored.state[theirs]["step"].device.type == beside
        assert restored.state[theirs]["exp_avg"].device.type == device.type
        assert changed(optimizer.state[mine], restored.state[theirs]) == []
    step(model, optimizer, 3)
    step(other, restored, 3)
    assert changed(dict(model.state_dict()), dict(other.state_dict())) == []
    if isinstance(rate, Tensor):
        assert restored.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.01)


def test_state_goes_from_a_cpu_to_the_device_and_back(device: torch.device) -> None:
    """A checkpoint of one machine is continued on another."""
    steppers = [new_stepper(where, optimizer="adamw") for where in (torch.device("cpu"), device, torch.device("cpu"))]
    for number in range(2):
        steppers[0](on(torch.device("cpu"), number), 1e-2, number)
    for source, target in itertools.pairwise(steppers):
        load_optimizer_state(target.model, target.optimizers, *optimizer_state(source.model, source.optimizers))
    first, middle, last = (optimizer_state(each.model, each.optimizers)[0] for each in steppers)
    assert {value.device.type for value in middle.values()} == {device.type}
    assert changed(first, last) == []


def test_draws_go_on_where_they_were_saved(device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5, device=device)
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
    expected = torch.rand(7, device=device), torch.rand(7)
    torch.manual_seed(4)
    onym.Checkpointer(tmp_path).restore({"model": model})
    assert torch.equal(torch.rand(7, device=device), expected[0])
    assert torch.equal(torch.rand(7), expected[1])
    if device.type == "cuda":
        assert {f"rng.cuda.{index}" for index in range(torch.cuda.device_count())} <= rng_state()[0].keys()


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_does_not_say_where_the_model_was(device: torch.device, tmp_path: Path, ending: str) -> None:
    """The same bytes as from main memory, so that it opens where there is no GPU."""
    here = GPT(TINY)
    there = copy.deepcopy(here).to(device)
    with torch.no_grad():  # not the copy's memory, and in another order
        there.tok_emb.weight.data = there.tok_emb.weight.t().contiguous().t()
    paths = [tmp_path / f"{name}{ending}" for name in ("here", "there")]
    for model, path in zip((here, there), paths, strict=True):
        onym.save(model, path)
    if ending == ".safetensors":
        assert paths[0].read_bytes() == paths[1].read_bytes()
    else:
        assert {value.device.type for value in torch.load(paths[1], weights_only=True).values()} == {"cpu"}
    for path in paths:
        fresh = GPT(TINY)
        onym.load(path, into=fresh)
        assert changed(dict(fresh.state_dict()), dict(here.state_dict())) == []


def test_a_model_is_loaded_straight_to_the_device(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is there before the first tensor is read, so it is never in main memory as a whole."""
    model = GPT(TINY)
    onym.save(model, tmp_path / "model.safetensors")
    where: list[set[str]] = []
    load = api.load_state_dict

    def loading(into: nn.Module, *args: Any, **options: Any) -> Any:
        where.append({each.device.type for each in into.parameters()})
        return load(into, *args, **options)

    monkeypatch.setattr(api, "load_state_dict", loading)
    found = onym.load_model(tmp_path / "model.safetensors", device=device)
    assert where == [{device.type}]
    assert {each.device.type for each in found.state_dict().values()} == {device.type}
    assert changed(dict(model.state_dict()), {name: each.cpu() for name, each in found.state_dict().items()}) == []
    assert found(on(device, 0)[0]).device.type == device.type


def test_what_torch_saved_there_loads_anywhere(device: torch.device, tmp_path: Path) -> None:
    """A plain ``torch.save`` of a model on the device, whose tensors say that they were there."""
    torch.manual_seed(1)
    model = GPT(TINY).to(device)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for where in ("cpu", device):
        fresh = GPT(TINY).to(where)
        onym.load(tmp_path / "model.pth", into=fresh)
        assert {each.device.type for each in fresh.parameters()} == {torch.device(where).type}
        mine, theirs = ({name: each.cpu() for name, each in each.state_dict().items()} for each in (model, fresh))
        assert changed(mine, theirs) == []
