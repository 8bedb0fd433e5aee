"""Accelerate's own save_state and load_state, durable and under the models' own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onym
from onym.errors import CheckpointError, OnymError, StorageError

pytest.importorskip("accelerate")
from accelerate import Accelerator

from onym.integrations.accelerate import last_checkpoint, load_state, save_state
from onym.integrations.sealed import SEAL
from tests.integrations.killing import killed_at_random_and_run_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    """A training loop as Accelerate's users write it."""

    def __init__(self, compiled: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, **options)
        net: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        net = torch.compile(net, backend="eager") if compiled else net
        values = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        data = DataLoader(TensorDataset(values, values.sum(1, keepdim=True)), batch_size=8, shuffle=True)
        optimizer = torch.optim.AdamW(net.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        self.net, self.optimizer, self.data, self.schedule = self.accelerator.prepare(net, optimizer, data, schedule)

    def train(self, first: int, last: int, folder: Path | None = None) -> None:
        for epoch in range(first, last):
            self.data.set_epoch(epoch)  # which Accelerate does not save
            for x, y in self.data:
                self.optimizer.zero_grad()
                self.accelerator.backward(((self.net(x) - y) ** 2).mean())
                self.optimizer.step()
                self.schedule.step()
            if folder is not None:
                save_state(self.accelerator, folder / f"epoch-{epoch + 1}")

    def values(self) -> dict[str, torch.Tensor]:
        return {name.replace("_orig_mod.", ""): value.clone() for name, value in self.net.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, True), (True, False), (False, True)])
def test_resumed_bit_for_bit_compiled_or_not(tmp_path: Path, before: bool, after: bool) -> None:
    straight = Run()
    straight.train(0, 4)
    Run(before).train(0, 2, tmp_path)
    resumed = Run(after)
    last = last_checkpoint(tmp_path)
    assert last == str(tmp_path / "epoch-2")
    load_state(resumed.accelerator, last)
    resumed.train(2, 4)
    assert same(straight.values(), resumed.values())
    plain = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    onym.load(tmp_path / "epoch-2" / "model.safetensors", into=plain)
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "epoch-2" / "model.safetensors")) == set(plain.state_dict())


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = Run()
    save_state(run.accelerator, tmp_path / "step-1")
    (tmp_path / "step-1" / "more").write_text("of the user's")
    save_state(run.accelerator, tmp_path / "step-1")
    assert [each.name for each in tmp_path.iterdir()] == ["step-1"]
    assert not (tmp_path / "step-1" / "more").exists()


def test_damage_changes_nothing(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 2, tmp_path)
    before = run.values()
    assert last_checkpoint(tmp_path) == str(tmp_path / "epoch-2"), "sealed by now"
    for file in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        path = tmp_path / "epoch-2" / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{file}' is damaged"):
            load_state(run.accelerator, tmp_path / "epoch-2")
        with pytest.warns(UserWarning, match="Passed over"):
            assert last_checkpoint(tmp_path) == str(tmp_path / "epoch-1")
        path.write_bytes(content)
    assert same(before, run.values())
    with pytest.raises(CheckpointError):
        load_state(run.accelerator, tmp_path / "missing")


def test_another_model_is_said(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 1, tmp_path)
    other = Accelerator(cpu=True)
    other._models.clear()
    other.prepare(nn.Linear(4, 8))
    with pytest.raises(OnymError, match="weight"):
        load_state(other, tmp_path / "epoch-1")


def test_a_disk_that_refuses_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onym.storage.disk import disk

    run = Run()
    save_state(run.accelerator, tmp_path / "step-1", background=False)
    before = run.values()
    run.train(0, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "flush", full)
        with pytest.raises(StorageError, match="the disk is full"):
            save_state(run.accelerator, tmp_path / "step-1")
        with pytest.raises(StorageError, match="the disk is full"):
            save_state(run.accelerator, tmp_path / "step-2", background=False)
    assert [each.name for each in tmp_path.iterdir()] == ["step-1"]
    load_state(run.accelerator, tmp_path / "step-1")
    assert same(before, run.values())


def test_a_failure_in_the_background_is_said_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onym.storage.disk import disk

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    run = Run()
    with monkeypatch.context() as patched:
        patched.setattr(disk, "flush", full)
        save_state(run.accelerator, tmp_path / "step-1")
        with pytest.raises(StorageError, match="the disk is full"):
            save_state(run.accelerator, tmp_path / "step-2")
    assert [each.name for each in tmp_path.iterdir()] == ["step-1"], "without a seal"
    with pytest.warns(UserWarning, match="unfinished"):
        assert last_checkpoint(tmp_path) is None
    save_state(run.accelerator, tmp_path / "step-3", background=False)
    assert (tmp_path / "step-3" / SEAL).exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "step-3")


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from tests.integrations.test_accelerate import Run, last_checkpoint, load_state
run, folder = Run(), Path(sys.argv[1])
last = last_checkpoint(folder)
if last is not None:
    load_state(run.accelerator, last)
run.train(int(last.rpartition("-")[2]) if last else 0, 12, folder)
torch.save(run.values(), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight = Run()
    straight.train(0, 12)
    end = killed_at_random_and_run_to_the_end(PROGRAM, tmp_path / "b", lambda: set((tmp_path / "b").glob("epoch-*")), 5)
    assert same(straight.values(), end)
