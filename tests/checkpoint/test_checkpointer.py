"""A training loop's checkpoints: as the state was at the call, exact on the way back, and never fewer than promised."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onym
from onym.checkpoint import checkpointer as keeping
from onym.checkpoint.steps import step_folder
from onym.errors import CheckpointError, ConfigError, StorageError
from onym.format import tensor_writing, writer
from onym.format.reader import read_checkpoint
from onym.names.mismatch import MismatchError
from onym.storage import local
from onym.storage.disk import Disk


class Loop:
    """A small training with everything in it that a real one has."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> None:
        self.model = wrap(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
        self.ema = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        self.history: dict[str, Any] = {"losses": [], "best": float("inf"), "seen": torch.zeros(3)}

    @property
    def state(self) -> dict[str, Any]:
        names = ("model", "ema", "optimizer", "scheduler", "scaler", "history")
        return {name: getattr(self, name) for name in names}

    def step(self) -> None:
        inputs = torch.randn(5, 4) + random.random() + float(np.random.rand())
        loss = self.model(inputs).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.history["losses"].append(loss.item())
        self.history["best"] = min(self.history["best"], loss.item())
        self.history["seen"][0] += 1


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in onym.state_dict(model).items()}


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    return wrapped  # type: ignore[no-any-return]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("before", "after"), [(lambda m: m, lambda m: m), (compiled, lambda m: m), (lambda m: m, compiled)])
def test_a_training_goes_on_as_if_nothing_had_been(tmp_path: Path, background: bool, before: Any, after: Any) -> None:
    loop = Loop(before)
    with onym.Checkpointer(tmp_path, background=background) as checkpointer:
        for step in range(1, 7):
            loop.step()
            if step == 3:
                checkpointer.save(3, loop.state, {"loss": loop.history["losses"][-1]})
    torch.manual_seed(99)
    again = Loop(after)
    losses = again.history["losses"]
    restored = onym.Checkpointer(tmp_path).restore(again.state)
    assert (restored.step, restored.skipped) == (3, [])
    assert again.history["losses"] is not losses, "a dict is filled in place, what is in it is new"
    for _ in range(3):
        again.step()
    assert again.history["losses"] == loop.history["losses"]
    assert torch.equal(again.history.pop("seen"), loop.history.pop("seen"))
    assert again.history == loop.history
    assert_same(weights(again.model), weights(loop.model))
    assert again.scheduler.state_dict() == loop.scheduler.state_dict()
    assert again.scaler.state_dict() == loop.scaler.state_dict()


def test_what_is_kept_is_the_state_at_the_call(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = {"n": [1, 2], "t": torch.ones(3)}
    expected = weights(model)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer, "values": values})
        with torch.no_grad():  # at once, before anything can have been written
            for parameter in model.parameters():
                parameter.fill_(7)
        values["n"].append(3)
        values["t"].zero_()
        optimizer.param_groups[0]["lr"] = 5.0
    found = read_checkpoint(step_folder(tmp_path, 1))
    assert_same(found.model.state(), expected)
    fresh = torch.optim.SGD(model.parameters(), lr=0.3)
    restored = onym.Checkpointer(tmp_path).restore({"model": model, "optimizer": fresh})
    assert restored.values["values"]["n"] == [1, 2]
    assert torch.equal(restored.values["values"]["t"], torch.ones(3))
    assert fresh.param_groups[0]["lr"] == 0.1


def test_the_files_are_anybodys(tmp_path: Path) -> None:
    """Stock safetensors, plain JSON, and the functions for a model alone."""
    from safetensors.torch import load_file

    model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=50))
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, {"net": torch.compile(model)}, {"val_loss": 2.5}, files={"notes.txt": "hello"})
    folder = step_folder(tmp_path, 5)
    assert_same(load_file(folder / "model.safetensors"), weights(model))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 50
    assert json.loads((folder / "manifest.json").read_text())["metrics"] == {"val_loss": 2.5}
    assert read_checkpoint(folder).text("notes.txt") == "hello"
    assert_same(weights(onym.load_model(tmp_path)), weights(model))
    other = onym.GPT(model.config)
    onym.load(folder, into=other)
    assert_same(weights(other), weights(model))


