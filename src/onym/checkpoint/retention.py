"""A run's checkpoints: ``<directory>/step-000001000/``, the newest good one, and which to keep.

Nothing is deleted on reading, and a step is deleted only after its successor is durable and was read back.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onym.errors import CheckpointError, ConfigError, OnymError, StorageError, storage_error
from onym.format.manifest import CONFIG, MANIFEST, MODEL, Manifest
from onym.format.reader import Checkpoint, read_checkpoint, require_path
from onym.format.writer import require_replaceable
from onym.storage import object_store
from onym.storage.local import move_folder, remove_file, remove_folder, replace_file, replaced

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_PIN_SUFFIX = ".pin"
CHECKPOINTS = "checkpoints"
TO_BUILD = (MODEL, CONFIG)
"""The files that matter to somebody who wants the model alone."""


@dataclass(frozen=True)
class GoodCheckpoint:
    """The checkpoint that a search came to, and those it passed over."""

    checkpoint: Checkpoint
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer ones that are damaged, with the reason."""


@dataclass(frozen=True)
class Retention:
    """Which steps are kept; any one of these suffices. A pinned step is kept in any case.

    Args:
        last: the newest ones; at least 1.
        every: those whose number is a multiple of this.
        best: the one with the lowest value of a metric (``"val_loss"``), or the highest (``"accuracy:max"``).
    """

    last: int = 3
    every: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.last), ("keep_every", self.every)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} is {value!r}: it has to be a whole number from 1 on.")
        if self.best is not None and (type(self.best) is not str or self._mode not in ("min", "max") or not self._metric):
            raise ConfigError(f'keep_best is {self.best!r}: give the name of a metric, as "val_loss" or "accuracy:max".')

    @property
    def _metric(self) -> str:
        return (self.best or "").rpartition(":")[0] or (self.best or "")

    @property
    def _mode(self) -> str:
        return (self.best or "").rpartition(":")[2] if ":" in (self.best or "") else "min"

    def best_of(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        """The best step of some, by their metrics; of equal ones the later."""
        values = {step: values[self._metric] for step, values in metrics.items() if self._metric in values}
        values = {step: value for step, value in values.items() if value == value}  # a NaN is not the best
        sign = 1 if self._mode == "min" else -1
        return min(values, key=lambda step: (sign * values[step], -step), default=None)

    def reasons(self, directory: Path) -> dict[int, str | None]:
        """For each step there why it is kept, None where it is not."""
        present = steps(directory)
        metrics = {step: metrics_of(step_folder(directory, step)) for step in present} if self.best is not None else {}
        best = self.best_of({step: values for step, values in metrics.items() if values is not None})
        pinned = {step: name for name, step in pins(directory).items()}
        newest = present[-self.last :]

        def reason(step: int) -> str | None:
            if step in pinned:
                return f"pinned as {pinned[step]!r}"
            if step in newest:
                return "one of the newest"
            if step == best:
                return f"the best by {self.best}"
            if self.every is not None and step % self.every == 0:
                return f"a multiple of {self.every}"
            if step in metrics and metrics[step] is None:
                return "its metrics cannot be read, so it may be the best"
            return None

        return {step: reason(step) for step in present}


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step-{step:09d}"


def steps(directory: Path) -> list[int]:
    """The steps that have a folder, in ascending order."""
    # A writer that puts a step in place and deletes another while we list may hide both.
    return _listed_steps(directory) or _listed_steps(directory)


def _listed_steps(directory: Path) -> list[int]:
    is_remote = object_store.is_remote(directory)
    try:
        names = object_store.names_in(directory) if is_remote else os.listdir(directory)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # not the same as having none
        raise storage_error("look for checkpoints", directory, error) from error
    numbers = {int(match.group(1)): directory / name for name in names if (match := _STEP_FOLDER.fullmatch(name))}
    if is_remote:  # there a folder counts from when its manifest is there
        with object_store.translate_errors(directory, "look for checkpoints"):
            return sorted(step for step, entry in numbers.items() if (entry / MANIFEST).exists())
    return sorted(step for step, entry in numbers.items() if entry.is_dir())


def metrics_of(path: Path) -> Mapping[str, float] | None:
    """What was measured at a step; None where its manifest cannot be read."""
    try:
        return Manifest.read(path).metrics
    except (OSError, OnymError):
        return None


def pins(directory: Path) -> dict[str, int]:
    """The steps that are kept under a name.

    Raises:
        StorageError: one cannot be read, so that nothing that it may keep should be deleted.
    """
    found = {}
    try:
        for name in object_store.names_in(directory) if object_store.is_remote(directory) else os.listdir(directory):  # noqa: PTH208
            entry = directory / name
            if name.endswith(_PIN_SUFFIX) and entry.is_file():
                with entry.open("rb") as file:
                    text = file.read(20).decode("ascii", "replace").strip()  # another program's file is no pin
                if text.isdecimal():
                    found[name.removesuffix(_PIN_SUFFIX)] = int(text)
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise storage_error("read the pins", directory, error) from error
    return found


def pin(directory: Path, step: int, name: str) -> None:
    """Keep a step under a name, whatever retention says, until :func:`unpin`.

    Raises:
        ConfigError: the name cannot be one, or there is no such step.
    """
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
        or name in ("latest", "best")
        or name.isdecimal()
    ):
        raise ConfigError(
            f"A pin cannot be called {name!r}: use letters, digits, '-', '_' and '.'; not a number, not 'latest'."
        )
    if step not in steps(directory):
        raise ConfigError(f"'{directory}' has no step {step} to pin; it has {_listed(steps(directory))}.")
    replace_file(directory / (name + _PIN_SUFFIX), f"{step}\n")
    if step not in steps(directory):  # deleted meanwhile
        unpin(directory, name)
        raise ConfigError(f"'{directory}' has no step {step} to pin any more; it has {_listed(steps(directory))}.")


