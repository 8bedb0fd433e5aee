"""Bad steps are left out, spoilt weights rolled back, and what does not get better ends with a diagnosis."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onym import GPT
from onym.checkpoint.steps import steps
from onym.data.batches import Batch
from onym.errors import StorageError
from onym.train import evaluate, loop
from onym.train.optimizer import step_unless
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.run_folder import RunFolder
from onym.train.spikes import TOO_MANY, SpikeDetector
from onym.train.step import Result, Stepper
from tests.cli.test_train import EAGER, assert_equal_bits, checkpoint, metrics
from tests.conftest import Run

CPU = Compute(torch.device("cpu"), torch.float32)
RUN = (*EAGER, "--steps", 60, "--save-every", 20, "--eval-every", 30, "--log-every", 5)


def judge(guard: SpikeDetector, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def test_what_is_not_finite_is_bad_from_the_first_step() -> None:
    guard = SpikeDetector(8.0, CPU.device)
    assert not judge(guard, 9.0)
    assert judge(guard, float("nan"))
    assert judge(guard, 9.0, float("inf"))
    assert int(guard.streak) == 2
    assert not judge(guard, 9.0)
    assert int(guard.streak) == 0


def test_a_spike_is_bad_and_a_new_level_is_not() -> None:
    noise = torch.Generator().manual_seed(1)
    values = (3 + 0.1 * torch.randn(300, generator=noise)).tolist()
    guard = SpikeDetector(8.0, CPU.device)
    assert not any(judge(guard, value) for value in values)
    assert judge(guard, 9.0)
    assert judge(guard, 3.0, norm=40.0)
    off = SpikeDetector(0.0, CPU.device)
    assert not any(judge(off, value) for value in [*values, 9.0])
    higher = [judge(guard, value + 6) for value in values]
    assert sum(higher) < TOO_MANY, "it has come to stay, so training continues"
    assert not any(higher[TOO_MANY:])
    assert not any(judge(SpikeDetector(8.0, CPU.device), 2.0) for _ in range(300)), "where nothing varies"


def test_it_goes_on_as_it_was() -> None:
    one, other = SpikeDetector(8.0, CPU.device), SpikeDetector(8.0, CPU.device)
    for value in range(100):
        judge(one, 3 + value % 7 / 10)
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for value in (3.0, 3.6, 5.0, 9.0):
        assert judge(one, value) == judge(other, value)
    assert_equal_bits(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_a_gpu_leaves_out_changes_nothing(tiny: GPT, optimizer: str) -> None:
    """On a GPU nobody waits for the answer, so the optimizer has to read it there; here it is called the same way."""
    options = OptimizationOptions(optimizer=optimizer)  # type: ignore[arg-type]
    stepper = Stepper(tiny, options, CPU)
    waiting = Stepper(GPT(tiny.config), options, CPU)
    waiting.model.load_state_dict(tiny.state_dict())
    generator = torch.Generator().manual_seed(0)

    def gradients(value: float) -> None:
        for mine, theirs in zip(tiny.parameters(), waiting.model.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator) * value
            theirs.grad = mine.grad.clone()

    for value, bad in ((1.0, False), (torch.nan, True), (1.0, False)):
        gradients(value)
        step_unless(torch.tensor(bad), stepper.optimizers)
        if not bad:
            for each in waiting.optimizers:
                each.step()
        assert_equal_bits(tiny.state_dict(), waiting.model.state_dict())
    for mine, theirs in zip(stepper.optimizers, waiting.optimizers, strict=True):
        for one, other in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert_equal_bits(one, other)


Poison = Callable[[Callable[[int], bool]], None]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Make the loss of some steps NaN; steps are counted over all that the process takes."""

    def poison(which: Callable[[int], bool]) -> None:
        taken = 0
        plain = Stepper.__call__

        def step(self: Stepper, batch: Batch, rate: float, number: int) -> Result:
            nonlocal taken
            taken += 1
            if not which(taken):
                return plain(self, batch, rate, number)
            with monkeypatch.context() as patch:
                loss = self._loss
                patch.setattr(self, "_loss", lambda part: loss(part) * torch.nan)
                return plain(self, batch, rate, number)

        monkeypatch.setattr(Stepper, "__call__", step)

    return poison


