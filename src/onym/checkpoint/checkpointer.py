"""``onym.Checkpointer``: a training loop's checkpoints, saved durably in the background, and found again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from onym.checkpoint.background import BackgroundTask, Staging
from onym.checkpoint.restore import Policy, restore_state
from onym.checkpoint.retention import Retention, archive_steps, write_step
from onym.checkpoint.sharded import ShardedSave
from onym.checkpoint.snapshot import capture
from onym.checkpoint.steps import GoodCheckpoint, newest_good, open_step, pin, pins, step_folder, step_number, steps, unpin
from onym.errors import CheckpointError, ConfigError, storage_error
from onym.format.chunk_index import CHUNKS
from onym.format.manifest import CONFIG, MANIFEST, TRAINER, Manifest, is_file_name, is_text
from onym.format.provenance import ask_ahead
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.stored import gather
from onym.format.writer import About, write_folder
from onym.state.collectives import (
    all_gather_object,
    broadcast_from_rank0,
    get_world_size,
    is_rank0,
    run_on_all_ranks,
)
from onym.state.dtensor import any_sharded
from onym.state.model import DtypePolicy, LoadReport
from onym.state.optimizer import Difference, OptimizerReport
from onym.storage.local import make_folder, repair_all_interrupted, sweep
from onym.storage.lock import Lease
from onym.storage.paths import as_path, is_local

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What :meth:`Checkpointer.restore` did."""

    step: int | None
    """The step of the checkpoint; None where there is none yet."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer checkpoints that are damaged, with the reason."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The plain values that the checkpoint has, by name."""
    path: Path | None = None
    reports: Mapping[str, LoadReport | OptimizerReport] = field(default_factory=dict)
    """Of each model and optimizer, by name, what was restored and what was not."""

    def __str__(self) -> str:
        result = f"restored step {self.step} from '{self.path}'" if self.step is not None else "there is no checkpoint yet"
        return result + "".join(f"; passed over '{path}': {reason}" for path, reason in self.skipped)


@dataclass
class Progress:
    """A save that is under way, or was the last one."""

    step: int
    bytes_total: int
    bytes_written: int = 0
    seconds: float = 0.0
    """Since it began; of a save that is done, how long it took."""
    done: bool = False
    _began: float = field(default_factory=time.monotonic, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, written: int) -> None:
        """More was written."""
        with self._lock:
            self.bytes_written += written
            self.seconds = time.monotonic() - self._began


