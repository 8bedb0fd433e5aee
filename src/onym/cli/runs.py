"""``onym runs``: the runs in a folder, and how far each is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from onym.checkpoint.steps import step_folder, steps
from onym.cli.arguments import RunsArguments
from onym.cli.report import print_json, print_table, shown, utc
from onym.errors import ConfigError, OnymError, StorageError, nearest
from onym.storage.lock import writer_of
from onym.train.options import RunOptions
from onym.train.plot import PICTURES, Rows, plot_runs
from onym.train.run_folder import DESCRIPTION, METRICS, RUNNING, RunFolder
from onym.units import format_age

_WIDEST_NAME = 24


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
    saved: str | None = None
    """When the newest checkpoint was written, UTC."""


def run(given: RunsArguments) -> int:
    """``onym runs``."""
    if given.plot is not None and given.plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot takes a file that ends with {', '.join(PICTURES)}, not '{given.plot}'.")
    folders = [folder for name in given.runs or (str(RunOptions().runs_dir),) for folder in _runs_at(name)]
    if given.plot is not None:
        plot_runs({folder.path.name: _metrics(folder) for folder in folders}, given.plot, given.x)
    rows = [row_of(folder) for folder in folders]
    if given.json:
        print_json({"runs": [asdict(row) for row in rows]})
    else:
        print_table([("run", "status", "step", "held-out", "best", "tokens/s", "saved"), *map(_cells, rows)], indent="")
        if given.plot is not None:
            print(f"Drawn: {given.plot}")
    return 0


def _runs_at(name: str) -> list[RunFolder]:
    """The run of this path or name, or the runs in this folder, the newest first."""
    standard = RunOptions().runs_dir
    for path in (Path(name), standard / name):
        if (path / DESCRIPTION).is_file() or (path / METRICS).is_file():
            return [RunFolder(path)]
    folder = Path(name)
    if not folder.is_dir():
        known = [path.name for path in standard.iterdir()] if standard.is_dir() else []
        raise ConfigError(
            f"There is no run or folder '{name}'{nearest(folder.name, known)}: onym train makes one, or name its --runs-dir."
        )
    try:
        found = [path for path in folder.iterdir() if (path / DESCRIPTION).is_file()]
        found.sort(key=lambda path: (path / DESCRIPTION).stat().st_mtime, reverse=True)
    except OSError as error:
        raise StorageError(f"Could not look into '{folder}': {error.strerror}.") from error
    if not found:
        raise ConfigError(f"There are no runs in '{folder}': onym train makes one, or name another folder.")
    return [RunFolder(path) for path in found]


def _metrics(folder: RunFolder) -> Rows:
    rows = folder.read_metrics()
    if not rows:
        raise ConfigError(f"The run '{folder.path}' has no metrics yet, so there is nothing to draw.")
    return rows


def row_of(folder: RunFolder) -> Row:
    """What is known about a run."""
    try:
        about = folder.description()
        if about is None:
            return Row(folder.path.name, "run.json is missing")
        rows = [row for row in folder.read_metrics() if "event" not in row]
        saved = steps(folder.checkpoints)
    except OnymError:
        return Row(folder.path.name, "run.json is damaged")
    status = about["status"]
    if status == RUNNING and writer_of(folder.checkpoints) is None:
        status = "killed"
    evaluated = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    best, best_step = min(evaluated, default=(None, None))
    newest = step_folder(folder.checkpoints, saved[-1]) if saved else None
    return Row(
        folder.path.name,
        status,
        rows[-1]["step"] if rows else None,
        about.get("steps"),
        evaluated[-1][0] if evaluated else None,
        best,
        best_step,
        speeds[-1] if speeds else None,
        about.get("parameters"),
        utc(newest.stat().st_mtime) if newest else None,
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
        "-" if row.saved is None else format_age(row.saved).removesuffix(" ago"),
    )
