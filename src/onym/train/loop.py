"""The training loop: batch, step, evaluate, save, recover.

    text -> tokens -> batch i, a pure function of (seed, i) -> step -> checkpoint -> proof

Each part has a file of its own: :mod:`.step`, :mod:`.evaluate`, :mod:`.saving`, :mod:`.recovery`, :mod:`.log`. How far the run
is, is in its :class:`TrainState` and nowhere else; :mod:`.build` makes a trainer from the options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from onym.checkpoint.checkpointer import Checkpointer
from onym.compile.cache import warm_start
from onym.compile.in_place import Compilation, How
from onym.data.batches import Batch
from onym.data.examples import Examples
from onym.data.prefetch import Prefetcher
from onym.data.sources import Sources
from onym.errors import CheckpointError, RunError
from onym.gpt.hardware import synchronize
from onym.train.display import Display
from onym.train.dry_run import prepare
from onym.train.evaluate import MAIN, Evaluator
from onym.train.log import TrainLog
from onym.train.memory import release_gpu_memory
from onym.train.options import TrainOptions
from onym.train.planned_kill import planned_kill
from onym.train.proof import Proof, prove
from onym.train.recovery import Recovery
from onym.train.run_folder import FINISHED, INTERRUPTED, RUNNING, RunFolder
from onym.train.saving import CheckpointSaver
from onym.train.schedule import Schedule
from onym.train.signals import StopRequest
from onym.train.state import TrainState
from onym.train.step import Stepper
from onym.units import parse_duration


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    status: str
    options: TrainOptions
    folder: RunFolder
    checkpoint: Path | None
    """The newest; None where none could be saved."""
    state: TrainState
    parameters: int
    """Of the model; where an earlier process finished the run with an adapter, the adapter's."""
    trained_parameters: int
    """Those of them that are not frozen."""
    tokens_per_second: float = math.nan
    """Of the steps alone."""
    share_waited: float = 0.0
    """Of the steps' time, for data."""
    compilation: Compilation | None = None
    """None where there was nothing left to train."""
    proof: Proof | None = None
    """None where the run was interrupted, or memory was too small."""
    exit_code: int = 0
    """Why it was interrupted, for the program that started it; see :class:`StopRequest`."""
    reason: str = ""
    non_finite: bool = False
    """Whether it was interrupted with non-finite weights, so that the checkpoint is an earlier one."""
    is_rank0: bool = True
    """Whether this process prints."""


