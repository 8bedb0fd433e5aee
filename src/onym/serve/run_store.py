"""What the Runs page asks for, read from the runs' files. Everything here blocks: the server calls it in threads.

Files that did not change are not read again. Of the metrics of runs that were looked at, some millions of rows stay in memory.
"""

from __future__ import annotations

import csv
import io
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from onym.errors import OnymError
from onym.serve.errors import ApiError
from onym.serve.run_folders import ServedRuns
from onym.train.growing_file import GrowingFile
from onym.train.metrics_file import MetricsFile, Unit
from onym.train.run_folder import RunFolder
from onym.train.run_list import RunSummarizer, RunSummary, Stamp, stamp_of

_MOST_ROWS = 4_000_000  # in memory: 72 bytes each
_MOST_VERSIONS = 10_000
_LONGEST_SAMPLE = 1 << 20


class RunStore:
    """Answers about the runs of a folder, or about one run. Any thread may ask."""

    def __init__(self, runs: ServedRuns) -> None:
        self.runs = runs
        self._summarizers: dict[str, RunSummarizer] = {}
        self._metrics: OrderedDict[str, MetricsFile] = OrderedDict()  # the one used last at the end
        self._versions: dict[str, tuple[Stamp | None, tuple[str, int]]] = {}
        self._listing, self._lock = Lock(), Lock()

    def summaries(self) -> dict[str, RunSummary]:
        """All runs, the one that changed last first."""
        with self._listing:
            folders = self.runs.all()
            self._summarizers = {name: kept for name, kept in self._summarizers.items() if name in folders}
            found = []
            for name, folder in folders.items():
                if (reason := self.runs.leads_out(folder)) is not None:
                    found.append(RunSummary(name, reason))
                    continue
                if name not in self._summarizers:
                    self._summarizers[name] = RunSummarizer(folder)
                summary = self._summarizers[name].summary()
                if summary.changed is not None or folder.path.is_dir():  # else it was deleted just now
                    found.append(summary if summary.name == name else replace(summary, name=name))
        return {each.name: each for each in sorted(found, key=lambda each: (-(each.changed or 0), each.name))}

    def list_runs(self) -> dict[str, Any]:
        """GET /api/runs."""
        return {"folder": self.runs.shown, "runs": [vars(each) for each in self.summaries().values()]}

    def metrics(
        self, name: str, x: Unit = "step", points: int = 1500, start: float | None = None, end: float | None = None
    ) -> dict[str, Any]:
        """GET /api/runs/{name}/metrics."""
        file = self._updated(self.runs.find(name), name)
        view = file.view(x, points, start, end)
        return {
            "run": name,
            "version": view.version,
            "rows": view.rows,
            "x": x,
            "range": view.range,
            "series": {series: {"x": xs, "y": ys} for series, (xs, ys) in view.series.items()},
            "events": view.events,
        }

    def metrics_version(self, name: str) -> tuple[str, int] | None:
        """The version of a run's metrics, and its generation; None where there is no such run.

        A file that did not change is not opened: of many long runs not all stay in memory.
        """
        try:
            folder = self.runs.find(name)
            stamp = stamp_of(folder.metrics)
            if name not in self._versions or self._versions[name][0] != stamp:
                file = self._updated(folder, name)
                if len(self._versions) >= _MOST_VERSIONS:
                    self._versions.clear()
                self._versions[name] = stamp, (file.version, file.generation)
        except (ApiError, OSError):
            return None
        return self._versions[name][1]

    def _updated(self, folder: RunFolder, name: str) -> MetricsFile:
        with self._lock:
            file = self._metrics.get(name) or MetricsFile(folder.metrics)
            self._metrics[name] = file
            self._metrics.move_to_end(name)
        try:
            file.update()
        except OSError as error:
            raise ApiError(404, f"The metrics of the run {name!r} cannot be read: {error.strerror}.") from error
        with self._lock:
            while len(self._metrics) > 1 and sum(each.rows for each in self._metrics.values()) > _MOST_ROWS:
                self._metrics.popitem(last=False)
        return file

    def csv(self, name: str) -> Iterator[bytes]:
        """GET /api/runs/{name}/metrics.csv: every row, those of events too, in pieces.

        Raises:
            ApiError: at once, where there is no such run.
        """
        folder = self.runs.find(name)
        return _csv_pieces(folder.metrics, self._updated(folder, name).fields)

    def samples(self, name: str) -> dict[str, Any]:
        """GET /api/runs/{name}/samples."""
        return {"samples": [{"step": int(step)} for step in self.runs.samples(self.runs.find(name))]}

    def sample(self, name: str, step: str) -> dict[str, Any]:
        """GET /api/runs/{name}/samples/{step}."""
        path = self.runs.samples(self.runs.find(name)).get(step)
        try:
            if path is None or not path.is_file():
                raise FileNotFoundError
            with path.open("rb") as file:
                text = file.read(_LONGEST_SAMPLE).decode(errors="replace")
        except OSError as error:
            raise ApiError(
                404, f"The run {name!r} has no sample of step {step[:20]}: GET /api/runs/{{name}}/samples lists them."
            ) from error
        return {"step": int(step), "text": text}

    def options(self, name: str) -> dict[str, Any]:
        """GET /api/runs/{name}/options."""
        try:
            about = self.runs.find(name).description()
        except (OnymError, RecursionError):
            raise ApiError(404, f"The options of the run {name!r} cannot be read: its run.json is damaged.") from None
        if about is None:
            raise ApiError(404, f"The run {name!r} was deleted.", code="run_not_found")
        return {"options": about.pop("options"), "facts": about}


def _csv_pieces(path: Path, fields: list[str]) -> Iterator[bytes]:
    """A table of a metrics.jsonl; it is read again, because columns in memory know neither other fields nor their order."""
    output = io.StringIO()
    writer = csv.DictWriter(output, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    try:
        for lines in GrowingFile(path).read():
            for line in lines.text.decode(errors="replace").splitlines():
                row = json.loads(line)
                if type(row) is dict:
                    writer.writerow({name: _cell(value) for name, value in row.items()})
                if output.tell() > 1 << 16:
                    yield _taken(output)
    except (OSError, ValueError, RecursionError):  # of what read_metrics too takes for the end
        pass
    yield _taken(output)


def _taken(output: io.StringIO) -> bytes:
    text = output.getvalue()
    output.seek(0)
    output.truncate()
    return text.encode(errors="replace")


def _cell(value: Any) -> Any:
    """Programs for tables run a text that begins like a formula."""
    if isinstance(value, dict | list):
        value = json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
