"""A metrics.jsonl in memory, as columns: a million rows are 72 MB, and only what is appended is read.

The rows are those of :meth:`onym.train.run_folder.RunFolder.read_metrics`: up to the first line that is no JSON. What is no
number is a gap. A file that was replaced or became shorter, as after a resume or a rollback, is read anew under another
:attr:`MetricsFile.generation`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from json.scanner import make_scanner
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from onym.train.downsample import Values, downsample, visible
from onym.train.growing_file import GrowingFile

Unit = Literal["step", "tokens", "seconds"]
UNITS: tuple[Unit, ...] = ("step", "tokens", "seconds")
SERIES = ("train_loss", "val_loss", "ema_val_loss", "lr", "grad_norm", "tokens_per_second")
_COLUMNS = (*UNITS, *SERIES)
_MOST_EVENTS = 10_000  # the newest ones; a run has some, a file that somebody made may have millions
_MOST_FIELDS = 200

_scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]
_generations = count(1)
_PLAIN = frozenset({int, float, type(None)})


@dataclass(frozen=True)
class MetricsView:
    """What is drawn of a run."""

    version: str
    rows: int
    """Without events."""
    range: tuple[float, float] | None
    """The first and last x of all rows; None where there is none."""
    series: dict[str, tuple[list[float], list[float]]]
    """x and y by name; those without a value are left out."""
    events: list[dict[str, Any]]
    """With their ``x``."""


class MetricsFile:
    """The rows of one metrics.jsonl. Any thread may use it."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = GrowingFile(path), Lock()
        self._start_anew()

    def _start_anew(self) -> None:
        self.generation = next(_generations)
        """Another number for each time that the file was read from its beginning."""
        self.rows = 0
        """Rows without those of events."""
        self._values = np.empty((len(_COLUMNS), 0))  # [column, capacity]; NaN is a gap
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._events_read = 0
        self._shapes: set[tuple[str, ...]] = set()
        self._fields: dict[str, None] = {}
        self._broken = False

    @property
    def version(self) -> str:
        """Another text whenever there are other rows."""
        return f"{self.generation}.{self.rows}.{self._events_read}"

    @property
    def fields(self) -> list[str]:
        """The names in the rows, in the order in which they came."""
        return list(self._fields)

    def column(self, name: str) -> Values:
        """All values of a unit or series, row by row; NaN where a row has none."""
        with self._lock:
            return self._values[_COLUMNS.index(name), : self.rows].copy()

    def events(self) -> list[dict[str, Any]]:
        """The newest events, in their order."""
        with self._lock:
            return list(self._events)

    def update(self) -> str:
        """Read what is new in the file; returns the version.

        Raises:
            OSError: it cannot be read.
        """
        with self._lock:
            for lines in self._file.read():
                if lines.restarts:
                    self._start_anew()
                elif not self._broken:
                    self._add(lines.text.decode(errors="replace"))
            return self.version

    def view(self, x: Unit = "step", points: int = 1500, start: float | None = None, end: float | None = None) -> MetricsView:
        """The curves over a unit, downsampled.

        Args:
            points: the most of a series, and the most events.
            start, end: what is seen of x, in this unit; the points next to that come too.
        """
        with self._lock:  # what is appended later is behind the part that is used here
            version, values, events = self.version, self._values[:, : self.rows], list(self._events)
        xs = values[_COLUMNS.index(x)]
        known = np.isfinite(xs)
        if not known.all():
            values, xs = values[:, known], xs[known]
        series = {}
        part = visible(xs, start, end)
        for name, y in zip(SERIES, values[len(UNITS) :], strict=True):
            if found := _points(xs, y, points, start, end, part):
                series[name] = found
        marks = [event for event in self._placed(events, values, x) if _is_between(event["x"], start, end)]
        if len(marks) > points:
            marks = [marks[index] for index in np.linspace(0, len(marks) - 1, points).astype(int)]
        ends = (float(xs[0]), float(xs.max())) if len(xs) else None
        return MetricsView(version, len(known), ends, series, marks)

    @staticmethod
    def _placed(events: Iterable[dict[str, Any]], values: Values, x: Unit) -> list[dict[str, Any]]:
        """Events have a step only: where that is in another unit."""
        numbered = [(event, step) for event in events if math.isfinite(step := _number(event.get("step")))]
        if not numbered:
            return []
        places = [step for _, step in numbered]
        if x != "step":
            steps, xs = values[0], values[_COLUMNS.index(x)]
            known = np.isfinite(steps)
            if not known.any():
                return []
            places = np.interp(places, np.maximum.accumulate(steps[known]), xs[known]).tolist()
        return [{**event, "x": place} for (event, _), place in zip(numbered, places, strict=True)]

    def _add(self, text: str) -> None:
        """Parse complete lines, in a call each: no call holds the interpreter for long."""
        rows: list[dict[str, Any]] = []
        position = 0
        while position < len(text):
            end = text.find("\n", position)
            end = len(text) if end < 0 else end
            try:
                row, stop = _scan(text, position)  # much faster than json.loads, and with fewer checks
            except (StopIteration, ValueError, RecursionError):
                stop = -1
            if stop != end:
                try:
                    row = json.loads(text[position:end])
                except (ValueError, RecursionError):
                    self._broken = True
                    break
            position = end + 1
            if type(row) is not dict:
                continue
            if (shape := tuple(row)) not in self._shapes and len(self._fields) < _MOST_FIELDS:
                self._shapes.add(shape)
                self._fields.update(dict.fromkeys(shape))
            if "event" in row:
                self._events.append(row)
                self._events_read += 1
            else:
                rows.append(row)
        self._append(rows)

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        end = self.rows + len(rows)
        if end > self._values.shape[1]:
            larger = np.empty((len(_COLUMNS), max(end, self._values.shape[1] * 3 // 2)))
            larger[:, : self.rows] = self._values[:, : self.rows]
            self._values = larger
        for number, name in enumerate(_COLUMNS):
            self._values[number, self.rows : end] = _numbers([row.get(name) for row in rows])
        self.rows = end


def _numbers(values: list[Any]) -> Values:
    """NaN for what is no number."""
    if set(map(type, values)) <= _PLAIN:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:  # an integer that no float can be
            pass
    return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _points(
    xs: Values, y: Values, points: int, start: float | None, end: float | None, part: slice
) -> tuple[list[float], list[float]] | None:
    """The points of a series to draw; None where it has none."""
    here = y[part]
    known = np.isfinite(here)
    if known.all():
        x, y = xs[part], here
    else:  # few values: the ones next to the range may be far outside it
        known = np.isfinite(y)
        x, y = xs[known], y[known]
        inner = visible(x, start, end)
        x, y = x[inner], y[inner]
    if not len(x):
        return None
    chosen = downsample(y, points)
    return _shortest(x[chosen]), y[chosen].tolist()


def _shortest(x: Values) -> list[float]:
    """Whole numbers are integers, which are shorter in JSON."""
    whole = np.abs(x) < 2**53
    return x.astype(np.int64).tolist() if whole.all() and (x == np.floor(x)).all() else x.tolist()  # type: ignore[no-any-return]


def _is_between(x: float, start: float | None, end: float | None) -> bool:
    return (start is None or x >= start) and (end is None or x <= end)
