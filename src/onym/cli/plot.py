"""``onym plot``: several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from onym.cli.report import print_table
from onym.errors import ConfigError, nearest
from onym.train.options import RunOptions
from onym.train.plot import Rows, plot_runs
from onym.train.run_folder import RunFolder

_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class _Arguments:
    """Draw the losses of several runs into one picture."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Folders of runs, or their names in runs/."""
    output: Path = Path("losses.png")
    """The picture: .png, .svg or .pdf."""
    x: Literal["steps", "tokens", "seconds"] = "tokens"
    """What the losses are drawn over."""


def run(arguments: list[str]) -> int:
    """``onym plot``."""
    given = tyro.cli(_Arguments, prog="onym plot", args=arguments)
    if given.output.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--output ends with {', '.join(_FORMATS)}, not as '{given.output}' does.")
    if not given.runs:
        raise ConfigError("Name at least one run; onym runs lists them.")
    found = {name: _rows(name) for name in given.runs}
    plot_runs(found, given.output, given.x)
    table = [("run", "steps", "held-out", "best")]
    for name, rows in found.items():
        losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        last, best = (f"{losses[-1]:.3f}", f"{min(losses):.3f}") if losses else ("-", "-")
        table.append((name, str(rows[-1]["step"]), last, best))
    print_table(table, indent="")
    print(f"Drawn: {given.output}")
    return 0


def _rows(name: str) -> Rows:
    """The metrics of a run."""
    runs = RunOptions().runs_dir
    for path in (Path(name), runs / name):
        if (path / "metrics.jsonl").is_file():
            rows = RunFolder(path).read_metrics()
            if not rows:
                raise ConfigError(f"The run '{path}' has measured nothing yet.")
            return rows
    known = [path.name for path in runs.iterdir()] if runs.is_dir() else []
    raise ConfigError(f"There is no run '{name}'{nearest(Path(name).name, known)}: onym runs lists them.")
