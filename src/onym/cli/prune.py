"""``onym prune``: retention by hand."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from onym.checkpoint.retention import Retention, prune
from onym.checkpoint.steps import metrics_of, pin, step_folder, steps, unpin
from onym.cli.arguments import PruneArguments
from onym.cli.report import bytes_of, checkpoints_folder, print_json, print_table
from onym.errors import CheckpointError, ConfigError, nearest
from onym.storage.lock import Lease
from onym.storage.paths import as_path, is_local
from onym.units import format_size

INCOMPLETE = 2


def run(given: PruneArguments) -> int:
    """``onym prune``."""
    path = as_path(given.run)
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
    with contextlib.ExitStack() as stack:
        if not given.dry_run and is_local(
            directory
        ):  # so that nothing is deleted under a live trainer; remote ones have no leases
            stack.callback(Lease(directory).release)
        reasons = retention.reasons(directory)
        sizes = {step: bytes_of(step_folder(directory, step)) for step in reasons}
        if not given.dry_run:
            gone = prune(directory, retention, note=notes.append)
    doomed = [step for step, reason in reasons.items() if reason is None]
    freed = sum(sizes[step] for step in (doomed if given.dry_run else gone))
    if given.json:
        retained = {step: reason for step, reason in reasons.items() if reason is not None}
        print_json({"retained": retained, "to_delete": doomed, "deleted": gone, "sizes": sizes, "bytes": freed, "notes": notes})
    else:
        rows = [("step", "size", "", "")]
        for step, reason in reasons.items():
            fate = "stays" if reason else "would go" if given.dry_run else "deleted" if step in gone else "is still there"
            rows.append((str(step), format_size(sizes[step]), fate, reason or ""))
        print_table(rows)
        print(f"{format_size(freed)} would be freed; nothing was deleted." if given.dry_run else f"{format_size(freed)} freed.")
    for note in notes:
        print(f"onym: {note}", file=sys.stderr)
    return INCOMPLETE if notes else 0


def _change_pins(given: PruneArguments, directory: Path) -> None:
    if (given.pin >= 0) != bool(given.as_):
        raise ConfigError("--pin takes a step and --as its name: give both, as in --pin 1000 --as before-lr-drop.")
    if given.unpin and given.as_:
        raise ConfigError("--pin and --unpin are two things: give one of them, then the other.")
    result: dict[str, Any]
    if given.unpin:
        unpin(directory, given.unpin)
        result, message = {"unpinned": given.unpin}, f"{given.unpin!r} is no pin any more."
    else:
        pin(directory, given.pin, given.as_)
        result, message = {"pinned": {given.as_: given.pin}}, f"Step {given.pin} stays, as {given.as_!r}."
    print_json(result) if given.json else print(message)


def _require_metric(directory: Path, best: str) -> None:
    """Refuse a metric that no step has: what was meant to stay would be deleted."""
    metric = best.rpartition(":")[0] or best
    measured = [metrics_of(step_folder(directory, step)) for step in steps(directory)] if metric else []
    known = sorted({name for metrics in measured for name in metrics or {}})
    if metric and metric not in known:
        has = f"they have {', '.join(known)}" if known else "they have none; leave --keep-best out"
        raise ConfigError(f"No step in '{directory}' has a metric {metric!r}{nearest(metric, known)}: {has}.")
