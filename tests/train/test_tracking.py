"""What TensorBoard's own reader finds in what a run has written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onym.data.batches import Batch
from onym.train.step import Result, Stepper
from tests.cli.test_train import EAGER, metrics, start
from tests.conftest import Run


def scalars(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_back_what_was_measured(onym: Run, book: Path, tmp_path: Path) -> None:
    command = ("train", "--data", book, *EAGER, "--track", "tensorboard", "--save-every", 8, "--eval-every", 10)
    killed = start(*command, "--steps", 10**6, cwd=tmp_path, kill_at=tmp_path / "runs/book/checkpoints/step-000000024")
    killed.kill()
    killed.wait()
    kept = metrics(tmp_path / "runs/book")[-1]["step"]
    done = onym("train", "--name", "book", "--steps", kept + 7)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "runs/book")
    events = scalars(tmp_path / "runs/book")
    for field, name in (("train_loss", "loss/training"), ("val_loss", "loss/held-out"), ("lr", "learning rate")):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [row["step"] for row in rows if field in row], "none twice, none missing"
        assert [value for _, value in found] == pytest.approx([row[field] for row in rows if field in row])
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_after_a_roll_back_tensorboard_has_no_step_twice(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, spoilt = Stepper.__call__, []

    def step(self: Stepper, batch: Batch, rate: float, number: int) -> Result:
        result = plain(self, batch, rate, number)
        if number == 15 and not spoilt:
            spoilt.append(number)
            with torch.no_grad():
                self.model.final_norm.weight[0] = torch.inf
        return result

    monkeypatch.setattr(Stepper, "__call__", step)
    command = ("train", "--data", book, *EAGER, "--track", "tensorboard", "--save-every", 8, "--eval-every", 24)
    done = onym(*command, "--steps", 24, "--log-every", 3)
    assert done.returncode == 0, done.stderr
    assert "back to step 8" in done.stdout
    events = scalars(tmp_path / "runs/book")
    assert [event.step for event in events.Scalars("loss/training")] == list(range(0, 25, 3)), "none twice, none missing"


def test_a_library_that_fails_does_not_stop_training(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onym.train import tracking

    def fail(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tracking._TensorBoard, "rows", fail)
    done = onym("train", "--data", book, *EAGER, "--steps", 12, "--track", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--track tensorboard failed, continuing without: ConnectionError: no network") == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_not_there_is_named(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = onym("train", "--data", book, *EAGER, "--steps", 2, "--track", name)
    assert done.returncode == 2
    assert f"--track {name} needs its library: pip install 'onym[{name}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
