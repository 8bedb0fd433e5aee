"""Where the weights themselves have become bad: back to a good checkpoint, and on without the text that did it.

As PaLM's authors did by hand (Chowdhery et al., 2022). To the newest good checkpoint; where that does not help, to the one
before it. What happened in the abandoned steps stays in metrics.jsonl as events.
"""

from __future__ import annotations

from onym.errors import RunError
from onym.state.dtensor import full_tensor
from onym.train.display import Display
from onym.train.log import ROLLBACK, SKIPPED, TrainLog
from onym.train.saving import CheckpointSaver
from onym.train.schedule import Schedule
from onym.train.spikes import TOO_MANY
from onym.train.state import TrainState
from onym.train.step import Stepper

_MOST_ROLLBACKS = 3
"""With nothing saved between them, before the run stops with a diagnosis."""


class Recovery:
    """Rolls a run back."""

    def __init__(self, stepper: Stepper, saver: CheckpointSaver, log: TrainLog, schedule: Schedule, display: Display) -> None:
        self._stepper, self._saver, self._log, self._schedule, self._display = stepper, saver, log, schedule, display
        self._tried: list[int] = []  # the steps of rollbacks since a checkpoint was saved

    def is_needed(self, *, logs: bool, checks_weights: bool) -> bool:
        """Whether the steps just taken show that the weights are bad; waits for the device where asked to look.

        Args:
            logs: whether the run waits for the device anyway, so that the streak can be read.
            checks_weights: whether weights have to be finite, because they are about to be evaluated or saved.
        """
        too_many = logs and int(self._stepper.guard.streak) >= TOO_MANY
        return too_many or (checks_weights and not self._stepper.finite)

    def saved(self) -> None:
        """A checkpoint was saved: what was tried before it has helped."""
        self._tried.clear()

    def roll_back(self, state: TrainState) -> TrainState:
        """Restore a good checkpoint; returns its state, with the batches since it skipped. A collective.

        Raises:
            RunError: there is none, or rollbacks do not help.
        """
        ranks = self._stepper.ranks
        ranks.on_all_ranks(self._saver.wait)  # what rank 0 is writing is there for all
        target = self._saver.rollback_target(self._tried)
        reason = self._reason(state)
        if target is None or len(self._tried) >= _MOST_ROLLBACKS:
            steps = " and ".join(map(str, dict.fromkeys(self._tried)))
            tried = f", and {len(self._tried)} rollbacks to step {steps} did not help" if self._tried else ""
            where = f"it continues from step {self._saver.newest_step}" if target else "no checkpoint was saved before"
            raise RunError(
                f"Training has become unstable: {reason}{tried}. Lower --learning-rate or raise --warmup-steps, and run the "
                f"same command again ({where}); if it is always the same text, look at what is in it."
            )
        ranks.on_all_ranks(lambda: None)  # a barrier: all ranks have looked at the folder before it changes
        self._log.report_skipped_steps(state)
        abandoned = self._log.all_rows(state)
        restored = self._saver.restore(target)
        self._saver.archive_steps()
        restored.tokens, restored.environment, restored.micro_batch = state.tokens, state.environment, state.micro_batch
        first, end = state.batch_number(restored.step), state.batch_number(state.step)
        restored.skipped_batches = [*state.skipped_batches, [first, end - first]]
        # Skipped steps that the checkpoint holds as pending are reported again from there.
        events = [row for row in abandoned[restored.rows_written + len(restored.rows) :] if "event" in row]
        events = [row for row in events if row["event"] == ROLLBACK or row["step"] > restored.step]
        events.append({"event": ROLLBACK, "step": restored.step, "from": state.step, "batches": [first, end - first]})
        restored.rows = [*restored.rows, *events]
        restored.skipped_steps += sum(row["event"] == SKIPPED for row in events)
        restored.rollbacks += sum(row["event"] == ROLLBACK for row in events)
        self._tried.append(restored.step)
        self._log.rewind(restored)
        self._display.fail(
            f"{reason[0].upper()}{reason[1:]}: back to step {restored.step}, and on without batches {first} to {end - 1}."
        )
        return restored

    def _reason(self, state: TrainState) -> str:
        last, streak = state.pending[-1], int(self._stepper.guard.streak)
        bad = [name for name, weights in self._stepper.model.named_parameters() if not full_tensor(weights).isfinite().all()]
        steps = f"{streak} steps in a row up to step {state.step} could not be applied" if streak else ""
        return (
            f"{steps or f'the result of step {state.step} is not finite'} (loss {float(last.loss):.4g}, gradient norm "
            f"{float(last.norm):.4g}, learning rate {self._schedule.learning_rate(state.step - 1):.3g}"
            f"{f', non-finite weights: {len(bad)} tensors, the first {bad[0]}' if bad else ''})"
        )
