"""The loop: from options to a trained, kept and proven model.

    text -> tokens -> batch i, a pure function of (seed, i) -> step -> checkpoint -> proof

A run is continued from its newest good checkpoint with everything that decides what comes next: weights, optimizer state,
step, and the state of every random number generator.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onym.checkpoint.checkpointer import Checkpointer
from onym.checkpoint.retention import newest_good
from onym.checkpoint.snapshot import stored_objects, stored_values
from onym.compile.cache import warm_start
from onym.compile.in_place import Compilation, How, graphs_compiled, why_compiled_again
from onym.data.batches import TrainingBatches
from onym.data.prefetch import Prefetcher
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenData, relink_cache
from onym.errors import (
    LESS_MEMORY,
    CheckpointError,
    ConfigError,
    OnymError,
    ReportedElsewhere,
    RunError,
    StorageError,
    is_out_of_memory,
)
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT
from onym.state.dtensor import full_tensor
from onym.state.rng import seed_all
from onym.train.display import Display, TrainStatus
from onym.train.distributed import LAUNCHER, DistContext, is_lost_connection, join, reason_of
from onym.train.evaluate import held_out_loss
from onym.train.init_from import InitFrom, starting_point
from onym.train.launch import leave_with_the_launcher
from onym.train.metering import Meter, Peak, memory_in_use, peak_of, training_flops_per_token
from onym.train.options import TrainOptions
from onym.train.parallel import Sharding, make_sharding
from onym.train.plot import plot_losses
from onym.train.precision import Compute, choose_compute
from onym.train.preparation import prepare_data
from onym.train.proof import Proof, prove
from onym.train.run_folder import FINISHED, INTERRUPTED, RUNNING, RunFolder, require_same_run
from onym.train.sample import write_sample
from onym.train.saving import CheckpointSaver
from onym.train.schedule import make_schedule
from onym.train.signals import StopRequest
from onym.train.spikes import TOO_MANY
from onym.train.step import Batch, Result, Stepper
from onym.train.tracking import Tracker, make_tracker, require_tracker
from onym.units import parse_duration

_MOST_DRAWING = 0.1  # of the time is spent on drawing the picture
_TREND = 16  # rows whose losses are shown as bars
_MOST_ROLL_BACKS = 3
"""With nothing kept between them, each to an older checkpoint where there is one, before the run stops with a diagnosis."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    folder: RunFolder
    checkpoint: Path | None
    """The newest; None where none could be kept."""
    step: int
    parameters: int
    first_held_out: float
    held_out: float
    tokens_per_second: float
    compilation: Compilation | None = None
    """None where there was nothing left to train."""
    proof: Proof | None = None
    """None where the run was interrupted."""
    exit_code: int = 0
    """Why it was interrupted, for whoever started it; see :class:`StopRequest`."""
    reason: str = ""
    spoilt: bool = False
    """Whether it was interrupted with weights that are not finite, so that the checkpoint is an earlier one."""
    left_out: int = 0
    """Steps that were not applied."""
    roll_backs: int = 0
    share_waited: float = 0.0
    """Of the steps' time, for data."""
    tells: bool = True
    """Whether this process is the one that tells the user."""


def train(options: TrainOptions, display: Display) -> Outcome:
    """Start a run, or continue it.

    Raises:
        OnymError: something of the user's or of the surroundings prevents it; said in a sentence.
    """
    began = time.monotonic()
    leave_with_the_launcher()
    ranks, device = join(options.run.device, options.run.peer_timeout)
    folder = RunFolder(options.run_path, writes=ranks.first)
    if not ranks.first:
        display = Display.silent()
    checkpointer = Checkpointer(
        folder.checkpoints,
        keep_last=options.run.keep_last,
        keep_every=options.run.keep_every or None,
        keep_best="val_loss" if options.run.keep_best else None,
    )
    try:
        with checkpointer:
            outcome = _train(options, folder, checkpointer, display, began, ranks, device)
        for note in checkpointer.notes:
            display.warn(note)
        ranks.leave()
        return replace(outcome, tells=ranks.first)
    except Exception as error:
        if (told := _as_told(error, ranks, checkpointer, options.run.peer_timeout)) is not error:
            raise told from error
        raise


