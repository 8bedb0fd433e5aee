"""transformers' Trainer with durable checkpoints: ``callbacks=[OnymCallback()]``, then ``last_checkpoint(output_dir)``.

The Trainer writes ``checkpoint-N`` as ever, with the model under its own names (``torch_compile=True`` or not). The callback
then fsyncs and hashes it in the background, and only then deletes older ones by the Trainer's own ``save_total_limit``.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from onym.errors import StorageError
from onym.integrations.sealed import SEAL, newest_sealed, seal
from onym.state.collectives import raise_on_all_ranks

_FOLDER = r"checkpoint-(\d+)"
_THREAD = "onym-seal"


class OnymCallback(TrainerCallback):
    """Makes each checkpoint durable and verifiable before an older one is deleted.

    ``load_best_model_at_end`` and ``metric_for_best_model`` are the Trainer's: its best checkpoint is never deleted.

    Raises:
        StorageError: the disk refused, at the next save or at the end of the training.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._sealed: Path | None = None  # what the thread seals; older ones are deleted afterwards
        self._best: str | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the deletion of older checkpoints, which the Trainer does before the new one is durable."""
        if args.save_total_limit is not None:  # else there is none, or it was taken by a run that failed
            self._limit, args.save_total_limit = args.save_total_limit, None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Delete older checkpoints once a new one is durable."""
        if self._thread is not None and not self._thread.is_alive() and self._failure is None:
            self._delete_older()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint in the background."""
        self._wait()  # and until each rank has written its random number generators
        name = f"checkpoint-{state.global_step}"
        root = Path(str(args.output_dir))
        found = [path for path in (root / name, *root.glob(f"*/{name}")) if path.is_dir()]  # a search's runs are below it
        if not args.should_save or not found:
            return
        folder = max(found, key=lambda path: path.stat().st_mtime_ns)
        self._delete_older(but=folder)
        self._sealed, self._best = folder, state.best_model_checkpoint
        self._thread = threading.Thread(target=self._seal, args=(folder,), name=_THREAD)
        self._thread.start()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last checkpoint."""
        args.save_total_limit = self._limit
        self._wait()
        self._delete_older()
        if self._limit == 1 and state.best_model_checkpoint is not None and args.should_save:  # as the Trainer does
            self._sealed, self._best = Path(state.best_model_checkpoint), None
            self._delete_older()
        self._limit = None

    def _seal(self, folder: Path) -> None:
        try:
            seal(folder)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            self._sealed = None
        raise_on_all_ranks(failure, error=StorageError)

    def _delete_older(self, but: Path | None = None) -> None:
        """Delete what the Trainer would, once the newest is sealed; what has no seal goes first."""
        newest, self._sealed, self._thread = self._sealed, None, None
        if newest is None or self._limit is None or self._limit <= 0:
            return
        kept = {newest, Path(self._best or newest)}
        others = [Path(path) for path in sort_checkpoints(str(newest.parent), use_mtime=True)]
        others = sorted((path for path in others if path not in {*kept, but}), key=lambda path: (path / SEAL).exists())
        for path in others[: max(0, len(others) + len(kept) - self._limit)]:
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that is complete and as it was written, for ``trainer.train(resume_from_checkpoint=…)``.

    Returns:
        Its path; None where there is none, with which the Trainer begins anew. Newer ones that are damaged or unfinished are
        warned of.
    """
    for thread in threading.enumerate():  # of a run in this process that was interrupted
        if thread.name == _THREAD:
            thread.join()
    found = newest_sealed(Path(output_dir), _FOLDER)
    return None if found is None else str(found)