def test_a_checkpoint_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.save(2, {"model": model})
        with torch.no_grad():
            model.bias.add_(1)
        checkpointer.save(3, {"model": model})
    first, second, third = (read_checkpoint(step_folder(tmp_path, step)) for step in (1, 2, 3))
    assert first.identity == second.identity != third.identity
    assert third.provenance["parent"] == {"step": 2, "identity": second.identity}
    assert "parent" not in first.provenance
    assert third.provenance["torch"] == torch.__version__
    onym.save(model, tmp_path / "x.safetensors")
    assert read_checkpoint(tmp_path / "x.safetensors").identity == third.identity
    with onym.Checkpointer(tmp_path) as again:
        again.restore({"model": model}, step=2)
        again.save(4, {"model": model})
    assert read_checkpoint(step_folder(tmp_path, 4)).provenance["parent"]["step"] == 2


def test_nothing_yet_is_none_and_a_damaged_step_is_passed_over(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    assert onym.Checkpointer(tmp_path / "new").restore({"model": model}).step is None
    assert not (tmp_path / "new").exists(), "reading leaves nothing behind"
    with onym.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"model": model})
    file = step_folder(tmp_path, 2) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    restored = onym.Checkpointer(tmp_path).restore({"model": model})
    assert restored.step == 1
    assert [path for path, _ in restored.skipped] == [step_folder(tmp_path, 2)]
    assert "is damaged" in restored.skipped[0][1]
    with pytest.raises(CheckpointError, match="is damaged"):
        onym.Checkpointer(tmp_path).restore({"model": model}, step=2)
    with pytest.raises(CheckpointError, match="no step 7; it has 1, 2"):
        onym.Checkpointer(tmp_path).restore({"model": model}, step=7)


# --- retention -------------------------------------------------------------------------------------------------------------


def test_what_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    losses = [9.0, 3.0, 5.0, float("nan"), 4.0, 6.0, 7.0, 8.0, 8.5, 8.6]
    with onym.Checkpointer(tmp_path, keep_last=2, keep_every=5, keep_best="loss") as checkpointer:
        for step, loss in enumerate(losses, start=1):
            checkpointer.save(step, {"model": model}, {"loss": loss})
            if step == 3:
                checkpointer.pin(3, "before-the-spike")
    assert checkpointer.steps == [2, 3, 5, 9, 10]
    assert onym.Checkpointer(tmp_path).restore({"model": model}, step="before-the-spike").step == 3
    checkpointer.unpin("before-the-spike")
    with onym.Checkpointer(tmp_path, keep_last=1, keep_best="loss:max") as checkpointer:
        checkpointer.save(11, {"model": model}, {"loss": 1.0})
    assert checkpointer.steps == [10, 11]


def test_nothing_is_deleted_before_the_successor_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    with onym.Checkpointer(tmp_path, keep_last=1, background=False) as checkpointer:
        checkpointer.save(1, {"model": model})
        real = keeping.write_folder

        def lying(path: Path, *given: Any, **named: Any) -> Any:
            """A disk that took everything and kept something else."""
            manifest = real(path, *given, **named)
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"\x55")
            return manifest

        monkeypatch.setattr(keeping, "write_folder", lying)
        with pytest.raises(StorageError, match="does not read back"):
            checkpointer.save(2, {"model": model})
    assert onym.Checkpointer(tmp_path).restore({"model": model}).step == 1