def _as_told(error: Exception, ranks: DistContext, checkpointer: Checkpointer, patience_seconds: int) -> Exception:
    """An error as it is to be told, once, where several processes may have the same one or come to know of it."""
    if ranks.count == 1:
        return error
    if not isinstance(error, OnymError) and is_lost_connection(error):
        kept = checkpointer.steps
        where = f"from step {kept[-1]}" if kept else "from the beginning"
        error = RunError(
            f"Process {ranks.number} lost its connection to another one, which has died, or did not answer within "
            f"--peer-timeout {patience_seconds} ({reason_of(error)}). The same command goes on {where}."
        )
        if LAUNCHER in os.environ:
            return ReportedElsewhere()  # which process it was, the launcher knows
        return error if ranks.tells(on_each_machine=True) else ReportedElsewhere()
    if isinstance(error, OnymError):
        return error if ranks.tells() else ReportedElsewhere()
    error.add_note(f"In process {ranks.number} of {ranks.count}.")
    return error


def _train(
    options: TrainOptions,
    folder: RunFolder,
    checkpointer: Checkpointer,
    display: Display,
    began: float,
    ranks: DistContext,
    device: str,
) -> Outcome:
    require_tracker(options.run.track)
    before = folder.description()
    if before is not None:
        changes = require_same_run(before["options"], options, folder.path)
        if before["status"] != FINISHED:
            ranks.all_or_none(checkpointer.acquire)  # before looking what is there: another process may be adding to it
        found = newest_good(folder.checkpoints)
        for path, reason in found.skipped if found else ():
            display.warn(f"Passed over '{path}': {reason}")
        if found is not None and before["status"] == FINISHED and not changes and _step_of(found.checkpoint) >= before["step"]:
            return _finished(folder, found.checkpoint)
        for change in changes:
            display.note(f"Changed since the run was started: {change}.")
    else:
        found = None
        ranks.all_or_none(folder.require_writable)
    compute = choose_compute(device, options.run.precision)
    compute.set_deterministic(options.run.deterministic)
    sharding = make_sharding(options.run, ranks, compute)
    start, source = None, found.checkpoint if found else None
    if found is None and options.model.start_from is not None:
        options, start = starting_point(options)
        source = start.checkpoint if options.data.tokenizer is None else None
    tokenizer, tokens = ranks.in_turn(lambda: prepare_data(options, source, display))
    trainer = Trainer(options, folder, checkpointer, compute, tokenizer, tokens, display, ranks, sharding)
    if before is not None and before.get("steps") == trainer.schedule.steps:  # of a longer run, what pays may be another way
        trainer.compiled = before.get("compiled")
    if found is not None:
        trainer.go_on_from(found.checkpoint)
    elif start is not None:
        start.load_into(trainer.model)
        if trainer.stepper.average is not None:  # of what it starts from, not of the random weights before
            trainer.stepper.average.model.load_state_dict(trainer.model.state_dict())
        if start.step:
            trainer.go_on_after(start)
    try:
        return trainer.run(began)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not (kept := checkpointer.steps):
            raise
        raise RunError(
            f"Out of memory after step {trainer.step}: {LESS_MEMORY}. The same command goes on from step {kept[-1]}."
        ) from error
    finally:
        trainer.prefetcher.close()