@dataclass
class Trainer:
    """A run in progress."""

    options: TrainOptions
    folder: RunFolder
    schedule: Schedule
    sources: Sources | Examples
    display: Display
    checkpointer: Checkpointer
    stepper: Stepper
    batches: Prefetcher
    evaluator: Evaluator
    saver: CheckpointSaver
    log: TrainLog
    recovery: Recovery
    state: TrainState
    micro_batches: list[int]
    """Sizes to try, the largest first."""
    compiled: How | None = None
    """How the run is compiled from its beginning on; None before that is known."""
    compilation: Compilation | None = None
    evaluated_step: int = -1
    """The step that this process evaluated last."""
    checkpoint_due: bool = False

    def run(self, began: float) -> Outcome:
        """Train to the end, or to an interruption; ``began`` is when the time limit began, of :func:`time.monotonic`."""
        run, ranks = self.options.run, self.stepper.ranks
        first_loss = math.nan if self.finished else self.prepare()
        ranks.on_all_ranks(self.checkpointer.acquire)  # the first thing that leaves a trace of a new run
        ranks.on_all_ranks(lambda: self.log.describe(self.state, RUNNING, **self.about()))
        self.log.begin(self.state, self.evaluator.tokenizer.to_json())
        if self.state.step == 0:
            values = self.evaluate()
            self.state.first_held_out = self.state.held_out
            self.log.row(self.state, values, first_loss=first_loss)
        elif self.state.step < self.schedule.steps:
            self.display.note(f"Continuing after step {self.state.step} of {self.schedule.steps}.")
        limit = parse_duration(run.time_limit, "--time-limit") if run.time_limit else None
        with self.display.training(), StopRequest(limit, began, ranks) as stop:
            self.train(stop)
            # Still listening: a scheduler sends SIGTERM after its SIGUSR1, which must not end this save.
            finite = self.stepper.finite
            if finite:
                self.save(durably=True)
            else:  # stopped before anything looked at the weights
                self.saver.wait()
        self.log.close()
        if not self.finished:
            return self.end(INTERRUPTED, stop, finite=finite)
        if self.state.step < self.schedule.steps:
            worse = self.state.evaluations_since_best
            self.display.note(f"Stopped after step {self.state.step}: {worse} evaluations without a better held-out loss.")
        # Evaluated by an earlier process, maybe on another machine; or NaN, for a reason that may be gone.
        if self.evaluated_step != self.state.step or not math.isfinite(self.state.held_out):
            self.evaluate()
        return self.end(FINISHED, stop, proof=self.prove() if ranks.is_rank0 else None)

    def train(self, stop: StopRequest) -> None:
        """The loop."""
        run, steps = self.options.run, self.schedule.steps
        while not self.finished and not stop.requested:
            evaluates = (self.state.step + 1) % run.eval_every == 0 or self.state.step + 1 == steps
            logs = (self.state.step + 1) % run.log_every == 0 or evaluates
            saves = self.checkpoint_due or (self.state.step + 1) % run.save_every == 0
            self.take_step(waits=logs or saves)
            self.checkpoint_due |= self.state.step % run.save_every == 0 or self.state.step == steps
            # What is evaluated or saved has to be finite; the last step is both, so no run ends with bad weights.
            if self.recovery.is_needed(logs=logs, checks_weights=evaluates or self.checkpoint_due):
                self.roll_back()
                continue
            values = self.evaluate() if evaluates else {}
            if logs:
                self.log.row(self.state, values)
            # In a streak of skipped steps nobody knows yet whether the weights are worth saving.
            if self.checkpoint_due and not int(self.stepper.guard.streak):
                self.save()
            if self.checkpointer.progress is not None:
                stop.reserve = self.checkpointer.progress.seconds

    @property
    def finished(self) -> bool:
        """Whether no step is left to take: the last is done, or the held-out loss has not improved for long enough."""
        patience = self.options.optimization.patience
        settled = bool(patience) and self.state.evaluations_since_best >= patience
        return self.state.step >= self.schedule.steps or settled

    def take_step(self, *, waits: bool) -> None:
        """A step; ``waits`` for the GPU, so that the time of the steps since the last row is measured, not of launches."""
        step = self.state.step
        planned_kill.before(step)
        with self.log.meter.step(lambda: self.batches.waited_seconds):
            self.state.pending.append(self.stepper(self.batch(step), self.schedule.learning_rate(step), step))
            if waits:
                synchronize(self.stepper.compute.device)
        self.state.step += 1

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the device."""
        return self.batches.take(self.state.batch_number(step), self.state.batch_number(step + 1))

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model, and write a sample; returns the losses by their names in metrics.jsonl."""
        state, model, average = self.state, self.stepper.model, self.stepper.average
        losses = self.evaluator.losses(model, state.micro_batch)
        state.record_evaluation(losses[MAIN])
        self.evaluated_step = state.step
        if math.isnan(state.held_out):
            self.display.warn(f"The held-out loss after step {state.step} is not a number; training continues.")
        if (text := self.evaluator.sample(model)) is not None:
            self.log.sample(state, text)
        self.checkpoint_due |= self.options.run.keep_best and state.best_step == state.step > 0
        if average is None:
            return losses
        return {**losses, "ema_val_loss": self.evaluator.losses(average.model, state.micro_batch)[MAIN]}

    def save(self, *, durably: bool = False) -> None:
        """Save a checkpoint in the background; ``durably`` waits for it, and raises where it fails."""
        state = self.state
        self.checkpoint_due = False
        self.recovery.saved()
        self.log.sync()
        state.seconds, state.streak = self.log.seconds(), int(self.stepper.guard.streak)
        evaluated = self.evaluated_step == state.step and math.isfinite(state.held_out)
        metrics = {"val_loss": state.held_out} if evaluated else {}
        if durably:
            self.stepper.ranks.on_all_ranks(lambda: self.saver.save_durably(state, metrics))
        else:
            self.saver.save(state, metrics)

    def roll_back(self) -> None:
        """Continue from a good checkpoint, without the batches since then."""
        try:
            self.state = self.recovery.roll_back(self.state)
        except RunError:
            self.log.try_describe(self.state, INTERRUPTED, **self.about())
            raise
        self.checkpoint_due = False

    def prepare(self) -> float:
        """Compile, find the micro-batch that fits; returns the loss of the next batch as things stand."""
        state, sharding, left = self.state, self.stepper.sharding, self.schedule.steps - self.state.step
        how = self.options.run.compile
        if how == "auto" and self.compiled is not None:
            how = self.compiled  # as the run began: another way rounds otherwise
        if how == "whole" and sharding is not None:
            how = "blocks"
            self.display.note(f"Compiling each block: --parallel {self.options.run.parallel} gathers one after the other.")
        with self.display.activity("First step") as activity, warm_start(how != "off", self.display.warn) as warm:
            compilation, loss = prepare(self.stepper, self.batch(state.step), self.micro_batches, how, left)
            activity.title = "Compiling" if compilation.compiled else activity.title
            activity.result = f"{compilation}{warm}" if compilation.compiled else str(compilation)
            if how == "auto" and not compilation.compiled and not compilation.reason:
                most = "whole" if sharding is None else "blocks"
                activity.result += f": it would not pay in {left:,} steps (--compile {most} does it)"
            parts = self.schedule.batch_size // self.stepper.ranks.world_size // self.stepper.micro_batch
            if parts > 1:
                activity.result += f"; {parts} micro-batches of {self.stepper.micro_batch} a step"
        state.micro_batch, self.compilation, self.compiled = self.stepper.micro_batch, compilation, compilation.how
        self.log.compiled(compilation)
        if compilation.reason:
            self.display.warn(f"Going on without torch.compile: {compilation.reason}.")
        return loss

    def prove(self) -> Proof | None:
        """Open the checkpoint in a fresh process, and evaluate it there; None where there is no memory for it.

        A sharded model need not fit where one process is.
        """
        checkpoint, state, compute = self.saver.checkpoint, self.state, self.stepper.compute
        assert checkpoint is not None
        if not math.isfinite(state.held_out):
            raise RunError(
                f"The held-out loss is not a number, so nothing shows that '{checkpoint}' is what was trained; its weights are "
                f"finite. Either the held-out text has nothing to predict ({self.sources.held_out_tokens} tokens; --held-out), "
                f"or the model leaves the range of {compute.precision} (try --precision fp32): run the same command again."
            )
        # Somebody may have deleted the token cache, which stays mapped in this process alone.
        self.sources.relink(self.evaluator.tokenizer.to_json())
        release_gpu_memory(compute.device)  # the fresh process needs some of it
        with self.display.activity("Proof") as activity:
            try:
                proof = prove(
                    checkpoint,
                    state.held_out,
                    self.sources,
                    batch_size=state.micro_batch,
                    eval_batches=self.evaluator.sequences // state.micro_batch,
                    device=str(compute.device),
                    precision=compute.precision,
                    rounded=self.evaluator.rounds_weights,
                    document_mask=self.evaluator.separator is not None,
                    deterministic=self.options.run.deterministic,
                )
            except MemoryError:
                activity.result = "skipped: a fresh process has no memory for all of the model beside the training"
                return None
            activity.result = "a fresh process without torch.compile opened the checkpoint"
        if not proof.holds:
            raise CheckpointError(
                f"A fresh process finds a held-out loss of {proof.held_out:.6f} in '{checkpoint}', the trained model has "
                f"{proof.expected:.6f}: the checkpoint is not what was trained. Please report this."
            )
        return proof

    def about(self) -> dict[str, object]:
        """What run.json has besides the options and the state."""
        return {
            "parameters": self.parameters,
            "compiled": self.compiled,
            "model": self.stepper.model.config.to_dict(),
            "sources": self.sources.to_list(),
            "skipped_files": self.sources.skipped_files,
        }

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.stepper.model.parameters())

    def end(self, status: str, stop: StopRequest, *, finite: bool = True, proof: Proof | None = None) -> Outcome:
        """Write run.json for the last time."""
        self.log.try_describe(self.state, status, **self.about())
        return Outcome(
            status=status,
            options=self.options,
            folder=self.folder,
            checkpoint=self.saver.checkpoint,
            state=self.state,
            parameters=self.parameters,
            trained_parameters=sum(each.numel() for each in self.stepper.model.parameters() if each.requires_grad),
            tokens_per_second=self.log.meter.mean_tokens_per_second(),
            share_waited=self.log.meter.mean_share_waited(),
            compilation=self.compilation,
            proof=proof,
            exit_code=stop.exit_code if status == INTERRUPTED else 0,
            reason=stop.reason,
            non_finite=not finite,
            is_rank0=self.stepper.ranks.is_rank0,
        )
