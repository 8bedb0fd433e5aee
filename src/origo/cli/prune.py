"""``origo prune``: retention by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from origo.cli.report import print_json, print_table
from origo.errors import CheckpointError, ConfigError
from origo.store import remote
from origo.store.layout import Manifest
from origo.store.lease import Lease
from origo.store.run import CHECKPOINTS, Retention, pin, prune, step_folder, steps, unpin
from origo.training.display import size


@dataclass(frozen=True)
class _Arguments:
    """Delete the checkpoints of a run that need not stay, once the newest was read back; or pin one so that it stays."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
    """The run, or the folder with its steps."""
    keep_last: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 3)")] = 3
    """How many of the newest stay."""
    keep_every: Annotated[int, tyro.conf.arg(metavar="K", help_behavior_hint="(default: none)")] = 0
    """Those stay whose step is a multiple of this."""
    keep_best: Annotated[str, tyro.conf.arg(metavar="METRIC[:max]", help_behavior_hint="(default: none)")] = ""
    """The one with the lowest value of a metric stays, or with :max the highest."""
    dry_run: bool = False
    """Only say what would be deleted, and why the others stay."""
    pin: Annotated[int, tyro.conf.arg(metavar="STEP", help_behavior_hint="")] = -1
    """Keep this step whatever comes, under the name that --as gives it; nothing is deleted."""
    as_: Annotated[str, tyro.conf.arg(name="as", metavar="NAME", help_behavior_hint="")] = ""
    """The name for --pin; the step is found by it, as in origo generate RUN --step NAME."""
    unpin: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Take a pin away; nothing is deleted."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``origo prune``."""
    given = tyro.cli(_Arguments, prog="origo prune", args=arguments)
    path = remote.as_path(given.run)
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not steps(directory):
        raise CheckpointError(f"'{path}' is no run: there are no checkpoints in it.")
    if given.pin >= 0 or given.as_:
        if given.pin < 0 or not given.as_:
            raise ConfigError("--pin takes a step and --as its name: give both, as in --pin 1000 --as before-lr-drop.")
        pin(directory, given.pin, given.as_)
        told: dict[str, Any] = {"pinned": {given.as_: given.pin}}
        print_json(told) if given.json else print(f"Step {given.pin} stays, as {given.as_!r}.")
        return 0
    if given.unpin:
        unpin(directory, given.unpin)
        print_json({"unpinned": given.unpin}) if given.json else print(f"{given.unpin!r} is no pin any more.")
        return 0
    retention = Retention(given.keep_last, given.keep_every or None, given.keep_best or None)
    reasons = retention.reasons(directory)
    sizes = {step: _bytes(directory, step) for step in reasons}
    lease = None if given.dry_run or remote.is_remote(directory) else Lease(directory)
    notes: list[str] = []
    try:
        gone = [] if given.dry_run else prune(directory, retention, note=notes.append)
    finally:
        if lease is not None:
            lease.release()
    doomed = [step for step, reason in reasons.items() if reason is None]
    freed = sum(sizes[step] for step in (doomed if given.dry_run else gone))
    if given.json:
        print_json(
            {"kept": {s: r for s, r in reasons.items() if r}, "doomed": doomed, "deleted": gone, "bytes": freed, "notes": notes}
        )
        return 0
    rows = []
    for step, reason in reasons.items():
        fate = "stays" if reason else "would go" if given.dry_run else "deleted" if step in gone else "could not be deleted"
        rows.append((str(step), size(sizes[step]), fate, reason or ""))
    print_table(rows)
    print(f"{size(freed)} {'would be' if given.dry_run else 'are'} free.")
    return 0


def _bytes(directory: Any, step: int) -> int:
    try:
        return sum(entry.bytes for entry in Manifest.read(step_folder(directory, step)).files.values())
    except CheckpointError:
        return 0
