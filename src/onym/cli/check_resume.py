"""``onym tools check-resume``: whether a run of these options continues exactly, tried out here."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path

from onym.cli.arguments import CheckResumeArguments
from onym.cli.parsing import parse_options
from onym.errors import ConfigError
from onym.tools.resume_check import compare_killed
from onym.train.display import Display

_SHOWN = 12


def run(given: tuple[CheckResumeArguments, list[str]]) -> int:
    """``onym tools check-resume``."""
    ours, options = given
    if ours.kills < 1:
        raise ConfigError(f"--kills must be at least 1, not {ours.kills}.")
    for argument in options:
        if argument.split("=")[0] in ("--name", "--runs-dir", "--time-limit"):
            raise ConfigError(f"{argument.split('=')[0]} is not for check-resume, which has two runs of its own: leave it out.")
    if ours.folder is not None and ours.folder.exists() and any(ours.folder.iterdir()):
        raise ConfigError(f"'{ours.folder}' is not empty: name a new --folder.")
    seed = random.randrange(10**6) if ours.kill_seed is None else ours.kill_seed
    folder = ours.folder or Path(tempfile.mkdtemp(prefix="onym-check-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parsed = parse_options([*options, "--name", "straight", "--runs-dir", str(folder)])
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    display, began = Display(), time.monotonic()
    with display.activity("Two runs") as activity:
        result = compare_killed(options, folder, ours.kills, seed, activity, ranks=parsed.run.processes)
        activity.result = f"killed {len(result.kills)} times, after steps {', '.join(map(str, result.kills)) or '-'}"
    if not result.kills:
        raise ConfigError("The run has too few steps to be killed in one: give more --steps.")
    if result.differences:
        display.fail(f"Different in {len(result.differences)} places (--kill-seed {seed}; both are in '{folder}'):")
        for difference in result.differences[:_SHOWN]:
            display.note(f"  {difference}")
        if len(result.differences) > _SHOWN:
            display.note(f"  … and {len(result.differences) - _SHOWN} more")
        return 1
    display.note(
        f"Bitwise identical: {result.tensors} tensors and {result.rows} rows of metrics, after {len(result.kills)} "
        f"kills ({time.monotonic() - began:.0f} s)."
    )
    if ours.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0