def test_what_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that the disk does not give any more, among the numbers of a tensor."""
    model = nn.Linear(3, 2)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.save(2, {"model": model})
    real = os.pread

    def unreadable(descriptor: int, length: int, position: int) -> bytes:
        file = os.fstat(descriptor)
        bad = step_folder(tmp_path, 2) / "model.safetensors"
        if position > 8 and (file.st_dev, file.st_ino) == (bad.stat().st_dev, bad.stat().st_ino):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, length, position)

    monkeypatch.setattr(os, "pread", unreadable)
    restored = onym.Checkpointer(tmp_path).restore({"model": model})
    assert restored.step == 1
    assert "cannot be read: Input/output error" in restored.skipped[0][1]


def test_a_deletion_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(disk: Disk, path: Path) -> None:
        raise PermissionError(errno.EACCES, "no")

    model = nn.Linear(3, 2)
    with onym.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "remove_file", refusing)
            checkpointer.save(2, {"model": model})
            checkpointer.wait()
        assert any("could not be deleted" in note for note in checkpointer.notes)
        assert onym.Checkpointer(tmp_path).restore({"model": model}).step == 2
        checkpointer.save(3, {"model": model})
    assert os.listdir(tmp_path) == ["step-000000003"]


# --- in the background -----------------------------------------------------------------------------------------------------


class Held:
    """A disk that waits to be let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.go = threading.Event()
        self.started = threading.Event()
        real = Disk.flush

        def flush(disk: Disk, descriptor: int) -> None:
            self.started.set()
            assert self.go.wait(30)
            if error is not None:
                raise error
            real(disk, descriptor)

        monkeypatch.setattr(Disk, "flush", flush)


def test_a_second_save_waits_or_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    checkpointer = onym.Checkpointer(tmp_path, on_busy="skip")
    held = Held(monkeypatch)
    assert checkpointer.save(1, {"model": model})
    assert held.started.wait(30)
    assert not checkpointer.save(2, {"model": model})
    assert checkpointer.notes == ["Step 2 was not saved: the one before is still being written."]
    assert checkpointer.progress is not None
    assert (checkpointer.progress.step, checkpointer.progress.done) == (1, False)
    held.go.set()
    checkpointer.wait()
    assert checkpointer.progress.done
    assert checkpointer.progress.bytes_written == checkpointer.progress.bytes_total > 32
    checkpointer._on_busy = "wait"
    assert checkpointer.save(3, {"model": model})
    assert checkpointer.save(4, {"model": model})
    checkpointer.close()
    assert checkpointer.steps == [1, 3, 4]


@pytest.mark.parametrize("where", ["save", "wait", "close", "with"])
def test_an_error_is_told_once_and_the_next_save_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model = nn.Linear(3, 2)
    checkpointer = onym.Checkpointer(tmp_path)
    checkpointer.save(1, {"model": model})
    checkpointer.wait()
    with monkeypatch.context() as patch:
        held = Held(patch, OSError(errno.EIO, "Input/output error"))
        held.go.set()
        checkpointer.save(2, {"model": model})
        while checkpointer._task.busy:
            pass
    with pytest.raises(StorageError, match="Input/output error"):
        if where == "save":
            checkpointer.save(3, {"model": model})
        elif where == "with":
            with checkpointer:
                pass
        else:
            getattr(checkpointer, where)()
    assert onym.Checkpointer(tmp_path).restore({"model": model}).step == 1
    checkpointer.save(4, {"model": model})
    checkpointer.close()
    assert checkpointer.steps == [1, 4]


