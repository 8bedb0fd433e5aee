"""``onym prune``: retention by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from onym.checkpoint.retention import Retention, metrics_of, pin, prune, step_folder, steps, unpin
from onym.cli.report import bytes_of, checkpoints_folder, print_json, print_table
from onym.errors import CheckpointError, ConfigError, nearest
from onym.storage import object_store
from onym.storage.lock import Lease
from onym.train.display import size

INCOMPLETE = 2


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
    """The name for --pin; the step is found by it, as in onym generate RUN --step NAME."""
    unpin: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Take a pin away; nothing is deleted."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``onym prune``."""
    given = tyro.cli(_Arguments, prog="onym prune", args=arguments)
    path = object_store.as_path(given.run)
    directory = checkpoints_folder(path)
    if directory is None or not steps(directory):
        raise CheckpointError(f"'{path}' is no run with checkpoints: there is nothing to delete or to pin.")
    if given.pin >= 0 or given.as_ or given.unpin:
        _change_pins(given, directory)
        return 0
    retention = Retention(given.keep_last, given.keep_every or None, given.keep_best or None)
    _require_metric(directory, given.keep_best)
    gone: list[int] = []
    notes: list[str] = []
    with _right_to_write(directory, not given.dry_run):
        reasons = retention.reasons(directory)
        sizes = {step: bytes_of(step_folder(directory, step)) for step in reasons}
        if not given.dry_run:
            gone = prune(directory, retention, note=notes.append)
    doomed = [step for step, reason in reasons.items() if reason is None]
    freed = sum(sizes[step] for step in (doomed if given.dry_run else gone))
    if given.json:
        kept = {step: reason for step, reason in reasons.items() if reason is not None}
        print_json({"kept": kept, "doomed": doomed, "deleted": gone, "sizes": sizes, "bytes": freed, "notes": notes})
    else:
        rows = [("step", "size", "", "")]
        for step, reason in reasons.items():
            fate = "stays" if reason else "would go" if given.dry_run else "deleted" if step in gone else "is still there"
            rows.append((str(step), size(sizes[step]), fate, reason or ""))
        print_table(rows)
        print(f"{size(freed)} would be freed; nothing was deleted." if given.dry_run else f"{size(freed)} freed.")
    for note in notes:
        print(f"onym: {note}", file=sys.stderr)
    return INCOMPLETE if notes else 0


def _change_pins(given: _Arguments, directory: Path) -> None:
    if (given.pin >= 0) != bool(given.as_):
        raise ConfigError("--pin takes a step and --as its name: give both, as in --pin 1000 --as before-lr-drop.")
    if given.unpin and given.as_:
        raise ConfigError("--pin and --unpin are two things: give one of them, then the other.")
    told: dict[str, Any]
    if given.unpin:
        unpin(directory, given.unpin)
        told, said = {"unpinned": given.unpin}, f"{given.unpin!r} is no pin any more."
    else:
        pin(directory, given.pin, given.as_)
        told, said = {"pinned": {given.as_: given.pin}}, f"Step {given.pin} stays, as {given.as_!r}."
    print_json(told) if given.json else print(said)


def _require_metric(directory: Path, best: str) -> None:
    """Refuse a metric that no step has: what was meant to stay would be deleted."""
    metric = best.rpartition(":")[0] or best
    measured = [metrics_of(step_folder(directory, step)) for step in steps(directory)] if metric else []
    known = sorted({name for metrics in measured for name in metrics or {}})
    if metric and metric not in known:
        has = f"they have {', '.join(known)}" if known else "they have none; leave --keep-best out"
        raise ConfigError(f"No step in '{directory}' has a metric {metric!r}{nearest(metric, known)}: {has}.")


@contextmanager
def _right_to_write(directory: Path, needed: bool) -> Iterator[None]:
    """The run's lease, so that nothing is deleted under a trainer that lives. On remote storage there are no leases."""
    lease = Lease(directory) if needed and not object_store.is_remote(directory) else None
    try:
        yield
    finally:
        if lease is not None:
            lease.release()
