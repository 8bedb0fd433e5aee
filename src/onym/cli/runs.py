"""``onym runs``: the runs in a folder, and how far each is."""

from __future__ import annotations

from dataclasses import asdict

from onym.cli.arguments import RunsArguments
from onym.cli.report import print_json, print_table, shown
from onym.errors import ConfigError
from onym.train.options import RunOptions
from onym.train.plot import PICTURES, Rows, plot_runs
from onym.train.run_folder import RunFolder
from onym.train.run_list import RunSummary, runs_at, summary_of
from onym.units import format_age

_WIDEST_NAME = 24


def run(given: RunsArguments) -> int:
    """``onym runs``."""
    if given.plot is not None and given.plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot takes a file that ends with {', '.join(PICTURES)}, not '{given.plot}'.")
    folders = [folder for name in given.runs or (str(RunOptions().runs_dir),) for folder in runs_at(name)]
    if given.plot is not None:
        plot_runs({folder.path.name: _metrics(folder) for folder in folders}, given.plot, given.x)
    rows = [summary_of(folder) for folder in folders]
    if given.json:
        print_json({"runs": [asdict(row) for row in rows]})
    else:
        print_table([("run", "status", "step", "held-out", "best", "tokens/s", "saved"), *map(_cells, rows)], indent="")
        if given.plot is not None:
            print(f"Drawn: {given.plot}")
    return 0


def _metrics(folder: RunFolder) -> Rows:
    rows = folder.read_metrics()
    if not rows:
        raise ConfigError(f"The run '{folder.path}' has no metrics yet, so there is nothing to draw.")
    return rows


def _cells(row: RunSummary) -> tuple[str, ...]:
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