def test_an_error_that_nobody_asked_for_is_told_at_the_exit(tmp_path: Path) -> None:
    program = """
import errno, torch, onym
from onym.storage.disk import Disk
def flush(disk, descriptor): raise OSError(errno.ENOSPC, "full")
Disk.flush = flush
onym.Checkpointer("run").save(1, {"model": torch.nn.Linear(2, 1)})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "was not saved: Could not write" in done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_program_that_ends_at_once_has_kept_its_checkpoint(tmp_path: Path) -> None:
    program = "import torch, onym; onym.Checkpointer('run').save(1, {'model': torch.nn.Linear(500, 500)})"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert onym.Checkpointer(tmp_path / "run").restore({"model": nn.Linear(500, 500)}).step == 1


def test_buffers_are_used_again(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        first = {key: buffer.data_ptr() for key, buffer in checkpointer._staging._buffers.items()}
        size = checkpointer._staging.nbytes
        checkpointer.save(2, {"model": model})
        checkpointer.wait()
        assert {key: buffer.data_ptr() for key, buffer in checkpointer._staging._buffers.items()} == first
        assert checkpointer._staging.nbytes == size


# --- what cannot be --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = onym.Checkpointer(tmp_path / "run")
    for state, says in (
        ({}, "no model in what is to be saved"),
        ({"optimizer": optimizer}, "no model in what is to be saved"),
        ({"model": other, "optimizer": optimizer}, "'optimizer' belong to none of the models given"),
        ({"model": model, "a/b": 1}, "'a/b' cannot name a part"),
        ({"model": model, "rng": 1}, "'rng' cannot name a part"),
        ({"model": model, "f": print}, "f is a builtin_function_or_method, which cannot be saved"),
        ([model], "save takes a dict"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=says):
            checkpointer.save(1, state)  # type: ignore[arg-type]
    for given, says in (
        ({"metrics": {"loss": "low"}}, "metrics are numbers by name"),
        ({"files": {"../x": "y"}}, "cannot be saved"),
        ({"files": {"manifest.json": "y"}}, "has of its own"),
    ):
        with pytest.raises(ConfigError, match=says):
            checkpointer.save(1, {"model": model}, **given)  # type: ignore[arg-type]
    for step in (-1, 1.5, "3", True):
        with pytest.raises(ConfigError, match="whole number"):
            checkpointer.save(step, {"model": model})  # type: ignore[arg-type]
    for options in ({"keep_last": 0}, {"keep_every": -2}, {"keep_best": "loss:lowest"}, {"on_busy": "die"}):
        with pytest.raises(ConfigError):
            onym.Checkpointer(tmp_path / "run", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer, "count": 3})
        with pytest.raises(CheckpointError, match=r"nothing called 'optimiser' \(did you mean 'optimizer'\?\); it holds model"):
            checkpointer.restore({"model": model, "optimiser": optimizer})
        with pytest.raises(CheckpointError, match=r"'optimizer' in .* is of the kind 'optimizer', not 'values'"):
            checkpointer.restore({"model": model, "optimizer": {}})
        with pytest.raises(MismatchError):
            checkpointer.restore({"model": nn.Linear(4, 2)})
        assert checkpointer.restore({"model": model}).values == {"count": 3}
    onym.save(model, tmp_path / "alone")
    with pytest.raises(CheckpointError, match="holds a model only"):
        checkpointer.restore_from(read_checkpoint(tmp_path / "alone"), {"model": model})


def test_one_optimizer_may_train_two_models(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        encoder, decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])
        return {"encoder": encoder, "decoder": decoder, "optimizer": optimizer}

    def step(parts: dict[str, Any]) -> None:
        parts["decoder"](parts["encoder"](torch.ones(2, 3))).sum().backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()

    one, other = make(), make()
    step(one)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, one)
        checkpointer.restore(other)
    for parts in (one, other):
        step(parts)
    for name in ("encoder", "decoder"):
        assert_same(weights(one[name]), weights(other[name]))


def test_a_restore_that_is_refused_has_changed_nothing(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, loop.state)
    other = Loop()
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
    before, rng = weights(other.model), torch.get_rng_state()
    with pytest.raises((CheckpointError, MismatchError)):
        checkpointer.restore(other.state)
    assert_same(weights(other.model), before)
    other = Loop()
    other.ema = nn.Linear(4, 9)  # type: ignore[assignment]
    before = weights(other.model)
    rng = torch.get_rng_state()
    with pytest.raises(MismatchError):
        checkpointer.restore(other.state)
    assert_same(weights(other.model), before)
    assert not other.optimizer.state
    assert torch.equal(torch.get_rng_state(), rng)


# --- found by a review ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_after_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors, a slow disk, and another thread that is done: the file is complete when all is written, not hashed."""
    log: list[tuple[str, int]] = []
    write, flush = Disk.write, Disk.flush

    def slow(disk: Disk, descriptor: int, data: memoryview, position: int) -> int:
        if len(data) == 200_000:
            time.sleep(0.2)
        done = write(disk, descriptor, data, position)
        log.append(("write", descriptor))
        return done

    def logged(disk: Disk, descriptor: int) -> None:
        log.append(("flush", descriptor))
        flush(disk, descriptor)

    monkeypatch.setattr(Disk, "write", slow)
    monkeypatch.setattr(Disk, "flush", logged)
    monkeypatch.setattr(tensor_writing, "WORKERS", 2)
    state = {"large": torch.ones(5_000_000 // 4), **{f"small{n}": torch.ones(5000) for n in range(10)}}
    writer.write_folder(tmp_path / "x", {"model.safetensors": state}, {})
    first = next(index for index, (what, _) in enumerate(log) if what == "flush")
    assert log[first][1] not in [descriptor for what, descriptor in log[first:-2] if what == "write"]
    read_checkpoint(tmp_path / "x").verify()


def test_a_large_save_survives_the_end_of_the_program(tmp_path: Path) -> None:
    """While Python exits, thread pools take no work any more."""
    program = """
import torch, onym
model = torch.nn.Linear(1500, 1500)
checkpointer = onym.Checkpointer('run', keep_last=1)
checkpointer.save(1, {'model': model})
checkpointer.save(2, {'model': model})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert onym.Checkpointer(tmp_path / "run").steps == [2]


def test_an_error_outlives_its_checkpointer(tmp_path: Path) -> None:
    program = """
import errno, gc, torch, onym
from onym.storage.disk import Disk
def flush(disk, descriptor): raise OSError(errno.EIO, "broken")
Disk.flush = flush
def main():
    checkpointer = onym.Checkpointer("run")
    checkpointer.save(1, {"model": torch.nn.Linear(2, 1)})
    while checkpointer._task.busy: pass
main()
gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "was not saved: Could not write" in done.stderr


def test_a_child_does_not_close_what_is_not_its_own(tmp_path: Path) -> None:
    with onym.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(2, 1)})
    with (tmp_path / "file").open("w") as file:  # takes the number that the lease had
        child = os.fork()
        if child == 0:
            try:
                file.write("written by the child")
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "file").read_text() == "written by the child"