def test_a_poisoned_batch_is_survived(onym: Run, book: Path, tmp_path: Path, poisoned: Poison) -> None:
    poisoned(lambda step: step in (7, 40))
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(tmp_path / "runs/book")
    assert [(row["step"], row["batch"], row["reason"]) for row in rows if "event" in row] == [
        (7, 6, "not finite"),
        (40, 39, "not finite"),
    ]
    assert all(row["train_loss"] is not None for row in rows if "event" not in row), "the others of its interval count"
    assert "Step 7 was not applied: loss nan" in done.stdout
    assert "2 steps whose loss or gradient was non-finite or a spike" in done.stdout
    for name, tensor in checkpoint(tmp_path / "runs/book", 60).items():
        assert tensor.isfinite().all(), name


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a weight infinite, once after each of some steps, and send this process a signal in others."""

    def spoil(*numbers: int, stop_in: int = -1) -> None:
        plain, left, stops = Stepper.__call__, list(numbers), [stop_in]

        def step(self: Stepper, batch: Batch, rate: float, number: int) -> Result:
            result = plain(self, batch, rate, number)
            if number in left:
                left.remove(number)
                with torch.no_grad():
                    self.model.final_norm.weight[0] = torch.inf
            if number in stops:
                stops.remove(number)
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(Stepper, "__call__", step)

    return spoil


def test_spoilt_weights_are_rolled_back(onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None]) -> None:
    spoiled(23)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 steps in a row up to step 30 could not be applied" in done.stdout, "as is seen before it is measured"
    assert "back to step 20, and on without batches 20 to 29" in done.stdout
    assert "non-finite weights: 1 tensors, the first final_norm.weight" in done.stdout
    rows = metrics(tmp_path / "runs/book")
    *left_out, event = [row for row in rows if "event" in row]
    assert [(row["event"], row["step"]) for row in left_out] == [("skipped-step", step) for step in range(25, 31)]
    assert "6 steps whose loss or gradient was non-finite or a spike; 1 rollback" in done.stdout
    assert event == {"event": "rollback", "step": 20, "from": 30, "batches": [20, 10]}
    assert [row["step"] for row in rows if "event" not in row] == list(range(0, 61, 5)), "no row is missing, none is twice"
    longer = onym("train", "--name", "book", "--steps", 65)
    assert longer.returncode == 0, longer.stderr
    (last,) = [row for row in metrics(tmp_path / "runs/book") if row["step"] == 65]
    assert last["train_loss"] is not None


@pytest.mark.parametrize("number", [39, 52, 59])
def test_spoilt_weights_are_never_kept(
    onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None], number: int
) -> None:
    """By the very step that is to be kept, too near to the end for ten bad steps, and by the last one."""
    spoiled(number)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    back = number // 20 * 20
    assert f"back to step {back}, and on without" in done.stdout
    assert steps(tmp_path / "runs/book/checkpoints") == [20, 40, 60]
    for step in (20, 40, 60):
        for name, tensor in checkpoint(tmp_path / "runs/book", step).items():
            assert tensor.isfinite().all(), f"{name} after step {step}"


def test_a_run_that_is_stopped_with_spoilt_weights_goes_on_from_the_checkpoint_before(
    onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None]
) -> None:
    assert onym("train", "--data", book, *RUN, "--name", "straight").returncode == 0
    spoiled(33, stop_in=35)
    stopped = onym("train", "--data", book, *RUN)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert "Stopped after step 36 (SIGTERM); its weights are non-finite, so they were not saved" in stopped.stdout
    assert "continues from the one before, 'runs/book/checkpoints/step-000000020'" in stopped.stdout
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing after step 20 of 60" in done.stdout
    assert_equal_bits(checkpoint(tmp_path / "runs/straight", 60), checkpoint(tmp_path / "runs/book", 60))


def test_stopped_with_spoilt_weights_before_anything_was_kept_it_begins_anew(
    onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None]
) -> None:
    spoiled(3, stop_in=5)
    stopped = onym("train", "--data", book, *EAGER, "--steps", 8)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert "The same command continues from the beginning" in stopped.stdout
    assert onym("train", "--data", book, *EAGER, "--steps", 8).returncode == 0


def test_a_run_that_is_stopped_among_bad_steps_goes_on_as_without_the_stop(
    onym: Run, book: Path, tmp_path: Path, poisoned: Poison, spoiled: Callable[..., None]
) -> None:
    """What is kept then is finite, but no place to go back to."""
    poisoned(lambda step: 31 <= step <= 40)
    assert onym("train", "--data", book, *RUN, "--name", "straight").returncode == 0
    poisoned(lambda step: 31 <= step <= 40)
    spoiled(stop_in=34)
    assert onym("train", "--data", book, *RUN).returncode == 143
    assert steps(tmp_path / "runs/book/checkpoints") == [20, 35]
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "back to step 20, and on without batches 20 to 39" in done.stdout
    assert_equal_bits(checkpoint(tmp_path / "runs/straight", 60), checkpoint(tmp_path / "runs/book", 60))


def test_a_roll_back_in_vain_goes_further_back(onym: Run, book: Path, tmp_path: Path, poisoned: Poison) -> None:
    poisoned(lambda step: 45 < step <= 65)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/book"
    events = [row for row in metrics(run) if "event" in row]
    assert [(row["step"], row["from"]) for row in events if row["event"] == "rollback"] == [(40, 55), (20, 50)]
    left_out = [row["step"] for row in events if row["event"] == "skipped-step"]
    assert left_out == [*range(46, 56), *range(41, 51)], "in the order in which it happened, none missing, none twice"
    assert "20 steps whose loss or gradient was non-finite or a spike; 2 rollbacks" in done.stdout
    assert [row["step"] for row in metrics(run) if "event" not in row] == list(range(0, 61, 5))
    assert "back to step 40, and on without batches 40 to 54" in done.stdout
    assert "back to step 20, and on without batches 20 to 64" in done.stdout
    assert (run / "checkpoints/aside-1-step-000000040").is_dir(), "another process would have gone on from it"
    assert steps(run / "checkpoints") == [20, 40, 60]


def test_a_checkpoint_with_spoilt_weights_is_not_gone_back_to(
    onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version may have kept one."""
    spoiled(39)
    monkeypatch.setattr(Stepper, "finite", True)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "back to step 20, and on without batches 20 to 49" in done.stdout
    assert steps(tmp_path / "runs/book/checkpoints") == [20, 40, 60]