def unpin(directory: Path, name: str) -> None:
    """Let retention decide about a pinned step again."""
    if name not in pins(directory):
        raise ConfigError(
            f"Nothing is pinned as {name!r} in '{directory}'; pinned are: {', '.join(pins(directory)) or 'none'}."
        )
    path = directory / (name + _PIN_SUFFIX)
    if object_store.is_remote(path):
        path.unlink()
    else:
        remove_file(path)


def newest_good(
    directory: Path,
    *,
    verify: bool = True,
    files: Iterable[str] | None = None,
    check: Callable[[Checkpoint], None] = Checkpoint.verify,
) -> GoodCheckpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Args:
        directory: the folder with the steps.
        verify: read every byte; otherwise only what it holds and how large its files are is checked.
        files: which of a checkpoint's files matter; all by default.
        check: reads every byte, where all files matter.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    while True:
        present = steps(directory)
        skipped: list[tuple[Path, str]] = []
        for step in reversed(present):
            path = step_folder(directory, step)
            try:
                checkpoint = read_checkpoint(path)
                if verify and files is None:
                    check(checkpoint)
                elif verify:
                    checkpoint.verify([file for file in files or () if file in checkpoint.holds])
                return GoodCheckpoint(checkpoint, skipped)
            except CheckpointError as error:
                skipped.append((path, str(error)))
        if steps(directory) == present:  # else a writer went on, and deleted what was being read
            break
    if skipped:
        raise CheckpointError(
            f"All {len(skipped)} checkpoints in '{directory}' are damaged. The newest: {skipped[0][1]} "
            "Nothing was deleted; start again under another --name, or restore the folder from a backup."
        )
    return None


def find_checkpoint(
    path: str | Path, step: int | str = "latest", *, verify: bool = True, files: Iterable[str] | None = TO_BUILD
) -> GoodCheckpoint:
    """The checkpoint that a path means: a run, its checkpoints folder, one checkpoint, a model folder or a file.

    Args:
        path: any of these.
        step: for a run, ``"latest"`` (the newest good one), a number, or the name of a pinned one.
        verify, files: as in :func:`newest_good`, for ``"latest"``.

    Raises:
        CheckpointError: there is none.
    """
    path = object_store.as_path(path)
    require_path(path)
    if not path.exists() and replaced(path).is_dir():
        path = replaced(path)
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    available = steps(directory)
    if not available:
        if step != "latest":
            raise CheckpointError(f"'{path}' is no run, so there is no step {step} to choose in it.")
        return GoodCheckpoint(read_checkpoint(path))
    if step == "latest":
        found = newest_good(directory, verify=verify, files=files)
        assert found is not None
        return found
    number = pins(directory).get(step) if isinstance(step, str) and not step.isdecimal() else int(step)
    if number not in available:
        pinned = f"; pinned are {', '.join(pins(directory))}" if pins(directory) else ""
        raise CheckpointError(f"'{path}' has no step {step}; it has {_listed(available)}{pinned}.")
    return GoodCheckpoint(read_checkpoint(step_folder(directory, number)))