def test_a_default_device_does_not_matter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20))
    model.register_buffer("empty", torch.zeros(0))
    with torch.device("meta"), onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        expected = weights(model)
        assert_same(read_checkpoint(step_folder(tmp_path, 1)).model.state(), expected)


def test_a_pinned_step_is_not_put_aside(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path, background=False) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, {"model": model})
        checkpointer.pin(30, "best-so-far")
        for step in (20, 30):
            with pytest.raises(StorageError, match=r"Step 30 is pinned as 'best-so-far'.*unpin it"):
                checkpointer.save(step, {"model": model})
        assert checkpointer.steps == [10, 20, 30]
        checkpointer.unpin("best-so-far")
        checkpointer.save(20, {"model": model})
    assert checkpointer.steps == [10, 20]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(local.os, "listdir", refusing)
    with pytest.raises(StorageError, match="permission denied"):
        onym.Checkpointer(tmp_path).restore({"model": nn.Linear(2, 1)})


def test_a_changed_working_folder_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with onym.Checkpointer("run") as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(2, 1)})
        monkeypatch.chdir(tmp_path / "other")
        checkpointer.save(2, {"model": nn.Linear(2, 1)})
    assert sorted(os.listdir(tmp_path / "run")) == ["step-000000001", "step-000000002"]
    assert os.listdir(tmp_path / "other") == []


