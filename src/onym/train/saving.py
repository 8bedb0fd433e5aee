"""Checkpoints of a run that continues whatever the disk answers: a checkpoint that cannot be written is reported, not fatal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from onym.checkpoint.checkpointer import Checkpointer
from onym.checkpoint.restore import stored_objects
from onym.checkpoint.steps import step_folder
from onym.errors import CheckpointError, StorageError
from onym.format.reader import Checkpoint
from onym.state.collectives import broadcast_from_rank0
from onym.train.display import Display
from onym.train.state import KEY, TrainState
from onym.train.step import Stepper


class CheckpointSaver:
    """Saves and restores a run.

    Args:
        folder: of the checkpoints, as it is shown.
        stepper: holds the model, its optimizers and the rest of what a step changes.
        texts: what else each checkpoint holds, by file name: the tokenizer.
    """

    def __init__(
        self, checkpointer: Checkpointer, folder: Path, display: Display, stepper: Stepper, texts: Mapping[str, str]
    ) -> None:
        self._checkpointer, self._folder, self._display = checkpointer, folder, display
        self._stepper, self._texts = stepper, dict(texts)
        self._collective = stepper.sharding is not None  # each rank writes its shards
        self.saved_step = -1
        """The newest step that is saved, or being written."""
        self.saved_at = 0.0
        """When, of :func:`time.monotonic`."""
        self.checkpoint: Path | None = None
        """Its folder."""

    @property
    def newest_step(self) -> int | None:
        """The newest step in the folder."""
        return max(self._checkpointer.steps, default=None)

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Save a step, if it is a new one; a failure is reported, and training continues."""
        self.wait()  # a failure of the checkpoint before is reported as that
        try:
            self._save(state, metrics)
        except (StorageError, CheckpointError) as error:
            self._report_failure(error)

    def wait(self) -> None:
        """Wait for the background save, and report its failure."""
        try:
            self._checkpointer.wait()
        except (StorageError, CheckpointError) as error:
            self._report_failure(error)
        self.saved_step = broadcast_from_rank0(lambda: self.saved_step, self._collective)  # rank 0 alone knows of a failure

    def save_durably(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Save the last step, and wait until it is durable.

        Raises:
            StorageError, CheckpointError: it cannot be saved.
        """
        self.save(state, metrics)
        self.wait()
        if self.saved_step != state.step:  # a second attempt, whose failure is raised
            self._save(state, metrics)
            self._checkpointer.wait()

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Restore model, optimizers and random number generators; returns the rest."""
        stored = stored_objects(checkpoint)  # of another precision it may have no gradient scaler
        objects = {name: each for name, each in self._stepper.state.items() if name in stored}
        self._checkpointer.restore_from(checkpoint, objects)
        state = TrainState.of(checkpoint)
        self.saved_step, self.checkpoint = state.step, checkpoint.path
        return state

    def rollback_target(self, tried: Sequence[int]) -> Checkpoint | None:
        """The newest good checkpoint before those that did not help; the oldest of them where there is none before it."""
        target = None
        for step in reversed([step for step in self._checkpointer.steps if not tried or step <= min(tried)]):
            try:
                checkpoint = self._checkpointer.open(step)
                checkpoint.verify()
            except CheckpointError:
                continue
            if _is_good(checkpoint):
                target = checkpoint
                if step not in tried:
                    break
        return target

    def archive_steps(self) -> None:
        """Rename the steps after the restored one to aside-…: a process that is started later must not continue from them."""
        try:
            self._checkpointer.archive_steps()
        except StorageError as error:
            self._display.warn(str(error))

    def _save(self, state: TrainState, metrics: dict[str, float]) -> None:
        if self.saved_step == state.step:
            return
        objects = {**self._stepper.state, KEY: state.to_dict()}
        self._checkpointer.save(state.step, objects, metrics, files=self._texts)
        while self._checkpointer.notes:
            self._display.warn(self._checkpointer.notes.pop(0))
        self.saved_step, self.saved_at = state.step, time.monotonic()
        self.checkpoint = step_folder(self._folder, state.step)

    def _report_failure(self, error: Exception) -> None:
        self.saved_step = -1
        try:
            steps = self._checkpointer.steps
        except StorageError:  # the folder itself cannot be reached
            steps = []
        self.checkpoint = step_folder(self._folder, steps[-1]) if steps else None
        newest = f"step {steps[-1]} is the newest that is saved" if steps else "no step is saved yet"
        self._display.fail(
            f"A checkpoint was not saved: {error} Training continues, and tries again when the next is due; {newest}."
        )


def _is_good(checkpoint: Checkpoint) -> bool:
    """Whether a run can go back to it: its weights are finite, and its last step was applied."""
    weights = checkpoint.model.state().values()
    return not TrainState.of(checkpoint).streak and all(bool(each.isfinite().all()) for each in weights)
