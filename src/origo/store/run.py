"""A run's checkpoints: ``<directory>/step-000001000/``, the newest good one, and which to keep.

Nothing is deleted on reading, and a step is deleted only after its successor is in place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from origo.errors import CheckpointError, StorageError, storage_error
from origo.store.filesystem import remove_folder
from origo.store.reader import Checkpoint, read_checkpoint
from origo.store.writer import require_replaceable, write_folder

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Found:
    """The checkpoint that a search came to, and those it passed over."""

    checkpoint: Checkpoint
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer ones that are damaged, with the reason."""


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step-{step:09d}"


def steps(directory: Path) -> list[int]:
    """The steps that have a folder, in ascending order."""
    if not directory.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def newest_good(directory: Path) -> Found | None:
    """The newest checkpoint of which every byte is right; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    skipped: list[tuple[Path, str]] = []
    for step in reversed(steps(directory)):
        path = step_folder(directory, step)
        try:
            checkpoint = read_checkpoint(path)
            checkpoint.verify()
            return Found(checkpoint, skipped)
        except CheckpointError as error:
            skipped.append((path, str(error)))
    if skipped:
        raise CheckpointError(
            f"All {len(skipped)} checkpoints in '{directory}' are damaged. The newest: {skipped[0][1]} "
            "Nothing was deleted; start again under another --name, or restore the folder from a backup."
        )
    return None


def find_checkpoint(path: str | Path, step: int | str = "latest") -> Found:
    """The checkpoint that a path means: a run, its checkpoints folder, one checkpoint, a model folder or a file.

    Args:
        path: any of these.
        step: for a run, ``"latest"`` (the newest good one) or a number.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    available = steps(directory)
    if not available:
        if step != "latest":
            raise CheckpointError(f"'{path}' is no run, so there is no step {step} to choose in it.")
        return Found(read_checkpoint(path))
    if step != "latest":
        if step not in available:
            raise CheckpointError(f"'{path}' has no step {step}; it has {', '.join(map(str, available[-8:]))}.")
        return Found(read_checkpoint(step_folder(directory, int(step))))
    found = newest_good(directory)
    assert found is not None
    return found


def _make_room(path: Path) -> None:
    """Rename a step's folder that is damaged, or holds more than Origo wrote: it may be of use to somebody."""
    try:
        require_replaceable(path)
    except StorageError:
        _set_aside(path)


def _set_aside(path: Path) -> None:
    number = next(n for n in itertools.count(1) if not path.with_name(f"aside-{n}-{path.name}").exists())
    try:
        path.rename(path.with_name(f"aside-{number}-{path.name}"))
    except OSError as error:
        raise storage_error("set a checkpoint aside", path, error) from error


def write_step(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, str],
    *,
    architecture: str | None = None,
    metrics: Mapping[str, float] | None = None,
    keep_last: int = 3,
) -> Path:
    """Keep one step, then delete all but the newest ``keep_last``. A deletion that fails is left for the next time.

    Steps after this one are of a past that the run has left (they were damaged, so it went on from an earlier one): they are
    renamed, so that they neither count as the newest nor are lost.
    """
    assert keep_last >= 1
    path = step_folder(directory, step)
    _make_room(path)
    write_folder(path, tensors, texts, architecture=architecture, step=step, metrics=metrics)
    present = steps(directory)
    for newer in present[present.index(step) + 1 :]:
        _set_aside(step_folder(directory, newer))
    for old in steps(directory)[:-keep_last]:
        remove_folder(step_folder(directory, old))
    return path