def test_two_threads_may_save(tmp_path: Path) -> None:
    models = [nn.Linear(50, 50) for _ in range(4)]
    checkpointer = onym.Checkpointer(tmp_path, keep_last=10)
    threads = [
        threading.Thread(target=checkpointer.save, args=(step, {"model": model})) for step, model in enumerate(models, start=1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpointer.close()
    for step in checkpointer.steps:
        assert_same(read_checkpoint(step_folder(tmp_path, step)).model.state(), weights(models[step - 1]))
    assert checkpointer.steps


def test_an_interrupted_wait_still_waits_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook: the thread goes on, and the next save must not write into its buffers."""
    model = nn.Linear(30, 30)
    expected = weights(model)
    checkpointer = onym.Checkpointer(tmp_path)
    held = Held(monkeypatch)
    checkpointer.save(1, {"model": model})
    assert held.started.wait(30)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs behind its back ignores it
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        checkpointer.wait()
    signal.signal(signal.SIGINT, before)
    assert checkpointer._task.busy
    threading.Timer(0.3, held.go.set).start()
    with torch.no_grad():
        model.weight.fill_(9)
    checkpointer.save(2, {"model": model})
    checkpointer.close()
    assert_same(read_checkpoint(step_folder(tmp_path, 1)).model.state(), expected)
    assert checkpointer.steps == [1, 2]


def test_a_forked_child_has_to_ask_for_the_right_to_write(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                checkpointer.save(5, {"model": model})
                said = "saved"
            except StorageError as error:
                said = str(error)
            os.write(writing, said.encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert f"is being written by process {os.getpid()}" in os.read(reading, 1000).decode()
    assert checkpointer.steps == [1]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    checkpointer = onym.Checkpointer(tmp_path, background=False)
    for state, files, says in (
        ({"model": model, "many": [1] * 5_000_001}, {}, "holds more than 5,000,000 values"),
        ({"model": model, "digits": 10**5000}, {}, "'digits' cannot be saved"),
        ({"net": model, "model": optimizer}, {}, "What is called 'model' is a SGD"),
        ({"model": model}, {"a\\b": "x"}, "cannot be saved"),
        ({"model": model}, {"a": "\ud800"}, "cannot be saved"),
        ({"model": model}, {"chunks.json": "{}"}, "a file that the checkpoint has of its own"),
    ):
        with pytest.raises(onym.OnymError, match=says):
            checkpointer.save(1, state, files=files)
    assert checkpointer.steps == []


def test_a_step_whose_metrics_cannot_be_read_is_not_deleted(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path, keep_last=1, keep_best="loss", background=False) as checkpointer:
        checkpointer.save(1, {"model": model}, {"loss": 1.0})
        manifest = step_folder(tmp_path, 1) / "manifest.json"
        text = manifest.read_text()
        manifest.write_text(text[:-20])
        for step in (2, 3):
            checkpointer.save(step, {"model": model}, {"loss": 2.0})
        manifest.write_text(text)
    assert 1 in checkpointer.steps


def test_what_modules_keep_of_their_own_making_is_kept(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        seen: Any = 0

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    model, other = Counting(2, 1), Counting(2, 1)
    model.seen = {"batches": 7, "sums": torch.ones(2)}
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.restore({"model": other})
    assert other.seen["batches"] == 7
    assert torch.equal(other.seen["sums"], torch.ones(2))
    assert torch.equal(other.weight, model.weight)


def test_damaged_steps_do_not_count_for_retention(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path, keep_last=3, background=False) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"model": model})
        for step in (2, 3):
            (step_folder(tmp_path, step) / "model.safetensors").write_bytes(b"")
        assert checkpointer.restore({"model": model}).step == 1
        checkpointer.save(4, {"model": model})
    assert checkpointer.steps == [1, 4], "what was passed over is set aside"
    assert len([name for name in os.listdir(tmp_path) if name.startswith("aside-")]) == 2


def test_a_folder_that_went_away_is_held_anew(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path / "run", background=False) as checkpointer:
        checkpointer.save(1, {"model": model})
        shutil.rmtree(tmp_path / "run")
        checkpointer.save(2, {"model": model})
        with pytest.raises(StorageError, match="is being written by"):
            onym.Checkpointer(tmp_path / "run", background=False).save(3, {"model": model})


def test_a_step_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """Where two names cannot be exchanged, and the process died between the two renames."""
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path, background=False) as checkpointer:
        checkpointer.save(4, {"model": model})
        step_folder(tmp_path, 4).rename(tmp_path / ".onym-replaced-step-000000004")
    with onym.Checkpointer(tmp_path, background=False) as checkpointer:
        checkpointer.acquire()
        assert checkpointer.steps == [4]


def test_what_is_set_aside_stays_aside_after_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    real = Disk.flush_folder
    model = nn.Linear(2, 1)
    with onym.Checkpointer(tmp_path, background=False) as checkpointer:
        for step in (3, 4):
            checkpointer.save(step, {"model": model})
        checkpointer.pin(3, "here")
        moves: list[str] = []
        rename = Disk.rename
        monkeypatch.setattr(Disk, "rename", lambda disk, *pair: (moves.append(pair[1].name), rename(disk, *pair))[1])
        monkeypatch.setattr(Disk, "flush_folder", lambda disk, path: (flushed.append(path), real(disk, path))[1])
        checkpointer.unpin("here")
        assert flushed == [tmp_path]
        checkpointer.save(3, {"model": model})
        assert "aside-1-step-000000004" in moves
        assert flushed[-1] == tmp_path
