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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the deletion of older checkpoints, which the Trainer does before the new one is durable."""
        if args.save_total_limit is not None:  # else there is none, or it was taken by a run that failed
            self._limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint in the background."""
        self._wait()  # and until each rank has written its random number generators
        name = f"checkpoint-{state.global_step}"
        root = Path(str(args.output_dir))
        found = [path for path in (root / name, *root.glob(f"*/{name}")) if path.is_dir()]  # a search's runs are below it
        if not args.should_save or not found:
            return
        folder = max(found, key=lambda path: path.stat().st_mtime_ns)
        older = _to_delete(folder, self._limit, state.best_model_checkpoint)
        self._thread = threading.Thread(target=self._seal, args=(folder, older), name=_THREAD)
        self._thread.start()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last checkpoint."""
        args.save_total_limit, limit, self._limit = self._limit, self._limit, None
        self._wait()
        if limit == 1 and state.best_model_checkpoint is not None and args.should_save:  # as the Trainer does
            for path in _to_delete(Path(state.best_model_checkpoint), limit, None):
                shutil.rmtree(path, ignore_errors=True)

    def _seal(self, folder: Path, older: list[str]) -> None:
        try:
            seal(folder)
            for path in older:
                shutil.rmtree(path, ignore_errors=True)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        raise_on_all_ranks(failure, error=StorageError)


def _to_delete(newest: Path, limit: int | None, best: str | None) -> list[str]:
    """What the Trainer would delete once ``newest`` is there; what has no seal goes first."""
    kept = {str(newest), str(Path(best or newest))}
    others = [path for path in sort_checkpoints(str(newest.parent), use_mtime=True) if path not in kept]
    others.sort(key=lambda path: Path(path, SEAL).exists())
    return others[: max(0, len(others) + len(kept) - limit)] if limit is not None and limit > 0 else []


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
