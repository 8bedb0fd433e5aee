"""Which steps are retained, and how a step is added to a run.

A step is deleted only after its successor is durable and has been read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onym.checkpoint.steps import metrics_of, pins, step_folder, steps
from onym.errors import CheckpointError, ConfigError, StorageError, storage_error
from onym.format.manifest import MANIFEST, Manifest
from onym.format.reader import read_checkpoint
from onym.format.writer import require_replaceable
from onym.storage.paths import storage_of


@dataclass(frozen=True)
class Retention:
    """Which steps are retained; any one of these suffices. A pinned step is always retained.

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
        """Why each step is retained; None for one that is not."""
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


def write_step(
    directory: Path,
    step: int,
    write: Callable[[Path], Manifest],
    *,
    abandoned: Collection[int] = (),
    retention: Retention,
    note: Callable[[str], None] = lambda text: None,
    verify: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a step and commit it; then verify it and delete the steps that ``retention`` does not retain.

    Steps after this one, and the ``abandoned`` ones (damaged, say), are renamed: so they are not the newest, and are not lost.

    Args:
        directory: the folder with the steps.
        write: writes a checkpoint at a path, and returns when it is committed.
        note: called with a sentence about each step that was renamed, and about each deletion that failed.
        verify: see :func:`prune`.

    Raises:
        StorageError: the step could not be written, or does not read back as it was written; the earlier ones are untouched.
    """
    path = step_folder(directory, step)
    for name, pinned in pins(directory).items():
        if (pinned >= step or pinned in abandoned) and pinned in steps(directory):
            raise StorageError(
                f"Step {pinned} is pinned as {name!r}, and to save step {step} in '{directory}' would put it aside: unpin it "
                f"(onym prune --unpin {name}), or continue in another folder."
            )
    try:
        require_replaceable(path)
    except StorageError:
        _move_aside(path)  # it is damaged, or has files that Onym did not write: somebody may need it
    manifest = write(path)
    archive_steps(directory, [each for each in steps(directory) if each > step or (each in abandoned and each != step)], note)
    prune(directory, retention, written=step, note=note, verify=verify)
    return manifest


def archive_steps(directory: Path, abandoned: Iterable[int], note: Callable[[str], None]) -> None:
    """Rename steps that were abandoned by a rollback."""
    for step in abandoned:
        _move_aside(step_folder(directory, step))
        note(f"Step {step} was abandoned by a rollback; it was renamed, and can be deleted by hand (aside-…).")


def _move_aside(path: Path) -> None:
    number = next(n for n in itertools.count(1) if not path.with_name(f"aside-{n}-{path.name}").exists())
    try:
        storage_of(path).move_folder(path, path.with_name(f"aside-{number}-{path.name}"), MANIFEST)
    except OSError as error:
        raise storage_error("set a checkpoint aside", path, error) from error


def prune(
    directory: Path,
    retention: Retention,
    *,
    written: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    verify: Callable[[Path], None] | None = None,
) -> list[int]:
    """Delete the steps that are not retained, after the newest one was verified.

    Args:
        directory: the folder with the steps.
        retention: which to retain.
        written: the step that is verified before any other is deleted; the newest by default.
        note: called with a sentence about each deletion that failed.
        verify: reads every byte of a checkpoint, and raises CheckpointError if it is damaged; in this process by default.

    Returns:
        The steps that were deleted.

    Raises:
        StorageError: the verified step is damaged. Nothing was deleted.
    """
    superfluous = [step for step, reason in retention.reasons(directory).items() if reason is None and step != written]
    if not superfluous:
        return []
    successor = written if written is not None else steps(directory)[-1]
    try:
        path = step_folder(directory, successor)
        verify(path) if verify is not None else read_checkpoint(path).verify()
    except CheckpointError as error:
        raise StorageError(
            f"Step {successor} was written and does not read back: {error} Earlier steps were not deleted."
        ) from error
    pinned = set(pins(directory).values())  # somebody may have pinned one meanwhile
    superfluous = [step for step in superfluous if step not in pinned]
    gone = [step for step in superfluous if storage_of(directory).remove_folder(step_folder(directory, step), MANIFEST)]
    for step in sorted(set(superfluous) - set(gone)):
        note(f"'{step_folder(directory, step)}' is not needed any more and could not be deleted; it is tried again next time.")
    return gone