def _listed(available: list[int]) -> str:
    earlier = "…, " if len(available) > 8 else ""
    return earlier + ", ".join(map(str, available[-8:])) if available else "none"


def _make_room(path: Path) -> None:
    """Rename a step's folder that is damaged, or holds more than Onym wrote: it may be of use to somebody."""
    try:
        require_replaceable(path)
    except StorageError:
        _set_aside(path)


def _set_aside(path: Path) -> None:
    number = next(n for n in itertools.count(1) if not path.with_name(f"aside-{n}-{path.name}").exists())
    target = path.with_name(f"aside-{number}-{path.name}")
    try:
        if object_store.is_remote(path):
            object_store.move_folder(path, target)
        else:
            move_folder(path, target)
    except OSError as error:
        raise storage_error("set a checkpoint aside", path, error) from error


def archive_steps(directory: Path, left: Iterable[int], note: Callable[[str], None]) -> None:
    """Rename steps of a past that the run has left, so that they neither count as the newest nor are lost."""
    for step in left:
        _set_aside(step_folder(directory, step))
        note(f"Step {step} is of a past that the run has left; it was renamed, and can be deleted by hand (aside-…).")


def write_step(
    directory: Path,
    step: int,
    write: Callable[[Path], Manifest],
    *,
    left: Collection[int] = (),
    retention: Retention,
    note: Callable[[str], None] = lambda text: None,
    read_back: Callable[[Path], None] | None = None,
) -> Manifest:
    """Keep one step, then delete those that ``retention`` does not keep. A deletion that fails is left for the next time.

    Steps after this one, and those in ``left``, are of a past that the run has left (they were damaged, say): they are renamed,
    so that they neither count as the newest nor are lost.

    Args:
        directory: the folder with the steps.
        write: writes the step where it is told; see :func:`onym.format.writer.write_folder`.
        note: told of what was renamed, and of each deletion that failed.
        read_back: see :func:`prune`.

    Raises:
        StorageError: the step could not be written, or does not read back as it was written; the earlier ones are untouched.
    """
    path = step_folder(directory, step)
    for name, pinned in pins(directory).items():
        if (pinned >= step or pinned in left) and pinned in steps(directory):
            raise StorageError(
                f"Step {pinned} is pinned as {name!r}, and to save step {step} in '{directory}' would put it aside: unpin it "
                f"(onym prune --unpin {name}), or go on in another folder."
            )
    _make_room(path)
    manifest = write(path)
    archive_steps(directory, [other for other in steps(directory) if other > step or (other in left and other != step)], note)
    prune(directory, retention, written=step, note=note, read_back=read_back)
    return manifest


def prune(
    directory: Path,
    retention: Retention,
    *,
    written: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    read_back: Callable[[Path], None] | None = None,
) -> list[int]:
    """Delete the steps that are not to be kept, once one that stays was read back from its files.

    Args:
        directory: the folder with the steps.
        retention: which to keep.
        written: the step that has to be good before any other is deleted; the newest by default.
        note: told of each deletion that failed.
        read_back: reads a checkpoint, all of it, and raises CheckpointError where it is damaged; in this process by default.

    Returns:
        The steps that are gone.

    Raises:
        StorageError: the step that stays is not as it was written. Nothing was deleted.
    """
    superfluous = [step for step, reason in retention.reasons(directory).items() if reason is None and step != written]
    if not superfluous:
        return []
    successor = written if written is not None else steps(directory)[-1]
    try:
        path = step_folder(directory, successor)
        read_back(path) if read_back is not None else read_checkpoint(path).verify()
    except CheckpointError as error:
        raise StorageError(f"Step {successor} was written and does not read back: {error} Earlier steps were kept.") from error
    pinned = set(pins(directory).values())  # somebody may have pinned one meanwhile
    superfluous = [step for step in superfluous if step not in pinned]
    gone = [step for step in superfluous if remove_folder(step_folder(directory, step))]
    for step in sorted(set(superfluous) - set(gone)):
        note(f"'{step_folder(directory, step)}' is not needed any more and could not be deleted; it is tried again next time.")
    return gone
