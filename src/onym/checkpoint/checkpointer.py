"""``onym.Checkpointer``: a training loop's checkpoints, kept durably and behind its back, and found again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from onym.checkpoint.background import BackgroundTask, Staging
from onym.checkpoint.coordinator import meeting_store
from onym.checkpoint.retention import (
    GoodCheckpoint,
    Retention,
    archive_steps,
    newest_good,
    pin,
    pins,
    step_folder,
    steps,
    unpin,
    write_step,
)
from onym.checkpoint.sharded import ShardedSave
from onym.checkpoint.snapshot import capture, restore_state
from onym.errors import CheckpointError, ConfigError, StorageError, storage_error
from onym.format.manifest import CONFIG, MANIFEST, TRAINER, Manifest, is_file_name, is_text
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.sharded_tensor import PIECES
from onym.format.writer import Content, gather, write_folder
from onym.state.collectives import (
    all_gather_object,
    broadcast_from_rank0,
    broadcast_with_questions,
    get_rank,
    get_world_size,
    is_rank0,
    raise_on_all_ranks,
)
from onym.state.dtensor import any_sharded
from onym.storage import object_store
from onym.storage.local import make_folder, repair_all_interrupted, sweep
from onym.storage.lock import Lease

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What :meth:`Checkpointer.restore` did."""

    step: int | None
    """The step that the objects are at; None where there is no checkpoint yet."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer checkpoints that are damaged, with the reason."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The plain values that the checkpoint has, by name."""
    path: Path | None = None

    def __str__(self) -> str:
        said = f"restored step {self.step} from '{self.path}'" if self.step is not None else "there is no checkpoint yet"
        return said + "".join(f"; passed over '{path}': {reason}" for path, reason in self.skipped)


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
    """Keeps a training's checkpoints in a folder, one for each step that is saved.

    A checkpoint is there as a whole or not at all, and the earlier ones stay until it was read back. One program at a time may
    write to a folder; reading needs nothing.

    Of several processes (torch.distributed) the first one writes. Where FSDP has sharded a model all of them have to call
    ``save`` and ``restore``, with the same names in the same order, and do as the first one decides; otherwise any of them may.
    Of FSDP2's models each process writes its own shards, and any number of processes, or one alone, reads them; what is no
    sharded tensor is the first one's, except for the random number generators.

    Args:
        directory: where the steps are, as ``step-000001000/``; also ``s3://bucket/run``.
        keep_last, keep_every, keep_best: which steps stay; any one suffices. The newest ones; those whose number is a multiple;
            the best by a metric (``"val_loss"``: the lowest; ``"accuracy:max"``: the highest).
        background: ``save`` returns when the state is copied (which takes as much memory as the state), and the rest goes on
            in a thread. Otherwise it returns when the checkpoint is on the disk, and needs no memory.
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
        self.directory = object_store.as_path(directory)
        if not object_store.is_remote(self.directory):  # the program may change its working folder
            self.directory = self.directory.absolute()
        self.retention = Retention(keep_last, keep_every, keep_best)
        self.progress: Progress | None = None
        """Of the save that is under way, or of the last one."""
        self.notes: list[str] = []
        """What went otherwise than asked, and did not stop anything: saves that were skipped, deletions that failed."""
        self._background, self._on_busy = background, on_busy
        self._staging = Staging()
        self._task = BackgroundTask(f"the last checkpoint of '{self.directory}'")
        self._lease: Lease | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._parent: dict[str, Any] | None = None
        self._shares = not object_store.is_remote(self.directory)  # whether several processes write, each its own
        self._line: tuple[Any, Any] = (None, None)  # the store that the processes met by, and a connection of our own to it
        self._left: list[int] = []  # steps that the run has left behind it by going on from an earlier one

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        files: Mapping[str, str] | None = None,
    ) -> bool:
        """Keep the state of a step, as it is now.

        Args:
            step: its number, of optimizer steps done. Later steps that are there (of a past that was left) are set aside.
            state: by name: the models, wrapped in anything or not; their optimizers; whatever has a ``state_dict()``; plain
                values. The random number generators are kept in any case.
            metrics: what was measured at this step.
            files: further texts to keep with it, by file name.

        Returns:
            Whether it is kept; False only for ``on_busy="skip"``.

        Raises:
            StorageError: the disk refused, or another process writes here; earlier steps are untouched. With ``background``
                it is raised by the next call of ``save``, ``wait`` or ``close``.
            CheckpointError, ConfigError: something in it cannot be kept; says what.
        """
        if type(step) is not int or step < 0:
            raise ConfigError(f"step is {step!r}: it has to be a whole number from 0 on.")
        with self._lock:
            return self._save(step, state, metrics or {}, files or {})

    def _save(self, step: int, state: Mapping[str, Any], given: Mapping[str, Any], files: Mapping[str, Any]) -> bool:
        collective = isinstance(state, Mapping) and any_sharded(state.values())
        metrics: dict[str, float] = {}
        texts: dict[str, str] = {}

        def ready() -> bool:  # of these the first process's are kept, so it alone looks at them
            metrics.update(_numbers(given))
            texts.update(_texts(files))
            return self._ready(step)

        if not collective and not is_rank0():
            return True
        if not self._agreed_upon(lambda: broadcast_from_rank0(ready, collective), collective):
            return False
        if collective and get_world_size() > 1 and self._shares and self._save_share(step, state, metrics, texts):
            return True
        snapshot = capture(state, texts)
        broadcast_from_rank0(self.acquire, collective)
        if not is_rank0():
            return True
        tensors = self._staging.copy(snapshot.tensors) if self._background else snapshot.tensors
        progress = self.progress = Progress(step, sum(gather(named).nbytes for named in tensors.values()))

        def write(path: Path) -> Manifest:
            return write_folder(
                path,
                tensors,
                snapshot.texts,
                architecture=snapshot.architecture,
                step=step,
                metrics=metrics,
                parent=self._parent,
                progress=progress.add,
            )

        self._begin(lambda: self._keep(step, write), progress)
        return True

    def _begin(self, work: Callable[[], None], progress: Progress) -> None:
        """Do it, behind the caller's back or not."""

        def watched() -> None:
            work()
            progress.add(0)
            progress.done = True

        if self._background:
            self._task.start(watched)
        else:
            watched()

    def _keep(self, step: int, write: Callable[[Path], Manifest], read_back: Callable[[Path], None] | None = None) -> None:
        """Write a step, and do what belongs to it."""
        manifest = write_step(
            self.directory,
            step,
            write,
            left=self._left,
            retention=self.retention,
            note=self.notes.append,
            read_back=read_back,
        )
        self._parent, self._left = {"step": step, "identity": manifest.identity}, []

    def _save_share(self, step: int, state: Mapping[str, Any], metrics: dict[str, float], texts: dict[str, str]) -> bool:
        """Keep a step of which each process writes its share; False where they do not see the same disk."""
        snapshot = capture(state, texts, share=True)
        failure: BaseException | None = None
        nbytes = 0
        try:
            tensors = self._staging.copy(snapshot.tensors) if self._background else snapshot.tensors
            nbytes = sum(gather(named).nbytes for named in tensors.values())
        except BaseException as error:
            failure = error
        raise_on_all_ranks(failure)
        told = all_gather_object((step, nbytes))
        if len({number for number, _ in told}) > 1:
            raise ConfigError(f"The processes are at different steps ({', '.join(str(number) for number, _ in told[:4])}).")
        path, store = step_folder(self.directory, step), self._line_to_the_others()
        made: list[ShardedSave] = []

        def make() -> tuple[str, str]:
            self.acquire()
            made.append(ShardedSave.made(path, sum(nbytes for _, nbytes in told), get_world_size(), store))
            return made[0].place, made[0].token

        place = broadcast_from_rank0(make)
        shared = made[0] if made else ShardedSave(path, *place, get_rank(), get_world_size(), store)
        if not all(all_gather_object(shared.seen)):
            shared.give_up()
            self._shares = False
            self.notes.append(
                f"'{self.directory}' is not seen by all processes: the first one gathers and writes everything. To restore, "
                "all of them have to see it."
            )
            return False
        progress = self.progress = Progress(step, nbytes)

        content = Content(tensors, snapshot.boxes, snapshot.table)

        def lead() -> None:
            shared.lead(
                lambda write, read_back: self._keep(step, write, read_back),
                content,
                snapshot.texts,
                progress.add,
                architecture=snapshot.architecture,
                step=step,
                metrics=metrics,
                parent=self._parent,
            )

        self._begin(lead if made else lambda: shared.help(content, progress.add), progress)
        return True

    def _line_to_the_others(self) -> Any:
        met_by = meeting_store()
        if self._line[0] is not met_by:
            self._line = met_by, met_by.clone()  # no wait of torch's holds it up
        return self._line[1]

    def _agreed_upon(self, agree: Callable[[], T], collective: bool) -> T:
        """What they agree upon. What went wrong in the background the first process tells, and the others forget."""
        try:
            decision = agree()
        except BaseException:
            if collective and not is_rank0():
                self._task.forget()
            raise
        if collective and not is_rank0() and decision is not False:
            self._task.forget()
        return decision

    def _ready(self, step: int) -> bool:
        """Whether to save now: what went wrong before is raised, and the writer before waited for."""
        self._task.raise_error()
        if self._task.busy and self._on_busy == "skip":
            self.notes.append(f"Step {step} was not kept: the one before is still being written.")
            return False
        self._task.wait()
        return True

    def restore(
        self, state: Mapping[str, Any], step: int | str = "latest", *, verify: bool = True, rng: bool = True
    ) -> Restored:
        """Give objects the state that they had.

        Args:
            state: as it was given to ``save``; what is left out stays as it is. Models may be wrapped otherwise than they were.
            step: ``"latest"`` (the newest that verifies), a number, or the name of a pinned one.
            verify: check every byte before anything is changed.
            rng: put the random number generators back too.

        Raises:
            CheckpointError: all that is there is damaged, or there is no such step.
            MismatchError: it does not fit; says why.
        """
        collective = isinstance(state, Mapping) and any_sharded(state.values())
        with self._lock:
            while True:
                found = self._find(step, verify, collective)
                if found is None:
                    return Restored(None)
                try:
                    return replace(self.restore_from(found.checkpoint, state, rng=rng), skipped=found.skipped)
                except CheckpointError:
                    gone = step == "latest" and not found.checkpoint.path.exists()
                    if not any(all_gather_object(gone, collective)):
                        raise
                    # A writer has gone on, and deleted it under our hands, before anything was changed: take its successor.

    def _find(self, step: int | str, verify: bool, collective: bool) -> GoodCheckpoint | None:
        """The checkpoint to restore. ``together`` the first process decides, and all share the checking."""
        opened: dict[Path, Checkpoint] = {}

        def check(path: Path) -> tuple[bool, str | None]:
            """Whether this process sees a step, and what is wrong with its share of it."""
            try:
                if path not in opened:
                    opened[path] = read_checkpoint(path)
                share = (get_rank(), get_world_size()) if collective else (0, 1)
                return True, next((damage.reason for damage in opened[path].damages(share=share)), None)
            except Exception as error:
                if not collective and not isinstance(error, CheckpointError | OSError):
                    raise
                return path.exists(), str(error)

        def decide(ask: Callable[[Path], list[tuple[bool, str | None]]]) -> tuple[Path | None, list[tuple[Path, str]]]:
            def verified(checkpoint: Checkpoint) -> None:
                opened[checkpoint.path] = checkpoint
                for number, (seen, reason) in enumerate(ask(checkpoint.path)):
                    if not seen and checkpoint.path.exists():
                        raise StorageError(
                            f"'{checkpoint.path}' is not seen by process {number}: to restore, all of them need a disk that "
                            "they share."
                        )
                    if reason is not None:
                        raise CheckpointError(reason)

            self._task.wait()
            if step == "latest":
                found = newest_good(self.directory, verify=verify, check=verified)
            else:
                found = GoodCheckpoint(self.open(step))
                if verify:
                    verified(found.checkpoint)
            if found is None:
                return None, []
            opened[found.checkpoint.path] = found.checkpoint
            return found.checkpoint.path, found.skipped

        path, skipped = self._agreed_upon(lambda: broadcast_with_questions(decide, check, collective), collective)
        if path is None:
            return None
        failure: CheckpointError | None = None
        try:
            checkpoint = opened[path] if path in opened else read_checkpoint(path)
        except CheckpointError as error:
            failure = error
        raise_on_all_ranks(failure, collective)
        return GoodCheckpoint(checkpoint, skipped)

    def restore_from(self, checkpoint: Checkpoint, state: Mapping[str, Any], *, rng: bool = True) -> Restored:
        """:meth:`restore` from a checkpoint that is open already; what is saved next goes on from it."""
        values = restore_state(checkpoint, state, rng=rng)
        step = checkpoint.manifest.step if checkpoint.manifest else None
        self._parent = {"step": step, "identity": checkpoint.identity}
        self._left = [other for other in self.steps if step is not None and other > step]
        return Restored(step, values=values, path=checkpoint.path)

    def archive_steps(self) -> None:
        """Put the steps after the restored one aside now, rather than when the next is kept; pinned ones stay.

        Raises:
            StorageError: one could not be renamed.
        """
        with self._lock:
            if not is_rank0():
                return
            self._task.wait()
            self.acquire()
            pinned = set(pins(self.directory).values())
            archive_steps(self.directory, [step for step in self._left if step not in pinned], self.notes.append)
            self._left = [step for step in self._left if step in pinned]

    def open(self, step: int | str) -> Checkpoint:
        """One of the steps, by number or as it was pinned, without reading it."""
        present = steps(self.directory)
        pinned = pins(self.directory)
        number = (int(step) if step.isdecimal() else pinned.get(step)) if isinstance(step, str) else step
        if number not in present:
            names = f"; pinned are {', '.join(pinned)}" if pinned else ""
            raise CheckpointError(
                f"'{self.directory}' has no step {step}; it has {', '.join(map(str, present)) or 'none'}{names}."
            )
        return read_checkpoint(step_folder(self.directory, number))

    def pin(self, step: int, name: str) -> None:
        """Keep a step under a name, whatever else is deleted; it is then found by that name too."""
        with self._lock:
            self._task.wait()
            if is_rank0():
                pin(self.directory, step, name)

    def unpin(self, name: str) -> None:
        """Let retention decide about it again."""
        if is_rank0():
            unpin(self.directory, name)

    @property
    def steps(self) -> list[int]:
        """The steps that are there, in ascending order."""
        return steps(self.directory)

    def acquire(self) -> None:
        """Take the right to write here; the first ``save`` does it otherwise.

        Raises:
            StorageError: another process has it; says who, and how to take over.
        """
        if self._owner != os.getpid():  # a child made by fork: what its parent holds is not its own
            self._lease, self._owner = None, os.getpid()
            self._task, self._staging = BackgroundTask(self._task.what), Staging()
        if self._lease is not None and not self._lease.holds:
            self._lease.release()
            self._lease = None
        if self._lease is None and is_rank0() and not object_store.is_remote(self.directory):
            try:
                make_folder(self.directory)
            except OSError as error:
                raise storage_error("make the folder", self.directory, error) from error
            self._lease = Lease(self.directory)
            sweep(self.directory)
            repair_all_interrupted(self.directory)

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            StorageError: it could not be written.
        """
        self._task.wait()

    def close(self) -> None:
        """Wait, and let others write here."""
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
            error.add_note(f"And the last checkpoint was not kept: {unsaved}")


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
            raise ConfigError(f"{name!r} cannot be kept: files are texts by a file name without folders.")
        if name.endswith(".safetensors") or name in (MANIFEST, TRAINER, CONFIG, PIECES):
            raise ConfigError(f"{name!r} is a file that the checkpoint has of its own: take another name.")
    return dict(files)
