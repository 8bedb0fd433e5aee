"""``onym runs``: the runs in a folder, and how far each is."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from onym.checkpoint.retention import step_folder, steps
from onym.cli.report import age, print_json, print_table, shown
from onym.errors import ConfigError, OnymError, StorageError
from onym.storage.lock import writer_of
from onym.train.options import RunOptions
from onym.train.run_folder import RUNNING, RunFolder

_WIDEST_NAME = 24


@dataclass(frozen=True)
class _Arguments:
    """List the runs in a folder, the newest first."""

    folder: tyro.conf.Positional[Path] = RunOptions().runs_dir
    """Where they are."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """One JSON object instead."""


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    status: str
    """running, interrupted, finished, killed (nobody writes to it, and it did not end), or what is wrong with it."""
    step: int | None = None
    steps: int | None = None
    held_out: float | None = None
    best: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    parameters: int | None = None
    kept: str | None = None
    """When the newest checkpoint was written, UTC."""


def run(arguments: list[str]) -> int:
    """``onym runs``."""
    given = tyro.cli(_Arguments, prog="onym runs", args=arguments)
    if not given.folder.is_dir():
        raise ConfigError(f"There is no folder '{given.folder}': onym train makes one, or name the --runs-dir it was given.")
    try:
        found = [path for path in given.folder.iterdir() if (path / "run.json").is_file()]
        found.sort(key=lambda path: (path / "run.json").stat().st_mtime, reverse=True)
    except OSError as error:
        raise StorageError(f"Could not look into '{given.folder}': {error.strerror}.") from error
    if not found:
        raise ConfigError(f"There are no runs in '{given.folder}': onym train makes one, or name another folder.")
    rows = [row_of(RunFolder(path)) for path in found]
    if given.json:
        print_json({"runs": [asdict(row) for row in rows]})
    else:
        print_table([("run", "status", "step", "held-out", "best", "tokens/s", "kept"), *map(_cells, rows)], indent="")
    return 0


def row_of(folder: RunFolder) -> Row:
    """What is known about a run."""
    try:
        about = folder.description()
        assert about is not None
        rows = [row for row in folder.read_metrics() if "event" not in row]
        kept = steps(folder.checkpoints)
    except OnymError:
        return Row(folder.path.name, "run.json is damaged")
    status = about["status"]
    if status == RUNNING and writer_of(folder.checkpoints) is None:
        status = "killed"
    measured = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    best, best_step = min(measured, default=(None, None))
    newest = step_folder(folder.checkpoints, kept[-1]) if kept else None
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(newest.stat().st_mtime)) if newest else None
    return Row(
        folder.path.name,
        status,
        rows[-1]["step"] if rows else None,
        about.get("steps"),
        measured[-1][0] if measured else None,
        best,
        best_step,
        speeds[-1] if speeds else None,
        about.get("parameters"),
        written,
    )


def _cells(row: Row) -> tuple[str, ...]:
    name = shown(row.name)
    return (
        name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "…",
        row.status,
        "-" if row.step is None else f"{row.step}/{row.steps}" if row.steps else str(row.step),
        "-" if row.held_out is None else f"{row.held_out:.3f}",
        "-" if row.best is None else f"{row.best:.3f} @{row.best_step}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "-" if row.kept is None else age(row.kept).removesuffix(" ago"),
    )
