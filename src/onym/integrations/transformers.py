"""transformers' Trainer with durable checkpoints: ``callbacks=[OnymCallback()]``, then ``last_checkpoint(output_dir)``.

The Trainer writes ``checkpoint-N`` as ever, with the model under its own names (``torch_compile=True`` or not). The callback
then fsyncs and hashes it in the background, and only then deletes older ones by the Trainer's own ``save_total_limit``.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from onym.integrations.sealed import newest_sealed, seal
from onym.state.collectives import get_world_size

_FOLDER = r"checkpoint-(\d+)"


class OnymCallback(TrainerCallback):
    """Makes each checkpoint durable and verifiable before an older one is deleted.

    ``load_best_model_at_end`` and ``metric_for_best_model`` are the Trainer's: its best checkpoint is never deleted.

    Raises:
        StorageError: the disk refused, at the next save or at the end of the training.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the deletion of older checkpoints, which the Trainer does before the new one is durable."""
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint in the background."""
        self._wait()
        if get_world_size() > 1:  # each rank has written its random number generators
            from torch import distributed

            distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        self._thread = Thread(target=self._seal, args=(folder, state.best_model_checkpoint), name="onym-seal")
        self._thread.start()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last checkpoint."""
        args.save_total_limit = self._limit
        self._wait()

    def _seal(self, folder: Path, best: str | None) -> None:
        try:
            seal(folder)
            rotate_checkpoints(str(folder.parent), self._limit, best)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that is complete and as it was written, for ``trainer.train(resume_from_checkpoint=…)``.

    Returns:
        Its path; None where there is none, with which the Trainer begins anew. Newer ones that are damaged or unfinished are
        warned of.
    """
    found = newest_sealed(Path(output_dir), _FOLDER)
    return None if found is None else str(found)