def test_what_does_not_get_better_ends_with_a_diagnosis(onym: Run, book: Path, tmp_path: Path, poisoned: Poison) -> None:
    poisoned(lambda step: step > 25)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 2
    assert "Training has become unstable: 10 steps in a row up to step 30 could not be applied (loss nan" in done.stderr
    assert "3 rollbacks to step 20 did not help. Lower --learning-rate" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert onym("verify", tmp_path / "runs/book").returncode == 0


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(onym: Run, book: Path, poisoned: Poison) -> None:
    poisoned(lambda step: True)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 2
    assert "no checkpoint was saved before" in done.stderr


def test_a_held_out_loss_that_is_no_number_is_told(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = evaluate.held_out_loss, iter((1.0, torch.nan, 1.0, 1.0))
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *given: plain(*given) * next(calls))
    done = onym("train", "--data", book, *RUN, "--keep-best")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The held-out loss after step 30 is not a number; training continues." in done.stdout
    assert [row["val_loss"] for row in metrics(tmp_path / "runs/book") if row["step"] == 30] == [None]


def test_the_best_is_kept_wherever_it_was_measured(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((5.0, 4.0, 1.0, 3.0, 2.0))
    plain = evaluate.held_out_loss
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *given: next(losses, None) or plain(*given))
    monkeypatch.setattr(loop.Trainer, "prove", lambda self: None)  # of losses that are none
    done = onym(
        "train", "--data", book, *EAGER, "--steps", 20, "--eval-every", 5, "--save-every", 8, "--keep-best", "--keep-last", 1
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path / "runs/book/checkpoints") == [10, 20]


def test_a_last_measurement_that_is_no_number_is_repeated(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, factors = evaluate.held_out_loss, [1.0, torch.nan]
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *given: plain(*given) * (factors.pop(0) if factors else 1.0))
    done = onym("train", "--data", book, *EAGER, "--steps", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise identical" in done.stdout
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *given: torch.nan)
    done = onym("train", "--data", book, *EAGER, "--steps", 8, "--name", "other")
    assert done.returncode == 2
    assert "The held-out loss is not a number, so nothing shows that" in done.stderr
    assert onym("verify", tmp_path / "runs/other").returncode == 0


def test_what_was_pending_in_the_checkpoint_is_told_once(onym: Run, book: Path, tmp_path: Path, poisoned: Poison) -> None:
    """Step 18 is bad, step 20 is kept, both before the next row: it is told after the checkpoint, and after the roll-back."""
    poisoned(lambda step: step == 18 or 30 < step <= 45)
    done = onym("train", "--data", book, *RUN, "--log-every", 15, "--eval-every", 60)
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = [row["step"] for row in metrics(tmp_path / "runs/book") if row.get("event") == "skipped-step"]
    assert sorted(left_out) == [18, *range(31, 46)]
    assert "16 steps whose loss or gradient was non-finite or a spike; 1 rollback" in done.stdout


def test_a_full_disk_at_a_roll_back_does_not_end_training(
    onym: Run, book: Path, tmp_path: Path, spoiled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(23)
    plain, calls = RunFolder.keep_metrics, iter([False, True, True])  # the first is at the start

    def keep_metrics(self: RunFolder, count: int) -> None:
        if next(calls, False):
            raise StorageError("The disk is full.")
        plain(self, count)

    monkeypatch.setattr(RunFolder, "keep_metrics", keep_metrics)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The disk is full. Training continues" in done.stdout
    rows = metrics(tmp_path / "runs/book")
    assert [row["step"] for row in rows if "event" not in row] == list(range(0, 61, 5)), "no row is missing, none is twice"
    assert sum("event" in row for row in rows) == 7


def test_memory_that_runs_out_in_mid_run_is_told_with_where_it_goes_on(
    onym: Run, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stepper.__call__

    def too_much(self: Stepper, batch: Batch, learning_rate: float, step: int) -> Result:
        if step == 45:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes")
        return real(self, batch, learning_rate, step)

    monkeypatch.setattr(Stepper, "__call__", too_much)
    done = onym("train", "--data", book, *RUN)
    assert done.returncode == 2
    assert "Out of memory after step 45: lower --micro-batch" in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("The same command continues from step 40.")
    monkeypatch.undo()
    assert onym("train", "--data", book, *RUN).returncode == 0
