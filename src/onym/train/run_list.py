"""The runs in a folder, and how far each is, from the ends of its files.

run.json has the best held-out loss of a run that ended. While a run goes on, and after it was killed, run.json is as old as the
run's beginning; then metrics.jsonl is searched for held-out losses, which is 50 times faster than parsing it. What was found is
kept, so a :class:`RunSummarizer` that is asked again looks only at what is new.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onym.checkpoint.steps import step_folder, steps
from onym.errors import ConfigError, OnymError, StorageError, nearest
from onym.storage.lock import writer_of
from onym.train.growing_file import GrowingFile
from onym.train.options import RunOptions
from onym.train.run_folder import DESCRIPTION, METRICS, RUNNING, RunFolder
from onym.units import utc

KILLED = "killed"
_TAIL = 4 << 10  # bytes: some 20 rows
_LONGEST_TAIL = 4 << 20
_LARGEST_DESCRIPTION = 16 << 20
_HELD_OUT = re.compile(rb'"val_loss": ?(-?[0-9][0-9.eE+-]*)')

Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file: equal while nobody writes to it."""
Losses = tuple[float | None, float | None, int | None]
"""The newest held-out loss, the least, and the step of that."""


@dataclass(frozen=True)
class RunSummary:
    """One run."""

    name: str
    status: str
    """running, interrupted, finished, killed (nobody writes to it, and it did not end), or what is wrong with it."""
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    held_out: float | None = None
    best: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    """Of wall-clock time, up to the newest row of metrics.jsonl."""
    eta_seconds: float | None = None
    """Of a run that is running: by the newest rows."""
    parameters: int | None = None
    saved: str | None = None
    """When the newest checkpoint was written, UTC."""
    started: float | None = None
    """Unix time of the sample before the first step."""
    changed: float | None = None
    """Unix time of the newest change of its files."""


def runs_at(name: str) -> list[RunFolder]:
    """The run of this path or name, or the runs in this folder, the newest first.

    Raises:
        ConfigError: there is none.
        StorageError: the folder cannot be read.
    """
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


def summary_of(folder: RunFolder) -> RunSummary:
    """What is known about a run."""
    return RunSummarizer(folder).summary()


