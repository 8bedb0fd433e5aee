"""A run on a GPU that is broken off goes on bit for bit with ``--deterministic``, and on another device at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onym.checkpoint.steps import steps
from onym.train.step import Stepper
from tests.cli.test_train import EAGER, assert_equal_bits, checkpoint, metrics
from tests.conftest import Run
from tests.cuda.conftest import LENGTH

CPU = torch.device("cpu")
CLOCKS = {"seconds", "tokens_per_second", "data_wait"}
# A sample is drawn at each evaluation, at steps 0, 4, 8 and 12; dropout draws at each step.
RUN = (*EAGER, *LENGTH, "--deterministic", "--drop-rate", 0.1)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.cuda
def test_a_process_that_is_killed_changes_nothing(
    cuda: torch.device, onym_process: Run, environment: dict[str, str], book: Path, tmp_path: Path
) -> None:
    """The command as a user runs it, three times: straight, killed on the way, and to the end."""
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)  # the command has to set it by itself
    options = (*RUN, "--device", cuda.type, "--micro-batch", 2, "--optimizer", "muon", "--ema", 0.9, "--data", book)
    done = onym_process("tools", "check-resume", "--kills", 1, "--folder", tmp_path / "both", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Bitwise identical" in done.stdout


KINDS = {
    "AdamW": (),
    "fp16 with its scaler, Muon": ("--precision", "fp16", "--optimizer", "muon"),
    "documents apart, recomputed activations": ("--document-mask", "--gradient-checkpointing", "--micro-batch", 2),
}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_broken_off_or_trained_longer_it_ends_with_the_same_bits(
    cuda: torch.device, onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    command = ("train", "--data", book, *RUN, *KINDS[kind], "--device", cuda.type, "--schedule", "constant")
    done = onym(*command, "--name", "straight")
    assert done.returncode == 0, done.stderr
    straight = tmp_path / "runs" / "straight"
    samples = [path.read_bytes() for path in sorted((straight / "samples").iterdir())]
    assert len(samples) == 4

    done = onym(*command, "--name", "longer", "--steps", 8)
    assert done.returncode == 0, done.stderr
    step = Stepper.__call__

    def killed(self: Stepper, *args: object) -> object:
        if args[2] == 9:
            raise Killed
        return step(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stepper, "__call__", killed)
        onym(*command, "--name", "broken off")
    assert max(steps(tmp_path / "runs" / "broken off" / "checkpoints")) == 8

    for name in ("longer", "broken off"):
        done = onym("train", "--name", name, "--steps", 12)
        assert done.returncode == 0, done.stderr
        assert "Continuing after step 8 of 12" in done.stdout
        assert "Not bitwise identical" not in done.stdout
        assert_equal_bits(checkpoint(straight, 12), checkpoint(tmp_path / "runs" / name, 12))
        rows = [
            [{key: value for key, value in row.items() if key not in CLOCKS} for row in metrics(path)]
            for path in (straight, tmp_path / "runs" / name)
        ]
        assert rows[0] == rows[1]
        assert [path.read_bytes() for path in sorted((tmp_path / "runs" / name / "samples").iterdir())] == samples


@pytest.mark.cuda
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_run_goes_on_on_another_device(cuda: torch.device, onym: Run, book: Path, tmp_path: Path, first: str) -> None:
    """Where it was and where it is, it learns: the weights, the moments and the average come along."""
    devices = (CPU.type, cuda.type) if first == "cpu" else (cuda.type, CPU.type)
    command = ("train", "--data", book, *EAGER, *LENGTH, "--optimizer", "muon", "--ema", 0.9, "--precision", "fp32")
    done = onym(*command, "--schedule", "constant", "--steps", 8, "--device", devices[0], "--name", "moved")
    assert done.returncode == 0, done.stderr
    done = onym("train", "--name", "moved", "--steps", 12, "--device", devices[1])
    assert done.returncode == 0, done.stderr
    assert "Continuing after step 8 of 12" in done.stdout
    done = onym(*command, "--schedule", "constant", "--device", devices[1], "--name", "stayed")
    assert done.returncode == 0, done.stderr
    moved, stayed = ({row["step"]: row for row in metrics(tmp_path / "runs" / name)} for name in ("moved", "stayed"))
    assert moved[12]["val_loss"] < moved[0]["val_loss"] - 0.1
    assert moved[12]["val_loss"] == pytest.approx(stayed[12]["val_loss"], abs=0.02)
    assert moved[12]["ema_val_loss"] == pytest.approx(stayed[12]["ema_val_loss"], abs=0.02)
