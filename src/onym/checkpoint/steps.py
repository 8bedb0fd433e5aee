"""The steps of a run: ``<directory>/step-000001000/``, their pins, and the newest good one. Nothing is deleted on reading."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onym.errors import CheckpointError, ConfigError, OnymError, StorageError, storage_error
from onym.format.manifest import CONFIG, MANIFEST, MODEL, Manifest
from onym.format.reader import Checkpoint, read_checkpoint, require_path
from onym.state.collectives import all_gather_object, broadcast_from_rank0, get_rank, get_world_size
from onym.storage.local import replaced
from onym.storage.paths import as_path, is_local, replace_file, storage_of

CHECKPOINTS = "checkpoints"
TO_BUILD = (MODEL, CONFIG)
"""The files that a model is built from."""
_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_PIN_SUFFIX = ".pin"


@dataclass(frozen=True)
class GoodCheckpoint:
    """The result of a search."""

    checkpoint: Checkpoint
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Newer ones that are damaged, with the reason."""


def step_folder(directory: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return directory / f"step-{step:09d}"


def steps(directory: Path) -> list[int]:
    """The steps that have a folder, in ascending order."""
    # A writer that adds a step and deletes another one while we list may hide both.
    return _listed_steps(directory) or _listed_steps(directory)


def _listed_steps(directory: Path) -> list[int]:
    storage = storage_of(directory)
    try:
        names = storage.list_names(directory)
    except OSError as error:  # not the same as having none
        raise storage_error("look for checkpoints", directory, error) from error
    found = {int(match.group(1)): name for name in names if (match := _STEP_FOLDER.fullmatch(name))}
    return sorted(step for step, name in found.items() if storage.has_folder(directory / name, MANIFEST))


def metrics_of(path: Path) -> Mapping[str, float] | None:
    """The metrics of a checkpoint; None where its manifest cannot be read."""
    try:
        return Manifest.read(path).metrics
    except (OSError, OnymError):
        return None


def pins(directory: Path) -> dict[str, int]:
    """The steps that are retained under a name.

    Raises:
        StorageError: a pin cannot be read, so no step should be deleted.
    """
    found = {}
    try:
        for name in storage_of(directory).list_names(directory):
            entry = directory / name
            if name.endswith(_PIN_SUFFIX) and entry.is_file():
                with entry.open("rb") as file:
                    text = file.read(20).decode("ascii", "replace").strip()  # another program's file is no pin
                if text.isdecimal():
                    found[name.removesuffix(_PIN_SUFFIX)] = int(text)
    except FileNotFoundError:  # unpinned meanwhile
        return pins(directory)
    except OSError as error:
        raise storage_error("read the pins", directory, error) from error
    return found


def pin(directory: Path, step: int, name: str) -> None:
    """Retain a step under a name until :func:`unpin`.

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
    storage_of(directory).remove_file(directory / (name + _PIN_SUFFIX))


def newest_good(
    directory: Path, *, verify: bool = True, files: Iterable[str] | None = None, collective: bool = False
) -> GoodCheckpoint | None:
    """The newest checkpoint that is not damaged; None where there is none at all.

    Args:
        directory: the folder with the steps.
        verify, files, collective: as in :func:`open_step`.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    while True:
        present = broadcast_from_rank0(lambda: steps(directory), collective)
        skipped: list[tuple[Path, str]] = []
        for step in reversed(present):
            path = step_folder(directory, step)
            try:
                return GoodCheckpoint(open_step(path, verify=verify, files=files, collective=collective), skipped)
            except CheckpointError as error:
                skipped.append((path, str(error)))
        if broadcast_from_rank0(lambda: steps(directory), collective) == present:
            break  # else a writer went on, and deleted what was being read
    if skipped:
        raise CheckpointError(
            f"All {len(skipped)} checkpoints in '{directory}' are damaged. The newest: {skipped[0][1]} "
            "Nothing was deleted; start again under another --name, or restore the folder from a backup."
        )
    return None


def open_step(path: Path, *, verify: bool = True, files: Iterable[str] | None = None, collective: bool = False) -> Checkpoint:
    """Open a checkpoint, and verify it before it is used.

    Args:
        path: its folder.
        verify: read every byte; otherwise only its structure and the sizes of its files are checked.
        files: verify these alone, where it has them.
        collective: all ranks call this; each verifies a part, and it is good where all of them find it so.

    Raises:
        CheckpointError: it is damaged, for any rank.
        StorageError: a rank does not see it.
    """
    reason: str | None = None
    try:
        checkpoint = read_checkpoint(path)
        if verify:
            wanted = None if files is None else [file for file in files if file in checkpoint.holds]
            rank, world_size = (get_rank(), get_world_size()) if collective else (0, 1)
            reason = next((damage.reason for damage in checkpoint.damages(wanted, rank, world_size)), None)
    except Exception as error:
        if not collective and not isinstance(error, CheckpointError | OSError):
            raise
        reason = str(error)
    outcomes = all_gather_object((not collective or path.exists(), reason), collective)
    for rank, (exists, reason) in enumerate(outcomes):
        if not exists and outcomes[0][0]:
            raise StorageError(f"'{path}' is not seen by rank {rank}: to restore, all ranks need a disk that they share.")
        if reason is not None:
            raise CheckpointError(reason)
    return checkpoint


def step_number(directory: Path, step: int | str) -> int:
    """The step with a number, or pinned under a name.

    Raises:
        CheckpointError: there is none.
    """
    present, pinned = steps(directory), pins(directory)
    number = (int(step) if step.isdecimal() else pinned.get(step)) if isinstance(step, str) else step
    if number not in present:
        names = f"; pinned are {', '.join(pinned)}" if pinned else ""
        raise CheckpointError(f"'{directory}' has no step {step}; it has {_listed(present)}{names}.")
    return number


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
    path = as_path(path)
    require_path(path)
    if not path.exists() and replaced(path).is_dir():
        path = replaced(path)
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if step == "latest":
        return newest_good(directory, verify=verify, files=files) or GoodCheckpoint(read_checkpoint(path))
    if not steps(directory):
        raise CheckpointError(f"'{path}' is no run, so there is no step {step} to choose in it.")
    return GoodCheckpoint(read_checkpoint(step_folder(directory, step_number(directory, step))))


def is_ours(path: Path) -> bool:
    """Whether Onym wrote it; what is in an object store, it did."""
    if not is_local(path):
        return True
    if path.is_dir():
        return (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir() or bool(steps(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{":
            return False
        length = int.from_bytes(start[:8], "little")
        return b'"onym":' in b"{" + file.read(min(length, 64 << 20))


def _listed(available: list[int]) -> str:
    earlier = "…, " if len(available) > 8 else ""
    return earlier + ", ".join(map(str, available[-8:])) if available else "none"