class Checkpointer:
    """Saves a training's checkpoints in a folder, one for each step that is saved, and restores them.

    A checkpoint exists completely or not at all, and the earlier ones stay until it was read back. One program at a time may
    write to a folder; reading needs no right.

    Of several processes (torch.distributed) rank 0 writes. Where FSDP has sharded a model all ranks have to call ``save`` and
    ``restore``, with the same names in the same order, and do what rank 0 decides; otherwise any of them may. Each rank writes
    its own shards of FSDP2's models and its random number generators, rank 0 everything else; any number of ranks, or one
    process alone, reads them.

    Args:
        directory: where the steps are, as ``step-000001000/``; also ``s3://bucket/run``.
        keep_last, keep_every, keep_best: which steps are retained; any one suffices. The newest ones; multiples of a number;
            the best by a metric (``"val_loss"``: the lowest; ``"accuracy:max"``: the highest).
        background: ``save`` returns when the state is copied (which takes as much memory as the state), and a thread does the
            rest. Otherwise it returns when the checkpoint is durable, and needs no memory.
        on_busy: what ``save`` does while the one before is still being written: ``"wait"`` or ``"skip"``.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with Checkpointer("run") as checkpointer:
    ...     restored = checkpointer.restore({"model": model, "optimizer": optimizer})
    ...     _ = checkpointer.save(10, {"model": model, "optimizer": optimizer}, metrics={"val_loss": 3.2})
    >>> print(restored)
    there is no checkpoint yet
    >>> Checkpointer("run").restore({"model": model}).step
    10
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
        background: bool = True,
        on_busy: Literal["wait", "skip"] = "wait",
    ) -> None:
        if not isinstance(directory, str | os.PathLike) and not hasattr(directory, "joinpath"):
            raise ConfigError(f"Checkpointer takes a folder, not a {type(directory).__name__}.")
        if on_busy not in ("wait", "skip"):
            raise ConfigError(f'on_busy is "wait" or "skip", not {on_busy!r}.')
        self.directory = as_path(directory).absolute()  # the program may change its working folder
        self.retention = Retention(keep_last, keep_every, keep_best)
        self.progress: Progress | None = None
        """Of the current or the last save."""
        self.notes: list[str] = []
        """What did not go as asked, and did not stop anything: saves that were skipped, deletions that failed."""
        self._background, self._on_busy = background, on_busy
        self._staging = Staging()
        self._task = BackgroundTask(f"the last checkpoint of '{self.directory}'")
        self._lease: Lease | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._parent: dict[str, Any] | None = None
        self._abandoned: list[int] = []  # steps after the one that was restored
        ask_ahead()
        self._shared_disk = is_local(self.directory)  # whether several ranks write, each its own files

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        files: Mapping[str, str] | None = None,
    ) -> bool:
        """Save the state of a step, as it is now.

        Args:
            step: its number, of optimizer steps done. Later steps in the folder (abandoned by a rollback) are renamed.
            state: by name: the models, wrapped in anything or not; their optimizers; whatever has a ``state_dict()``; plain
                values. The random number generators are always saved.
            metrics: evaluated at this step.
            files: further texts to save with it, by file name.

        Returns:
            Whether it is saved; False only for ``on_busy="skip"``.

        Raises:
            StorageError: the disk refused, or another process writes here; earlier steps are untouched. With ``background``
                it is raised by the next call of ``save``, ``wait`` or ``close``.
            CheckpointError, ConfigError: a value in it cannot be saved; says which.
        """
        if type(step) is not int or step < 0:
            raise ConfigError(f"step is {step!r}: it has to be a whole number from 0 on.")
        with self._lock:
            return self._save(step, state, metrics or {}, files or {})

    def _save(self, step: int, state: Mapping[str, Any], given: Mapping[str, Any], files: Mapping[str, Any]) -> bool:
        collective = isinstance(state, Mapping) and any_sharded(state.values())
        if not collective and not is_rank0():
            return True
        if broadcast_from_rank0(lambda: self._skips(step), collective):
            return False
        metrics, texts = self._after_last_save(lambda: self._checked(given, files), collective)

        is_sharded = collective and get_world_size() > 1 and self._shared_disk
        snapshot = capture(state, texts, sharded=is_sharded)
        about = About(snapshot.architecture, step, metrics, self._parent)
        if not is_sharded:
            broadcast_from_rank0(self.acquire, collective)
            if not is_rank0():
                return True
            tensors = self._staged(snapshot.content.tensors)
            progress = Progress(step, _nbytes(tensors))

            def write(path: Path) -> Manifest:
                return write_folder(path, tensors, snapshot.texts, about, progress.add)

            self._start(progress, lambda: self._commit(step, write))
            return True

        content = replace(snapshot.content, tensors=run_on_all_ranks(lambda: self._staged(snapshot.content.tensors)))
        progress = Progress(step, _nbytes(content.tensors))
        save = ShardedSave.begin(step_folder(self.directory, step), progress.bytes_total, self.acquire)
        if save is None:
            self._shared_disk = False
            self.notes.append(
                f"'{self.directory}' is not seen by all ranks: rank 0 gathers and writes everything. To restore, all ranks "
                "have to see it."
            )
            return self._save(step, state, given, files)

        def lead() -> None:
            with save.leading():
                write = lambda path: save.write(content, snapshot.texts, about, progress.add)  # noqa: E731
                self._commit(step, write, lambda path: save.verify())

        self._start(progress, lead if is_rank0() else lambda: save.follow(content, progress.add))
        return True

    def _skips(self, step: int) -> bool:
        """Whether to skip this save, because the last one is busy. In rank 0."""
        if self._task.busy and self._on_busy == "skip":
            self.notes.append(f"Step {step} was not saved: the one before is still being written.")
            return True
        return False

    def _checked(self, given: Mapping[str, Any], files: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
        """The metrics and texts to save, after the last save. In rank 0."""
        metrics, texts = _numbers(given), _texts(files)
        self._task.wait()
        return metrics, texts

    def _after_last_save(self, decide: Callable[[], T], collective: bool) -> T:
        """Rank 0's decision in all ranks. It raises the error of the last save, and the other ranks drop theirs."""
        try:
            return broadcast_from_rank0(decide, collective)
        finally:
            if collective and not is_rank0():
                self._task.forget()

    def _staged(self, tensors: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """The tensors to write: a copy if the training continues meanwhile."""
        return self._staging.copy(tensors) if self._background else tensors

    def _start(self, progress: Progress, work: Callable[[], None]) -> None:
        """Do the work, in the background or here."""
        self.progress = progress

        def watched() -> None:
            work()
            progress.add(0)
            progress.done = True

        if self._background:
            self._task.start(watched)
        else:
            watched()

    def _commit(self, step: int, write: Callable[[Path], Manifest], verify: Callable[[Path], None] | None = None) -> None:
        """Write, commit, verify and prune, in rank 0."""
        manifest = write_step(
            self.directory,
            step,
            write,
            abandoned=self._abandoned,
            retention=self.retention,
            note=self.notes.append,
            verify=verify,
        )
        self._parent, self._abandoned = {"step": step, "identity": manifest.identity}, []

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | str = "latest",
        *,
        verify: bool = True,
        rng: bool = True,
        strict: bool = True,
        dtype: DtypePolicy = "exact",
        accept: Difference | Iterable[Difference] = (),
        skip_mismatched: str | Iterable[str] = (),
    ) -> Restored:
        """Restore objects from a checkpoint.

        Args:
            state: as it was given to ``save``; what is left out stays as it is. Models may be wrapped otherwise than they were.
            step: ``"latest"`` (the newest that verifies), a number, or the name of a pinned one.
            verify: check every byte before anything is changed.
            rng: restore the random number generators too.
            strict: refuse names that are missing in a model or unexpected, as :func:`onym.load` does.
            dtype: ``"exact"`` refuses a model's tensors of another dtype, ``"cast"`` converts them, as :func:`onym.load` does.
            accept: the differences between the stored optimizer and the live one to go on with, as
                :func:`onym.load_optimizer_state` does: ``"added"`` (a layer that was frozen), ``"removed"``,
                ``"hyperparameters"``, ``"optimizer"``.
            skip_mismatched: names, modules or patterns (``["head.*"]``) of tensors of the models that stay as they are where
                their shapes differ, as :func:`onym.load` does; the optimizer's state of such a parameter starts fresh.

        Raises:
            CheckpointError: all checkpoints are damaged, or there is no such step.
            MismatchError: it does not fit; says why.
        """
        collective = isinstance(state, Mapping) and any_sharded(state.values())
        policy = Policy(strict, dtype, accept, skip_mismatched)
        with self._lock:
            self._after_last_save(self._task.wait, collective)
            while True:
                found = self._find(step, verify, collective)
                if found is None:
                    return Restored(None)
                try:
                    return replace(self._restored(found.checkpoint, state, rng, policy), skipped=found.skipped)
                except CheckpointError:
                    gone = step == "latest" and not found.checkpoint.path.exists()
                    if not any(all_gather_object(gone, collective)):
                        raise
                    # A writer has deleted it before anything was changed: restore its successor.

    def _find(self, step: int | str, verify: bool, collective: bool) -> GoodCheckpoint | None:
        """The checkpoint to restore; all ranks verify it together."""
        if step == "latest":
            return newest_good(self.directory, verify=verify, collective=collective)
        number = broadcast_from_rank0(lambda: step_number(self.directory, step), collective)
        return GoodCheckpoint(open_step(step_folder(self.directory, number), verify=verify, collective=collective))

    def restore_from(self, checkpoint: Checkpoint, state: Mapping[str, Any], *, rng: bool = True) -> Restored:
        """:meth:`restore` from a checkpoint that is open already; the next save has it as its parent."""
        return self._restored(checkpoint, state, rng, Policy())

    def _restored(self, checkpoint: Checkpoint, state: Mapping[str, Any], rng: bool, policy: Policy) -> Restored:
        values, reports = restore_state(checkpoint, state, rng=rng, policy=policy)
        step = checkpoint.manifest.step if checkpoint.manifest else None
        self._parent = {"step": step, "identity": checkpoint.identity}
        self._abandoned = [other for other in self.steps if step is not None and other > step]
        return Restored(step, values=values, path=checkpoint.path, reports=reports)

    def archive_steps(self) -> None:
        """Rename the steps after the restored one now, rather than at the next save; pinned ones stay.

        Raises:
            StorageError: one could not be renamed.
        """
        with self._lock:
            if not is_rank0():
                return
            self._task.wait()
            self.acquire()
            pinned = set(pins(self.directory).values())
            archive_steps(self.directory, [step for step in self._abandoned if step not in pinned], self.notes.append)
            self._abandoned = [step for step in self._abandoned if step in pinned]

    def open(self, step: int | str) -> Checkpoint:
        """One of the steps, by number or as it was pinned, without reading it."""
        return read_checkpoint(step_folder(self.directory, step_number(self.directory, step)))

    def pin(self, step: int, name: str) -> None:
        """Retain a step under a name; it is then found by that name too."""
        with self._lock:
            self._task.wait()
            if is_rank0():
                pin(self.directory, step, name)

    def unpin(self, name: str) -> None:
        """Let the retention decide about it again."""
        if is_rank0():
            unpin(self.directory, name)

    @property
    def steps(self) -> list[int]:
        """The steps that are there, in ascending order."""
        return steps(self.directory)

    def acquire(self) -> None:
        """Take the right to write here, which the first ``save`` does otherwise.

        Raises:
            StorageError: another process has it; says who, and how to take over.
        """
        if self._owner != os.getpid():  # after a fork the lease is the parent's
            self._lease, self._owner = None, os.getpid()
            self._task, self._staging = BackgroundTask(self._task.what), Staging()
        if self._lease is not None and not self._lease.holds:
            self._lease.release()
            self._lease = None
        if self._lease is None and is_rank0() and is_local(self.directory):
            try:
                make_folder(self.directory)
            except OSError as error:
                raise storage_error("make the folder", self.directory, error) from error
            self._lease = Lease(self.directory)
            sweep(self.directory)
            repair_all_interrupted(self.directory)

    def wait(self) -> None:
        """Return when the last save is durable.

        Raises:
            StorageError: it could not be written.
        """
        self._task.wait()

    def close(self) -> None:
        """Wait, and give the right to write back."""
        try:
            self.wait()
        finally:
            if not self._task.busy:  # unless Ctrl-C came while it waited
                if self._lease is not None:
                    self._lease.release()
                    self._lease = None
                self._staging = Staging()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as unsaved:
            if error is None:
                raise
            error.add_note(f"And the last checkpoint was not saved: {unsaved}")


def _nbytes(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(gather(named).nbytes for named in tensors.values())


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"metrics are numbers by name, as {{'val_loss': 3.2}}: {error}.") from error


def _texts(files: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(files, Mapping):
        raise ConfigError(f"files are texts by file name, not a {type(files).__name__}.")
    for name, text in files.items():
        if not is_file_name(name) or not isinstance(text, str) or not is_text(text):
            raise ConfigError(f"{name!r} cannot be saved: files are texts by a file name without folders.")
        if name.endswith(".safetensors") or name in (MANIFEST, TRAINER, CONFIG, CHUNKS):
            raise ConfigError(f"{name!r} is a file that the checkpoint has of its own: take another name.")
    return dict(files)
