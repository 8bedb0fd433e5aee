"""The loop: from options to a trained, kept and proven model.

    text -> tokens -> batch i, a pure function of (seed, i) -> loss -> optimizer -> checkpoint -> proof

A run is continued from its newest good checkpoint with everything that decides what comes next: weights, optimizer state,
step, and the state of every random number generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from origo.checkpointer import Checkpointer
from origo.data.batches import TrainingBatches
from origo.data.tokenizer import Tokenizer
from origo.data.tokens import TokenData
from origo.errors import CheckpointError, RunError, StorageError
from origo.models.config import GPTConfig
from origo.models.gpt import GPT
from origo.snapshot import stored_values
from origo.state.rng import seed_all
from origo.store.layout import TOKENIZER
from origo.store.reader import Checkpoint
from origo.store.run import newest_good, step_folder
from origo.training.compilation import Compilation, compile_in_place
from origo.training.display import Display, Standing
from origo.training.evaluation import held_out_loss
from origo.training.metering import Meter
from origo.training.optimizer import build_optimizer, learning_rate
from origo.training.options import TrainOptions, duration
from origo.training.plot import plot_losses
from origo.training.precision import Compute, choose_compute
from origo.training.preparation import prepare_data
from origo.training.proof import Proof, prove
from origo.training.run_folder import FINISHED, INTERRUPTED, RUNNING, RunFolder, require_same_run
from origo.training.sample import write_sample
from origo.training.signals import StopRequest


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    folder: RunFolder
    checkpoint: Path
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


def train(options: TrainOptions, display: Display) -> Outcome:
    """Start a run, or continue it.

    Raises:
        OrigoError: something of the user's or of the surroundings prevents it; said in a sentence.
    """
    began = time.monotonic()
    folder = RunFolder(options.run_path)
    checkpointer = Checkpointer(
        folder.checkpoints,
        keep_last=options.run.keep_last,
        keep_every=options.run.keep_every or None,
        keep_best="val_loss" if options.run.keep_best else None,
    )
    with checkpointer:
        outcome = _train(options, folder, checkpointer, display, began)
    for note in checkpointer.notes:
        display.warn(note)
    return outcome


def _train(options: TrainOptions, folder: RunFolder, checkpointer: Checkpointer, display: Display, began: float) -> Outcome:
    before = folder.description()
    if before is not None:
        changes = require_same_run(before["options"], options, folder.path)
        if before["status"] != FINISHED:
            checkpointer.acquire()  # before looking what is there: another process may be adding to it
        found = newest_good(folder.checkpoints)
        for path, reason in found.skipped if found else ():
            display.warn(f"Passed over '{path}': {reason}")
        if found is not None and before["status"] == FINISHED and _step_of(found.checkpoint) >= options.optimization.steps:
            return _finished(folder, found.checkpoint)
        for change in changes:
            display.note(f"Changed since the run was started: {change}.")
    else:
        found = None
        folder.require_writable()
    compute = choose_compute(options.run.device, options.run.precision)
    tokenizer, tokens = prepare_data(options, found.checkpoint if found else None, display)
    checkpointer.acquire()
    trainer = Trainer(options, folder, checkpointer, compute, tokenizer, tokens, display)
    if found is not None:
        trainer.restore(found.checkpoint)
    return trainer.run(began)


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
    ) -> None:
        self.options, self.folder, self.checkpointer = options, folder, checkpointer
        self.compute, self.display = compute, display
        self.tokenizer, self.tokens = tokenizer, tokens
        self.config: GPTConfig = options.model.config(tokenizer.vocab_size)
        steps = options.optimization
        self.batches = TrainingBatches(
            tokens.train, self.config.context_length, steps.batch_size, steps.seed, options.data.corpus.description
        )
        seed_all(steps.seed)
        self.model = GPT(self.config).to(compute.device)
        self.optimizer = build_optimizer(self.model, steps)
        self.step = 0  # steps done
        self.seconds = 0.0  # that they and everything between them took
        self.losses: list[torch.Tensor] = []  # of the steps since the last row of metrics.jsonl
        self.first_held_out = math.nan
        self.held_out = math.nan
        self.measured_step = self.kept_step = -1  # the last steps whose held-out loss was measured, and that were kept
        self.checkpoint: Path | None = None  # the newest one
        self.meter = Meter(steps.batch_size * self.config.context_length)
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl, not written yet
        self.written = True  # whether what is only looked at could be written the last time

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        progress = stored_values(checkpoint)["progress"]
        if progress["tokens"] != self.tokens.path.name:
            raise RunError(
                f"The text of the run '{self.folder.path}' has changed since it was started, so it cannot go on as it was: "
                "bring the text back, or start a new run under another --name."
            )
        self.checkpointer.restore_from(checkpoint, {"model": self.model, "optimizer": self.optimizer})
        self.checkpoint, self.kept_step = checkpoint.path, _step_of(checkpoint)
        self.step, self.seconds = self.kept_step, progress["seconds"]
        self.first_held_out, self.held_out = progress["first_held_out"], progress["held_out"]
        self.losses = [torch.tensor(loss, device=self.compute.device) for loss in progress["losses"]]

    def run(self, began: float) -> Outcome:
        """Train to the end, or to an interruption; ``began`` is when the time limit began, of :func:`time.monotonic`."""
        run, steps = self.options.run, self.options.optimization.steps
        self.display.note(
            f"Model: {self.options.model.preset}, {self.parameters / 1e6:.1f}M parameters, context "
            f"{self.config.context_length}; {self.compute}"
        )
        if self.step < steps:
            compilation, first_loss = self._compile()
        else:  # stopped after its last step, or asked for fewer than it has
            compilation, first_loss = None, math.nan
        self._describe(RUNNING)
        self.folder.drop_metrics_after(self.step if self.step else -1)
        self.folder.keep_tokenizer(self.tokenizer.to_json())
        started_at = time.perf_counter() - self.seconds
        if self.step == 0:
            self._measure()
            self.first_held_out = self.held_out
            self._log(first_loss, started_at)
        elif self.step < steps:
            self.display.note(f"Continuing after step {self.step} of {steps}.")
        limit = duration(run.time_limit) if run.time_limit else None
        with self.display.training(), StopRequest(limit, began) as stop:
            while self.step < steps and not stop.requested:
                measured = (self.step + 1) % run.eval_every == 0 or self.step + 1 == steps
                logged = (self.step + 1) % run.log_every == 0 or measured
                with self.meter.step():
                    self.losses.append(self._train_step())
                    if logged and self.compute.device.type == "cuda":
                        torch.cuda.synchronize()  # the time of the steps since the last row, not of their launches
                self.step += 1
                if measured:
                    self._measure()
                if logged:
                    self._log(self._mean_loss(), started_at, measured=measured)
                if self.step % run.save_every == 0 or self.step == steps:
                    self._keep(started_at)
                if self.checkpointer.progress is not None:
                    stop.reserve = self.checkpointer.progress.seconds
        self._keep_for_sure(started_at)
        if self.step < steps:
            self._describe(INTERRUPTED)
            return self._outcome(INTERRUPTED, compilation, None, stop)
        proof = self._prove()
        self._describe(FINISHED)
        return self._outcome(FINISHED, compilation, proof)

    def _compile(self) -> tuple[Compilation, float]:
        """Compile, and the loss of the next batch as things stand."""
        inputs, targets = self._batch(self.step)
        losses: list[float] = []

        def dry_run() -> None:
            devices = [self.compute.device] if self.compute.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                with self.compute.autocast():
                    loss = self.model(inputs, targets)
                loss.backward()
            self.optimizer.zero_grad()
            losses.append(loss.item())

        title = "Compiling" if self.options.run.compile else "First step"
        with self.display.activity(title) as activity:
            compilation = compile_in_place(self.model, self.options.run.compile, dry_run)
            activity.result = "in place; every name stays as it is" if compilation.compiled else "without compilation"
        if compilation.reason:
            self.display.warn(f"torch.compile does not work here, going on without: {compilation.reason}")
        return compilation, losses[-1]

    def _batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches[number]
        return inputs.to(self.compute.device), targets.to(self.compute.device)

    def _train_step(self) -> torch.Tensor:
        """One optimizer step; its loss, a 0-d tensor that nobody has waited for yet."""
        options = self.options.optimization
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self._batch(self.step)
        with self.compute.autocast():
            loss: torch.Tensor = self.model(inputs, targets)
        loss.backward()
        if options.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _mean_loss(self) -> float:
        """The mean of the losses since the last call."""
        mean = _require_finite(self.losses, self.step, self.folder)
        self.losses.clear()
        return mean

    def _measure(self) -> None:
        """The held-out loss, and a sample of text."""
        run, options = self.options.run, self.options.optimization
        self.held_out = held_out_loss(
            self.model, self.tokens.held_out, self.config.context_length, options.batch_size, run.eval_batches, self.compute
        )
        self.measured_step = self.step
        text = write_sample(self.model, self.tokenizer, self.tokens.held_out)
        self._write(lambda: self.folder.add_sample(self.step, text))
        steps = options.steps
        if self.step and self.step < steps and self.step % max(1, steps // 3 // run.eval_every * run.eval_every) == 0:
            self.display.quote(
                f"Sample after step {self.step}, of a text that was held out (what was given is in brackets):", text
            )

    def _log(self, loss: float, started_at: float, *, measured: bool = True) -> None:
        rate = self.meter.tokens_per_second()
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.meter.tokens_per_step,
            "train_loss": round(loss, 6),
            "lr": learning_rate(max(0, self.step - 1), self.options.optimization),
            "tokens_per_second": round(rate, 1),
            "seconds": round(time.perf_counter() - started_at, 3),
        }
        if measured:
            row["val_loss"] = round(self.held_out, 6)
        self.rows.append(row)
        self._write(self._write_rows)
        if measured:
            self._write(lambda: plot_losses(self.folder.read_metrics(), self.folder.loss_plot, self.folder.path.name))
        left = (self.options.optimization.steps - self.step) * self.meter.tokens_per_step / rate if rate else math.nan
        standing = Standing(self.step, self.options.optimization.steps, loss, self.held_out, rate, left)
        self.display.standing(standing, keep=measured)

    def _write_rows(self) -> None:
        self.folder.add_metrics(self.rows)
        self.rows.clear()

    def _write(self, write: Callable[[], None]) -> None:
        """Write what is only to be looked at: a full disk does not stop training for it."""
        try:
            write()
            self.written = True
        except StorageError as error:
            if self.written:
                self.display.fail(f"{error} Training goes on, and this is tried again each time.")
            self.written = False

    def _keep(self, started_at: float) -> None:
        """Keep this step, if there is anything new. What cannot be kept is told, and training goes on."""
        try:
            self.checkpointer.wait()  # what the last one says, rather than in the place of this one
        except (StorageError, CheckpointError) as error:
            self._not_kept(error)
        try:
            self._save(started_at)
        except (StorageError, CheckpointError) as error:
            self._not_kept(error)

    def _not_kept(self, error: Exception) -> None:
        self.kept_step = -1
        try:
            found = self.checkpointer.steps
        except StorageError:  # the folder itself cannot be reached
            found = []
        self.checkpoint = step_folder(self.folder.checkpoints, found[-1]) if found else None
        left = f"step {found[-1]} is the newest that is kept" if found else "no step is kept yet"
        self.display.fail(f"A checkpoint was not kept: {error} Training goes on, and tries again when the next is due; {left}.")

    def _keep_for_sure(self, started_at: float) -> None:
        """Keep the last step, and wait until it is on the disk.

        Raises:
            StorageError, CheckpointError: it cannot be kept.
        """
        self._keep(started_at)
        try:
            self.checkpointer.wait()
        except (StorageError, CheckpointError) as error:
            self._not_kept(error)
        if self.kept_step != self.step:  # once more, with the reason if it fails again
            self._save(started_at)
            self.checkpointer.wait()

    def _save(self, started_at: float) -> None:
        """Write a checkpoint of the model and of everything that decides what comes next, if there is anything new."""
        if self.kept_step == self.step:
            return
        _require_finite(self.losses, self.step, self.folder)
        self.seconds = time.perf_counter() - started_at
        progress = {
            "seconds": self.seconds,
            "tokens": self.tokens.path.name,
            "first_held_out": self.first_held_out,
            "held_out": self.held_out,
            "losses": [loss.item() for loss in self.losses],
        }
        self.checkpointer.save(
            self.step,
            {"model": self.model, "optimizer": self.optimizer, "progress": progress},
            {"val_loss": self.held_out} if self.measured_step == self.step else {},
            files={TOKENIZER: self.tokenizer.to_json()},
        )
        while self.checkpointer.notes:
            self.display.warn(self.checkpointer.notes.pop(0))
        self.checkpoint = step_folder(self.folder.checkpoints, self.step)
        self.kept_step = self.step

    def _prove(self) -> Proof:
        assert self.checkpoint is not None
        self.checkpointer.wait()
        if self.measured_step != self.step:  # by another process, which may have measured otherwise
            self._measure()
        with self.display.activity("Proof") as activity:
            proof = prove(
                self.checkpoint,
                self.held_out,
                self.tokens.path,
                batch_size=self.options.optimization.batch_size,
                eval_batches=self.options.run.eval_batches,
                device=str(self.compute.device),
                precision="fp32" if self.compute.dtype == torch.float32 else "bf16",
            )
            activity.result = "a fresh process without torch.compile opened the checkpoint"
        if not proof.holds:
            raise CheckpointError(
                f"A fresh process finds a held-out loss of {proof.held_out:.6f} in '{self.checkpoint}', the trained model has "
                f"{proof.expected:.6f}: the checkpoint is not what was trained. Please report this."
            )
        return proof

    def _describe(self, status: str) -> None:
        facts = {
            "step": self.step,
            "parameters": self.parameters,
            "held_out": None if math.isnan(self.held_out) else self.held_out,
            "model": self.config.to_dict(),
            "token_cache": str(self.tokens.path),
        }
        if status == RUNNING:  # without it the run could not be continued
            self.folder.describe(self.options, status, **facts)
        else:
            self._write(lambda: self.folder.describe(self.options, status, **facts))

    def _outcome(
        self, status: str, compilation: Compilation | None, proof: Proof | None, stop: StopRequest | None = None
    ) -> Outcome:
        assert self.checkpoint is not None
        return Outcome(
            status,
            self.folder,
            self.checkpoint,
            self.step,
            self.parameters,
            self.first_held_out,
            self.held_out,
            self.meter.mean_tokens_per_second(),
            compilation,
            proof,
            stop.exit_code if stop else 0,
            stop.reason if stop else "",
        )


def _require_finite(losses: list[torch.Tensor], step: int, folder: RunFolder) -> float:
    """The mean of some losses, NaN of none.

    Raises:
        RunError: it is not a number, so what was trained since the last checkpoint is of no use.
    """
    if not losses:
        return math.nan
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise RunError(
            f"The loss is not a finite number any more at step {step}: lower --learning-rate or raise --warmup-steps, under "
            f"another --name. The checkpoints in '{folder.checkpoints}' are from before."
        )
    return mean


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
