"""Checkpoints of a run that goes on whatever the disk says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onym.checkpoint.checkpointer import Checkpointer
from onym.checkpoint.retention import step_folder
from onym.checkpoint.snapshot import stored_values
from onym.errors import CheckpointError, StorageError
from onym.format.reader import Checkpoint
from onym.state.collectives import broadcast_from_rank0
from onym.train.display import Display

State = Callable[[], tuple[dict[str, Any], dict[str, str]]]
"""What is to be kept, and further texts by file name; asked for only when it is."""


class CheckpointSaver:
    """Keeps steps, and tells which were not kept.

    Args:
        together: whether all processes have to take part in keeping a step, because each has a share of it.
    """

    def __init__(self, checkpointer: Checkpointer, folder: Path, display: Display, *, collective: bool = False) -> None:
        self._checkpointer, self._folder, self._display, self._collective = checkpointer, folder, display, collective
        self.kept_step = -1
        """The last step that was kept, or is being written."""
        self.kept_at = 0.0
        """When, of :func:`time.monotonic`."""
        self.checkpoint: Path | None = None
        """Its folder."""

    def keep(self, step: int, state: State, metrics: dict[str, float]) -> None:
        """Keep a step, if it is a new one. What cannot be kept is told, and training goes on."""
        self.settle()  # what the last one says, rather than in the place of this one
        try:
            self._save(step, state, metrics)
        except (StorageError, CheckpointError) as error:
            self._not_kept(error)

    def settle(self) -> None:
        """Wait for what is being written, and tell if it was not."""
        try:
            self._checkpointer.wait()
        except (StorageError, CheckpointError) as error:
            self._not_kept(error)
        self.kept_step = broadcast_from_rank0(
            lambda: self.kept_step, self._collective
        )  # the first one writes, so it alone knows

    def keep_for_sure(self, step: int, state: State, metrics: dict[str, float]) -> None:
        """Keep the last step, and wait until it is on the disk.

        Raises:
            StorageError, CheckpointError: it cannot be kept.
        """
        self.keep(step, state, metrics)
        self.settle()
        if self.kept_step != step:  # once more, with the reason if it fails again
            self._save(step, state, metrics)
            self._checkpointer.wait()

    def to_go_back_to(self, tried: Sequence[int]) -> Checkpoint | None:
        """The newest good checkpoint before those that were tried in vain; the oldest again where there is none before it."""
        found = None
        for step in reversed([step for step in self._checkpointer.steps if not tried or step <= min(tried)]):
            try:
                checkpoint = self._checkpointer.open(step)
                checkpoint.verify()
                if _is_good(checkpoint):
                    found = checkpoint
                    if step not in tried:
                        break
            except CheckpointError:
                continue
        return found

    def archive_steps(self) -> None:
        """Put aside what is newer than the step that was gone back to: a process that is killed now shall not begin there."""
        try:
            self._checkpointer.archive_steps()
        except StorageError as error:
            self._display.warn(str(error))

    def _save(self, step: int, state: State, metrics: dict[str, float]) -> None:
        if self.kept_step == step:
            return
        objects, texts = state()
        self._checkpointer.save(step, objects, metrics, files=texts)
        while self._checkpointer.notes:
            self._display.warn(self._checkpointer.notes.pop(0))
        self.kept_step, self.kept_at, self.checkpoint = step, time.monotonic(), step_folder(self._folder, step)

    def _not_kept(self, error: Exception) -> None:
        self.kept_step = -1
        try:
            found = self._checkpointer.steps
        except StorageError:  # the folder itself cannot be reached
            found = []
        self.checkpoint = step_folder(self._folder, found[-1]) if found else None
        left = f"step {found[-1]} is the newest that is kept" if found else "no step is kept yet"
        self._display.fail(
            f"A checkpoint was not kept: {error} Training goes on, and tries again when the next is due; {left}."
        )


def _is_good(checkpoint: Checkpoint) -> bool:
    """Whether a run can go back there: its weights are finite, and its last step was applied."""
    weights = checkpoint.model.state().values()
    return not stored_values(checkpoint)["progress"].get("streak") and all(bool(each.isfinite().all()) for each in weights)
