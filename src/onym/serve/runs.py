"""The routes of the Runs page: /api/runs and /api/events.

Nothing here blocks the event loop: files are read and JSON is made in a few threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from onym.serve.checkpoints import Checkpoints
from onym.serve.errors import ApiError
from onym.serve.json_body import json_bytes_response, to_json
from onym.serve.run_events import MOST_NAMES, RunEvents
from onym.serve.run_folders import ServedRuns
from onym.serve.run_store import RunStore
from onym.serve.threads import in_own_thread
from onym.train.metrics_file import UNITS, Unit

T = TypeVar("T")
_THREADS = 4
_MOST_WAITING = 256  # requests for a thread
_MOST_VERIFICATIONS = 8  # the one that runs, and those that wait for it
_FEWEST_POINTS, _POINTS, _MOST_POINTS = 2, 1500, 10_000
_NONE_SERVED = "This server shows no runs: start it with a folder of runs, as onym serve runs/."


class RunsApi:
    """What the server answers about runs. ``routes`` go into the application; ``close`` is awaited when it ends.

    Args:
        folder: with the runs in it.
        run: one run alone, instead.
    """

    def __init__(self, folder: Path | None = None, run: Path | None = None) -> None:
        root = folder if folder is not None else run
        self.runs = None if root is None else ServedRuns(root, alone=folder is None)
        """The runs by name, for who looks up a model; None where none are served."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="onym-runs")
        self._waiting = self._verifications = 0
        self._closed = False
        if self.runs is None:
            paths = ("/api/runs", "/api/runs/{rest:path}", "/api/events")
            self.routes: list[BaseRoute] = [Route(path, _none_served, methods=["GET", "POST"]) for path in paths]
            return
        self.store, self.checkpoints = RunStore(self.runs), Checkpoints(self.runs)
        self.events = RunEvents(self.store, self._in_thread)
        store, run_path = self.store, "/api/runs/{name}"
        self.routes = [
            Route("/api/runs", self._get(lambda request: store.list_runs())),
            Route(f"{run_path}/metrics", self._metrics),
            Route(f"{run_path}/metrics.csv", self._csv),
            Route(f"{run_path}/samples", self._get(lambda request: store.samples(_name(request)))),
            Route(f"{run_path}/samples/{{step}}", self._get(lambda request: store.sample(_name(request), _step(request)))),
            Route(f"{run_path}/checkpoints", self._get(lambda request: self.checkpoints.list(_name(request)))),
            Route(f"{run_path}/checkpoints/{{step}}/verify", self._verify, methods=["POST"]),
            Route(f"{run_path}/options", self._get(lambda request: store.options(_name(request)))),
            Route("/api/events", self._events),
        ]

    async def close(self) -> None:
        """End the streams of events, and begin nothing more. What is read just now is not waited for."""
        self._closed = True
        if self.runs is not None:
            await self.events.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise ApiError(503, "The server is shutting down: ask again in a while.", headers={"Retry-After": "5"})
        if self._waiting >= _MOST_WAITING:
            raise ApiError(503, "Too much is asked about runs at once: ask again in a second.", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self._waiting -= 1

    def _get(self, answer: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            return json_bytes_response(await self._in_thread(lambda: to_json(answer(request))))

        return respond

    async def _metrics(self, request: Request) -> Response:
        name, query = _name(request), request.query_params
        unit: Unit | None = next((unit for unit in UNITS if unit == query.get("x", "step")), None)
        if unit is None:
            raise ApiError(400, f"x is what the curves are over, one of {', '.join(UNITS)}.", param="x")
        points = _number(query.get("points"), "points", int)
        if points is not None and not _FEWEST_POINTS <= points <= _MOST_POINTS:
            raise ApiError(400, f"points is a whole number from {_FEWEST_POINTS} to {_MOST_POINTS}.", param="points")
        start, end = _number(query.get("from"), "from", float), _number(query.get("to"), "to", float)
        answer = await self._in_thread(lambda: to_json(self.store.metrics(name, unit, points or _POINTS, start, end)))
        return json_bytes_response(answer)

    async def _csv(self, request: Request) -> Response:
        name = _name(request)
        pieces = await self._in_thread(lambda: self.store.csv(name))
        headers = {"Cache-Control": "no-store", "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, '')}.csv"}
        return StreamingResponse(self._pieces(pieces), media_type="text/csv", headers=headers)

    async def _pieces(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        while (piece := await self._in_thread(lambda: next(pieces, None))) is not None:
            yield piece

    async def _verify(self, request: Request) -> Response:
        name, step = _name(request), _step(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Send the body {} with the header Content-Type: application/json.")
        if self._verifications >= _MOST_VERIFICATIONS:
            raise ApiError(
                503, f"{_MOST_VERIFICATIONS} checkpoints are being verified: ask again later.", headers={"Retry-After": "10"}
            )
        self._verifications += 1
        try:
            answer = await in_own_thread(lambda: self.checkpoints.verify(name, step))
        finally:
            self._verifications -= 1
        return json_bytes_response(to_json(answer))

    async def _events(self, request: Request) -> Response:
        names = request.query_params.getlist("metrics")
        if len(names) > MOST_NAMES:
            raise ApiError(400, f"metrics names at most {MOST_NAMES} runs.", param="metrics")
        return await self.events.response(names)


async def _none_served(request: Request) -> Response:
    raise ApiError(404, _NONE_SERVED)


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _step(request: Request) -> str:
    return str(request.path_params["step"])


def _number(text: str | None, field: str, kind: type[T]) -> T | None:
    """A finite number of the query; None where it is not given."""
    if text is None:
        return None
    try:
        if len(text) > 40 or not math.isfinite(float(text)):
            raise ValueError
        return kind(text)  # type: ignore[call-arg]
    except ValueError as error:
        raise ApiError(400, f"{field} is no number: leave it out, or give one.", param=field) from error