class Trainer:
    """A run in progress: owns the model, its optimizer, and how far they are."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        checkpointer: Checkpointer,
        compute: Compute,
        tokenizer: Tokenizer,
        tokens: TokenData,
        display: Display,
        ranks: DistContext,
        sharding: Sharding | None = None,
    ) -> None:
        self.options, self.folder, self.checkpointer = options, folder, checkpointer
        self.compute, self.display, self.ranks, self.sharding = compute, display, ranks, sharding
        self.tokenizer, self.tokens = tokenizer, tokens
        self.config: GPTConfig = options.model.config(tokenizer.vocab_size)
        self.schedule = make_schedule(options.optimization, self.config.context_length, len(tokens.train))
        self.micro_batches = self.schedule.micro_batches(options.optimization.micro_batch, ranks.count)
        seed, size, share = options.optimization.seed, self.schedule.batch_size, (ranks.number, ranks.count)
        self.batches = TrainingBatches(
            tokens.train, self.config.context_length, size, seed, options.data.corpus.description, share
        )
        self.prefetcher = Prefetcher(self.batches.__getitem__, compute.device)
        seed_all(seed)
        self.model = sharding.make(self.config) if sharding else GPT(self.config).to(compute.device)
        self.stepper = Stepper(self.model, options.optimization, compute, ranks, sharding)
        self.keeper = CheckpointSaver(checkpointer, folder.checkpoints, display, collective=sharding is not None)
        self.step = 0  # steps done
        self.seconds = 0.0  # that they and everything between them took
        self.pending: list[Result] = []  # of the steps since the last row of metrics.jsonl
        self.first_held_out = self.held_out = self.best = math.nan  # held-out losses
        self.best_step = self.measured_step = -1
        self.stale = 0  # measurements since the best one
        self.skipped: list[list[int]] = []  # batches that are left out, as [first, how many]
        self.left_out = self.roll_backs = 0
        self.tried: list[int] = []  # steps that were gone back to since one was kept
        self.meter = Meter(self.schedule.tokens_per_step)
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl, not written yet
        self.rows_written = 0
        self.surplus = False  # whether metrics.jsonl has further rows, of a past that a roll-back has left
        self.compilation: Compilation | None = None
        self.compiled: How | None = None
        """How the run is compiled from its beginning on; None before that is known."""
        self.graphs = 0  # compiled before training
        self.compiled_again = 0  # graphs, since then
        self.peak: Peak | None = None
        self.tracker = make_tracker(None, folder.path, {}, 0)
        self.tracked = options.run.track is not None and ranks.first
        self.losses: list[float] = []  # of the last rows
        self.sample = ""  # the newest one
        self.began_at = self.drawn_at = time.monotonic()
        self.drawing_seconds = 0.3  # of the last picture
        self.written = True  # whether what is only looked at could be written the last time

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Continue a run that another process began.

        Raises:
            RunError: its text is another one now.
        """
        progress = stored_values(checkpoint)["progress"]
        if progress["tokens"] != self.tokens.path.name:
            if self.options.run.data_changed == "refuse":
                raise RunError(
                    f"The text of the run '{self.folder.path}' has changed since it was started, so it cannot go on as it was: "
                    "bring the text back, start a new run under another --name, or go on with --data-changed accept."
                )
            self.display.warn("The text has changed; going on with the new one, as --data-changed says.")
        for name, now in {"processes": "1", **self._surroundings()}.items():
            if (then := progress.get(name, "1")) != now:
                self.display.warn(f"Not bit for bit as without the interruption, going on: {name} was {then}, is {now}.")
        as_many = progress.get("processes", "1") == self._surroundings().get("processes", "1")
        if self.options.optimization.micro_batch == "auto" and as_many:  # another split of a batch adds up in another order
            self.micro_batches = [size for size in self.micro_batches if size <= progress["micro_batch"]]
        self.restore(checkpoint)

    def go_on_after(self, start: InitFrom) -> None:
        """Continue what another program began, with its optimizer's moments and its count of steps."""
        if start.step >= self.schedule.steps:
            raise ConfigError(
                f"'{start.checkpoint.path}' has {start.step} steps behind it, and {self.schedule.steps} were asked for: give "
                f"--steps more than {start.step}."
            )
        start.load_into_optimizer(self.model, self.stepper.optimizers)
        self.step = start.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back to where it was at a checkpoint."""
        progress = stored_values(checkpoint)["progress"]
        stored = stored_objects(checkpoint)  # of another precision there may be no scaler
        self.checkpointer.restore_from(checkpoint, {k: v for k, v in self.stepper.state.items() if k in stored})
        self.step = self.keeper.kept_step = _step_of(checkpoint)
        self.keeper.checkpoint = checkpoint.path
        self.seconds, self.rows, self.rows_written = progress["seconds"], progress["unwritten"], progress["rows"]
        self.first_held_out, self.held_out = progress["first_held_out"], progress["held_out"]
        self.best, self.best_step, self.stale = progress["best"], progress["best_step"], progress["stale"]
        self.skipped, self.left_out, self.roll_backs = progress["skipped"], progress["left_out"], progress["roll_backs"]
        device = self.compute.device
        self.pending = [Result(*(torch.tensor(value, device=device) for value in values)) for values in progress["pending"]]

    @property
    def settled(self) -> bool:
        """Whether the held-out loss has not become better for long enough."""
        patience = self.options.optimization.patience
        return bool(patience) and self.stale >= patience

    def run(self, began: float) -> Outcome:
        """Train to the end, or to an interruption; ``began`` is when the time limit began, of :func:`time.monotonic`."""
        run, steps = self.options.run, self.schedule.steps
        shared = f", {self.sharding}" if self.sharding else ""
        together = f"; {self.ranks.count} processes{shared}" if self.ranks.count > 1 else ""
        self.display.note(
            f"Model: {self.options.model.preset}, {self.parameters / 1e6:.1f}M parameters, context "
            f"{self.config.context_length}; {self.compute}{together}"
        )
        if self.step < steps and not self.settled:
            compilation, first_loss = self._prepare()
        else:  # stopped after its last step, or asked for fewer than it has
            compilation, first_loss = None, math.nan
        self.ranks.all_or_none(self.checkpointer.acquire)  # the first thing that leaves a trace of a new run
        self.ranks.all_or_none(lambda: self._describe(RUNNING))
        self.folder.keep_metrics(self.rows_written)
        self.folder.keep_tokenizer(self.tokenizer.to_json())
        self.tracker = self._new_tracker()
        started_at = time.perf_counter() - self.seconds
        if self.step == 0:
            self._measure()
            self.first_held_out = self.held_out
            self._log(first_loss, started_at, measured=True)
        elif self.step < steps:
            self.display.note(f"Continuing after step {self.step} of {steps}.")
        limit = parse_duration(run.time_limit, "--time-limit") if run.time_limit else None
        due = False  # a checkpoint
        with self.display.training(), StopRequest(limit, began, self.ranks) as stop:
            while self.step < steps and not self.settled and not stop.requested:
                measured = (self.step + 1) % run.eval_every == 0 or self.step + 1 == steps
                logged = (self.step + 1) % run.log_every == 0 or measured
                with self.meter.step(lambda: self.prefetcher.waited_seconds):
                    self.pending.append(self.stepper(self._batch(self.step), self.schedule.learning_rate(self.step), self.step))
                    if logged and self.compute.device.type == "cuda":
                        torch.cuda.synchronize()  # the time of the steps since the last row, not of their launches
                self.step += 1
                due = due or self.step % run.save_every == 0 or self.step == steps
                # What is measured or kept has to be finite; the last step is both, so that no run ends with spoilt weights.
                if (logged and int(self.stepper.guard.streak) >= TOO_MANY) or ((measured or due) and not self.stepper.finite):
                    self._roll_back()
                    due = False
                    continue
                if measured:
                    self._measure()
                    due = due or (run.keep_best and self.best_step == self.step)
                if logged:
                    self._log(None, started_at, measured=measured)
                if due and not int(self.stepper.guard.streak):  # in a streak, nobody knows yet whether this is worth keeping
                    due, self.tried = False, []
                    self.keeper.keep(self.step, lambda: self._state(started_at), self._metrics())
                if self.checkpointer.progress is not None:
                    stop.reserve = self.checkpointer.progress.seconds
            # Still listening: a scheduler sends SIGTERM after its SIGUSR1, and what is kept here would be lost.
            spoilt = not self.stepper.finite
            if spoilt:  # stopped before anybody had looked
                self.keeper.settle()
            else:
                self.ranks.all_or_none(
                    lambda: self.keeper.keep_for_sure(self.step, lambda: self._state(started_at), self._metrics())
                )
        self._track(lambda tracker: tracker.close())
        self._draw()
        if self.step < steps and not self.settled:
            self._describe(INTERRUPTED)
            return self._outcome(INTERRUPTED, compilation, None, stop, spoilt=spoilt)
        if self.step < steps:
            self.display.note(f"Stopped after step {self.step}: {self.stale} measurements without a better held-out loss.")
        # By another process, which may have measured otherwise; or no number, for a reason that may be gone.
        if self.measured_step != self.step or not math.isfinite(self.held_out):
            self._measure()
        proof = self._prove() if self.ranks.first else None
        self._describe(FINISHED)
        return self._outcome(FINISHED, compilation, proof)

    def _prepare(self) -> tuple[Compilation, float]:
        """Compile, find the size of micro-batch that fits, and the loss of the next batch as things stand."""
        how = self.options.run.compile
        if how == "auto" and self.compiled is not None:
            how = self.compiled  # as the run has begun: another way rounds otherwise
        if how == "whole" and self.sharding is not None:
            how = "blocks"
            self.display.note(f"Compiling each block: --parallel {self.options.run.parallel} gathers one after the other.")
        with self.display.activity("First step") as activity, warm_start(how != "off", self.display.warn) as warm:
            compilation, loss = self.stepper.prepare(
                self._batch(self.step), self.micro_batches, how, self.schedule.steps - self.step
            )
            activity.title = "Compiling" if compilation.compiled else activity.title
            activity.result = f"{compilation}{warm}" if compilation.compiled else str(compilation)
            if how == "auto" and not compilation.compiled and not compilation.reason:
                most = "whole" if self.sharding is None else "blocks"
                activity.result += f": it would not pay in {self.schedule.steps - self.step:,} steps (--compile {most} does it)"
            if self.stepper.micro_batch < self.schedule.batch_size // self.ranks.count:
                parts = self.schedule.batch_size // self.ranks.count // self.stepper.micro_batch
                activity.result += f"; {parts} micro-batches of {self.stepper.micro_batch} a step"
        self.compilation = compilation if compilation.compiled else None
        self.compiled = compilation.how
        self.graphs, self.peak = graphs_compiled(), peak_of(self.compute)
        if compilation.reason:
            self.display.warn(f"Going on without torch.compile: {compilation.reason}.")
        return compilation, loss

    def _batch(self, step: int) -> Batch:
        return self.prefetcher.take(self._batch_number(step), self._batch_number(step + 1))

    def _batch_number(self, step: int) -> int:
        """The batch of a step: the same number, but for those that a roll-back has left out."""
        number = step
        for first, count in self.skipped:  # in ascending order
            if number >= first:
                number += count
        return number

    def _roll_back(self) -> None:
        """The weights themselves are spoilt: go back to a checkpoint, and go on behind the text that did it.

        To the newest one that is good; where that did not help, to the one before it.

        Raises:
            RunError: that does not help.
        """
        failed, streak = self.step, int(self.stepper.guard.streak)
        last = self.pending[-1]
        self.ranks.all_or_none(self.keeper.settle)  # what the first one writes is there for all
        found = self.keeper.to_go_back_to(self.tried)
        spoilt = [name for name, weights in self.model.named_parameters() if not full_tensor(weights).isfinite().all()]
        seen = (
            f"{f'{streak} steps in a row up to' if streak else 'what came of'} step {failed} "
            f"{'could not be applied' if streak else 'is no good'} (loss {float(last.loss):.4g}, gradient norm "
            f"{float(last.norm):.4g}, learning rate {self.schedule.learning_rate(failed - 1):.3g}"
            f"{f', weights that are not finite: {len(spoilt)} tensors, the first {spoilt[0]}' if spoilt else ''})"
        )
        if found is None or len(self.tried) >= _MOST_ROLL_BACKS:
            steps = " and ".join(map(str, dict.fromkeys(self.tried)))
            tried = f", and {len(self.tried)} roll-backs to step {steps} did not help" if self.tried else ""
            where = f"it goes on from step {self.checkpointer.steps[-1]}" if found else "no checkpoint was kept before"
            self._describe(INTERRUPTED)
            raise RunError(
                f"Training has become unstable: {seen}{tried}. Lower --learning-rate or raise --warmup-steps, and run the same "
                f"command again ({where}); if it is always the same text, look at what is in it."
            )
        first, end = self._batch_number(_step_of(found)), self._batch_number(failed)
        skipped = [*self.skipped, [first, end - first]]
        self.ranks.all_or_none(lambda: None)  # all of them have seen what is there
        self._tell_pending()
        rows = [*self.folder.read_metrics()[: self.rows_written], *self.rows]
        self.restore(found)
        self.keeper.archive_steps()
        # What happened in the past that is left stays told, but for what the checkpoint holds as pending, and tells again.
        events = [row for row in rows[self.rows_written + len(self.rows) :] if "event" in row]
        events = [row for row in events if row["event"] == "roll-back" or row["step"] > self.step]
        events.append({"event": "roll-back", "step": self.step, "from": failed, "batches": [first, end - first]})
        self.skipped, self.rows, self.surplus = skipped, [*self.rows, *events], True
        self.left_out += sum(row["event"] == "left-out" for row in events)
        self.roll_backs += sum(row["event"] == "roll-back" for row in events)
        self.tried.append(self.step)
        self._write(self._write_rows)
        self._track(lambda tracker: tracker.close())
        self._track_from_here()
        self.display.fail(
            f"{seen[0].upper()}{seen[1:]}: back to step {self.step}, and on without batches {first} to {end - 1}."
        )

    def _measure(self) -> None:
        """The held-out loss, and a sample of text."""
        run = self.options.run
        self.held_out = self._held_out_loss(self.model)
        self.measured_step = self.step
        if math.isnan(self.held_out):
            self.display.warn(f"The held-out loss after step {self.step} is not a number; training goes on.")
        if not self.held_out >= self.best and not math.isnan(self.held_out):
            self.best, self.best_step, self.stale = self.held_out, self.step, 0
        elif self.step:
            self.stale += 1
        if not self.ranks.first and self.sharding is None:
            return
        try:
            # What is put together in bf16 fits to nothing but bf16.
            with self.compute.autocast() if self.sharding is not None and self.sharding.gather_bf16 else nullcontext():
                text = write_sample(self.model, self.tokenizer, self.tokens.held_out)
        except CheckpointError:  # of weights that are spoilt, which is told elsewhere
            return
        if not self.ranks.first:
            return
        self.sample = text
        self._track(lambda tracker: tracker.sample(self.step, text))
        self._write(lambda: self.folder.add_sample(self.step, text))
        steps = self.schedule.steps
        if self.step and self.step < steps and self.step % max(1, steps // 3 // run.eval_every * run.eval_every) == 0:
            self.display.quote(
                f"Sample after step {self.step}, of a text that was held out (what was given is in brackets):", text
            )

    def _held_out_loss(self, model: GPT) -> float:
        size = self.stepper.micro_batch or self.micro_batches[0]
        share = self.ranks.number, self.ranks.count
        return held_out_loss(
            model, self.tokens.held_out, self.config.context_length, size, self._eval_batches(size), self.compute, share
        )

    def _eval_batches(self, size: int) -> int:
        """As many as hold the same text, however a batch is split."""
        return self.options.run.eval_batches * self.schedule.batch_size // size

    def _log(self, first_loss: float | None, started_at: float, *, measured: bool) -> None:
        """Rows of metrics.jsonl, the picture, the line in the terminal.

        Args:
            first_loss: before the first step; None for the mean of the steps since the last row.
        """
        good = [result for result in self.pending if not result.bad]
        self._tell_pending()
        loss = first_loss if first_loss is not None else _mean([result.loss for result in good])
        norm = _mean([result.norm for result in good])
        self.pending.clear()
        waited, rate = self.meter.share_waited(), self.meter.tokens_per_second()
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.meter.tokens_per_step,
            "train_loss": _finite(loss),
            "grad_norm": _finite(norm),
            "lr": self.schedule.learning_rate(max(0, self.step - 1)),
            "tokens_per_second": round(rate, 1),
            "data_wait": round(waited, 5),
            "seconds": round(time.perf_counter() - started_at, 3),
        }
        if measured:
            row["val_loss"] = _finite(self.held_out)
            if self.stepper.average is not None:
                row["ema_val_loss"] = _finite(self._held_out_loss(self.stepper.average.model))
        self.rows.append(row)
        self._write(self._write_rows)
        if measured and time.monotonic() - self.drawn_at > self.drawing_seconds / _MOST_DRAWING:
            self._draw()
        self.display.standing(self._standing(loss, rate), keep=measured)

    def _draw(self) -> None:
        """The picture of the losses."""
        if self.ranks.first:
            start = time.monotonic()
            self._write(lambda: plot_losses(self.folder.read_metrics(), self.folder.loss_plot, self.folder.path.name))
            self.drawn_at = time.monotonic()
            self.drawing_seconds = self.drawn_at - start

    def _standing(self, loss: float, rate: float) -> TrainStatus:
        self.losses = [*self.losses, loss][-_TREND:]
        again = graphs_compiled() - self.graphs
        if again > self.compiled_again:
            self.compiled_again = again
            self.display.warn(
                f"Something was compiled again by step {self.step}, which takes time and should not be needed; please report "
                f"it: {why_compiled_again()}"
            )
        seconds = self.compilation.seconds if self.compilation else 0.0
        return TrainStatus(
            self.step,
            self.schedule.steps,
            loss,
            self.held_out,
            rate,
            (self.schedule.steps - self.step) * self.meter.tokens_per_step / rate if rate else math.nan,
            self.best,
            self.best_step,
            self.losses,
            self.meter.mean_tokens_per_second(),
            rate * training_flops_per_token(self.config) / (self.peak.flops * self.ranks.count) if self.peak else 0.0,
            self.peak.source if self.peak else "",
            self.meter.mean_share_waited(),
            memory_in_use(self.compute.device),
            f"compiled in {seconds:.0f} s{f', {again} times more' if again else ''}" if seconds else "",
            self.began_at,
            self.keeper.kept_step,
            self.keeper.kept_at,
            self.left_out,
            self.roll_backs,
            self.sample,
        )

    def _tell_pending(self) -> None:
        """Of the steps since the last row, those that were not applied."""
        for step, result in enumerate(self.pending, self.step - len(self.pending)):
            if result.bad:
                self._tell_left_out(step, result)

    def _tell_left_out(self, step: int, result: Result) -> None:
        loss, norm = float(result.loss), float(result.norm)
        reason = "a spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
        self.left_out += 1
        self.rows.append(
            {
                "event": "left-out",
                "step": step + 1,
                "batch": self._batch_number(step),
                "reason": reason,
                "loss": _finite(loss),
                "grad_norm": _finite(norm),
            }
        )
        self.display.warn(f"Step {step + 1} was not applied: loss {loss:.4g}, gradient norm {norm:.4g} ({reason}).")

    def _write_rows(self) -> None:
        if self.surplus:
            self.folder.keep_metrics(self.rows_written)
            self.surplus = False
        self.folder.add_metrics(self.rows)
        self._track(lambda tracker: tracker.rows(self.rows))
        self.rows_written += len(self.rows)
        self.rows.clear()

    def _new_tracker(self) -> Tracker:
        """One that replaces what is there of later steps."""
        first = self.step + 1 if self.step else 0
        which = self.options.run.track if self.ranks.first else None
        return make_tracker(which, self.folder.path, self.options.to_dict(), first)

    def _track_from_here(self) -> None:
        """After a roll-back the same steps come again; a library that is told no more stays so."""
        if self.tracked:
            try:
                self.tracker = self._new_tracker()
            except OnymError as error:
                self.display.fail(f"{error} Going on without.")
                self.tracked = False

    def _track(self, tell: Callable[[Tracker], None]) -> None:
        """Tell another library; one that fails is told no more, and training goes on."""
        try:
            tell(self.tracker)
        except Exception as error:  # of a network, a disk, or its own
            self.display.fail(f"--track {self.options.run.track} failed, going on without: {type(error).__name__}: {error}")
            self.tracked = False
            self.tracker = make_tracker(None, self.folder.path, {}, 0)

    def _write(self, write: Callable[[], None]) -> None:
        """Write what is only to be looked at: a full disk does not stop training for it."""
        try:
            write()
            self.written = True
        except StorageError as error:
            if self.written:
                self.display.fail(f"{error} Training goes on, and this is tried again each time.")
            self.written = False

    def _state(self, started_at: float) -> tuple[dict[str, Any], dict[str, str]]:
        """All that decides what comes next."""
        self._write(self.folder.sync_metrics)  # the rows that the checkpoint counts are there before it is
        self.seconds = time.perf_counter() - started_at
        progress = {
            "seconds": self.seconds,
            "tokens": self.tokens.path.name,
            "first_held_out": self.first_held_out,
            "held_out": self.held_out,
            "best": self.best,
            "best_step": self.best_step,
            "stale": self.stale,
            "pending": [[result.loss.item(), result.norm.item(), result.bad.item()] for result in self.pending],
            "skipped": self.skipped,
            "left_out": self.left_out,
            "roll_backs": self.roll_backs,
            "streak": int(self.stepper.guard.streak),
            "rows": self.rows_written,
            "unwritten": self.rows,
            "micro_batch": self.stepper.micro_batch or self.micro_batches[0],
            **self._surroundings(),
        }
        return {**self.stepper.state, "progress": progress}, {TOKENIZER: self.tokenizer.to_json()}

    def _surroundings(self) -> dict[str, str]:
        """What the last bit of a result depends on, besides the options."""
        where = f"{self.compute}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        surroundings = {"torch": str(torch.__version__), "machine": where}
        how = f", {self.sharding}" if self.sharding else ""
        return surroundings | ({"processes": f"{self.ranks.count}{how}"} if self.ranks.count > 1 else {})

    def _metrics(self) -> dict[str, float]:
        measured = self.measured_step == self.step and math.isfinite(self.held_out)
        return {"val_loss": self.held_out} if measured else {}

    def _prove(self) -> Proof | None:
        """None where there is not the memory for it: a model that is shared out need not fit where one process is."""
        checkpoint = self.keeper.checkpoint
        assert checkpoint is not None
        if not math.isfinite(self.held_out):
            raise RunError(
                f"The held-out loss is not a number, so nothing shows that '{checkpoint}' is what was trained; its weights are "
                f"finite. Either the held-out text has nothing to predict ({len(self.tokens.held_out)} tokens; --held-out), or "
                f"the model leaves the range of {self.compute.precision} (try --precision fp32): run the same command again."
            )
        relink_cache(self.tokens)  # somebody may have deleted the cache, which is mapped into this process alone
        size = self.stepper.micro_batch or self.micro_batches[0]
        with self.display.activity("Proof") as activity:
            try:
                proof = prove(
                    checkpoint,
                    self.held_out,
                    self.tokens.path,
                    batch_size=size,
                    eval_batches=self._eval_batches(size),
                    device=str(self.compute.device),
                    precision=self.compute.precision,
                    rounded=self.sharding is not None and self.sharding.gather_bf16,
                )
            except MemoryError:
                activity.result = "left out: a fresh process has not the memory for all of the model beside the training"
                return None
            activity.result = "a fresh process without torch.compile opened the checkpoint"
        if not proof.holds:
            raise CheckpointError(
                f"A fresh process finds a held-out loss of {proof.held_out:.6f} in '{checkpoint}', the trained model has "
                f"{proof.expected:.6f}: the checkpoint is not what was trained. Please report this."
            )
        return proof

    def _describe(self, status: str) -> None:
        facts = {
            "step": self.step,
            "steps": self.schedule.steps,
            "parameters": self.parameters,
            "held_out": None if math.isnan(self.held_out) else self.held_out,
            "best": None if math.isnan(self.best) else self.best,
            "best_step": self.best_step,
            "compiled": self.compiled,
            "model": self.config.to_dict(),
            "token_cache": str(self.tokens.path),
        }
        if status == RUNNING:  # without it the run could not be continued
            self.folder.describe(self.options, status, **facts)
        else:
            self._write(lambda: self.folder.describe(self.options, status, **facts))

    def _outcome(
        self,
        status: str,
        compilation: Compilation | None,
        proof: Proof | None,
        stop: StopRequest | None = None,
        *,
        spoilt: bool = False,
    ) -> Outcome:
        assert spoilt or self.keeper.checkpoint is not None
        return Outcome(
            status,
            self.folder,
            self.keeper.checkpoint,
            self.step,
            self.parameters,
            self.first_held_out,
            self.held_out,
            self.meter.mean_tokens_per_second(),
            compilation,
            proof,
            stop.exit_code if stop else 0,
            stop.reason if stop else "",
            spoilt,
            self.left_out,
            self.roll_backs,
            self.meter.mean_share_waited(),
        )


def _mean(values: list[torch.Tensor]) -> float:
    """NaN of none."""
    return float(torch.stack(values).mean()) if values else math.nan


def _finite(value: float) -> float | None:
    """For JSON, which has no other numbers."""
    return round(value, 6) if math.isfinite(value) else None


def _step_of(checkpoint: Checkpoint) -> int:
    assert checkpoint.manifest is not None
    return checkpoint.manifest.step or 0


def _finished(folder: RunFolder, checkpoint: Checkpoint) -> Outcome:
    """The outcome of a run that has nothing left to do."""
    progress = stored_values(checkpoint)["progress"]
    parameters = sum(math.prod(shape) for shape in checkpoint.model.shapes.values())
    return Outcome(
        FINISHED,
        folder,
        checkpoint.path,
        _step_of(checkpoint),
        parameters,
        progress.get("first_held_out", math.nan),
        progress.get("held_out", math.nan),
        math.nan,
    )