class RunSummarizer:
    """Summarizes one run again and again. For one thread at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._described, self._measured, self._checkpoints = folder.path / DESCRIPTION, folder.metrics, folder.checkpoints
        self._first_sample = folder.path / "samples" / "step-000000000.txt"
        self._search = _HeldOutLosses(folder.metrics)
        self._held_out: tuple[Stamp | None, Losses] = (None, (None, None, None))
        self._about: tuple[Stamp | None, dict[str, Any] | None] = (None, None)
        self._tail: tuple[Stamp | None, _Tail] = (None, _Tail())
        self._saved: tuple[Stamp | None, str | None] = (None, None)

    def summary(self) -> RunSummary:
        """The run as it is now. Files that did not change since the last call are not read."""
        folder, name = self._folder, self._folder.path.name
        described, measured = stamp_of(self._described), stamp_of(self._measured)
        try:
            if described is None:
                return RunSummary(name, "run.json is missing")
            if described != self._about[0]:
                self._about = described, _description(folder)
            about = self._about[1]
            if about is None:
                return RunSummary(name, "run.json is damaged", changed=described[2] / 1e9)
            if measured != self._tail[0]:
                self._tail = measured, _read_tail(self._measured)
            saved = self._newest_checkpoint()
            ended = about["status"] != RUNNING and "best" in about
            if not ended and measured != self._held_out[0]:
                self._held_out = measured, self._search.update()
            held_out, best, best_step = _ended_with(about) if ended else self._held_out[1]
        except (OSError, OnymError) as error:
            return RunSummary(name, f"it cannot be read: {error.strerror if isinstance(error, OSError) else error}")
        status, tail, steps_asked = about["status"], self._tail[1], _whole(about.get("steps"))
        if status == RUNNING and writer_of(self._checkpoints) is None:
            status = KILLED
        left = None
        if status == RUNNING and steps_asked is not None and tail.step is not None and tail.seconds_per_step is not None:
            left = max(0, steps_asked - tail.step) * tail.seconds_per_step
        return RunSummary(
            name=name,
            status=status,
            step=tail.step,
            steps=steps_asked,
            train_loss=tail.train_loss,
            held_out=held_out,
            best=best,
            best_step=best_step,
            tokens_per_second=tail.tokens_per_second,
            tokens=tail.tokens,
            seconds=tail.seconds,
            eta_seconds=left,
            parameters=_whole(about.get("parameters")),
            saved=saved,
            started=_changed(self._first_sample),
            changed=max(described[2], measured[2] if measured else 0) / 1e9,
        )

    def _newest_checkpoint(self) -> str | None:
        stamp = stamp_of(self._checkpoints)
        if stamp != self._saved[0] or stamp is None:
            found = steps(self._checkpoints) if stamp is not None else []
            seconds = _changed(step_folder(self._checkpoints, found[-1])) if found else None
            self._saved = stamp, None if seconds is None else utc(seconds)
        return self._saved[1]


class _HeldOutLosses:
    """Searches a metrics.jsonl for held-out losses."""

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._forget()

    def _forget(self) -> None:
        self._newest: float | None = None
        self._best: float | None = None
        self._best_step: int | None = None

    def update(self) -> Losses:
        """Those of the whole file; only what is new is read."""
        for lines in self._file.read():
            if lines.restarts:
                self._forget()
            best_at = None
            for found in _HELD_OUT.finditer(lines.text):
                with suppress(ValueError):
                    self._newest = float(found[1])
                    if self._best is None or self._newest < self._best:
                        self._best, best_at = self._newest, found.start()
            if best_at is not None:
                start, end = lines.text.rfind(b"\n", 0, best_at) + 1, lines.text.find(b"\n", best_at) + 1
                self._best_step = next((row["step"] for row in _rows(lines.text[start:end])), None)
        return self._newest, self._best, self._best_step


@dataclass(frozen=True)
class _Tail:
    """What the last rows of a metrics.jsonl say."""

    step: int | None = None
    train_loss: float | None = None
    tokens_per_second: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    seconds_per_step: float | None = None


def _read_tail(path: Path) -> _Tail:
    length, rows = _TAIL, list[dict[str, Any]]()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                file.seek(max(0, size - length))
                text = file.read(length)
                rows = list(_rows(text if length >= size else text[text.find(b"\n") + 1 :]))
                if rows or length >= min(size, _LONGEST_TAIL):
                    break
                length *= 8  # events alone
    except FileNotFoundError:
        return _Tail()
    if not rows:
        return _Tail()
    speeds = [speed for row in rows if (speed := _finite(row.get("tokens_per_second")))]
    timed = [(row["step"], seconds) for row in rows if (seconds := _finite(row.get("seconds"))) is not None]
    newest, per_step = rows[-1], None
    if len(timed) > 1 and timed[-1][0] > timed[0][0]:
        per_step = max(0.0, (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0]))
    return _Tail(
        step=newest["step"],
        train_loss=_finite(newest.get("train_loss")),
        tokens_per_second=speeds[-1] if speeds else None,
        tokens=_whole(newest.get("tokens")),
        seconds=_finite(newest.get("seconds")),
        seconds_per_step=per_step,
    )


def _rows(text: bytes) -> Iterable[dict[str, Any]]:
    """Those with a step that are no events."""
    for line in text[: text.rfind(b"\n") + 1].decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if type(row) is dict and "event" not in row and _whole(row.get("step")) is not None:
                yield row


def _description(folder: RunFolder) -> dict[str, Any] | None:
    """As RunFolder.description, but without a look at each option, which takes 0.6 ms; None where it is damaged."""
    try:
        with (folder.path / DESCRIPTION).open("rb") as file:
            values = json.loads(file.read(_LARGEST_DESCRIPTION))
        known = isinstance(values["status"], str) and len(values["status"]) < 100 and isinstance(values["options"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return values if known else None


def _ended_with(about: dict[str, Any]) -> Losses:
    """Those of run.json, with as many digits as metrics.jsonl has."""
    newest, best = (None if (loss := _finite(about.get(name))) is None else round(loss, 6) for name in ("held_out", "best"))
    return newest, best, None if best is None else _whole(about.get("best_step"))


def stamp_of(path: Path) -> Stamp | None:
    """That of a file or folder; None where it is not there."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> float | None:
    stamp = stamp_of(path)
    return None if stamp is None else stamp[2] / 1e9


def _finite(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None
