"""Server-sent events about runs: one task looks at all runs about once a second, for all who listen, while somebody listens.

Of each run a listener has only the newest state waiting, so a slow one costs no more memory than a fast one. One that takes
nothing for a while is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from onym.serve.errors import ApiError
from onym.serve.json_body import to_json
from onym.serve.run_store import RunStore
from onym.train.run_list import RunSummary

T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]

_EVERY = 1.0  # seconds between two looks
_COMMENT_AFTER = 15.0  # seconds without an event
_PATIENCE = 30.0  # seconds for which a listener may take nothing
_MOST_LISTENERS = 64
MOST_NAMES = 100
"""Of runs whose metrics one listener hears about."""
_log = logging.getLogger("onym.serve")


class _Listener:
    """What one stream has to send."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.versions: dict[str, tuple[str, int]] = {}  # of the metrics that it heard about
        self._waiting: dict[tuple[str, str], dict[str, Any]] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: str, name: str, data: dict[str, Any]) -> None:
        """Add an event; it replaces an older one of its kind about the same run."""
        if event in ("run", "gone"):  # of these too only the newer one counts
            self._waiting.pop(("gone" if event == "run" else "run", name), None)
        before = self._waiting.pop((event, name), None)
        if event == "metrics" and before is not None:
            data = {**data, "reset": data["reset"] or before["reset"]}
        self._waiting[event, name] = data
        self._wake.set()

    def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._wake.set()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer."""
        yield b"event: ready\ndata: {}\n\n"
        while not self._closed:
            try:
                async with asyncio.timeout(_COMMENT_AFTER):
                    await self._wake.wait()
            except TimeoutError:
                yield b": nothing new\n\n"
                continue
            self._wake.clear()
            while self._waiting and not self._closed:
                (event, name) = next(iter(self._waiting))
                yield b"event: %b\ndata: %b\n\n" % (event.encode(), to_json(self._waiting.pop((event, name))))


class _EventStream(StreamingResponse):
    """Ends where the reader takes nothing."""

    def __init__(self, body: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(body, headers=headers, media_type="text/event-stream")
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_PATIENCE):
                await send(message)

        try:
            with suppress(TimeoutError):
                await super().__call__(scope, receive, send_in_time)
        finally:
            await self._body.aclose()  # it may wait at a yield, where no cancellation reaches it


class RunEvents:
    """Watches the runs of a store. Belongs to one event loop.

    Args:
        in_thread: calls a function that blocks.
    """

    def __init__(self, store: RunStore, in_thread: InThread[Any]) -> None:
        self._store, self._in_thread = store, in_thread
        self._listeners: set[_Listener] = set()
        self._watching: asyncio.Task[None] | None = None
        self._seen: dict[str, RunSummary] = {}
        self._first_look = asyncio.Event()
        self._closed = False

    @property
    def is_watching(self) -> bool:
        """Whether the runs are looked at: only while somebody listens."""
        return self._watching is not None

    async def response(self, names: Iterable[str]) -> StreamingResponse:
        """GET /api/events.

        Args:
            names: of the runs whose metrics the listener wants to hear about.

        Raises:
            ApiError: too many listen, or the server ends.
        """
        if self._closed:
            raise ApiError(503, "The server is shutting down: connect again in a while.", headers={"Retry-After": "5"})
        if len(self._listeners) >= _MOST_LISTENERS:
            raise ApiError(
                503, f"{_MOST_LISTENERS} pages listen already: close some, and reload this one.", headers={"Retry-After": "30"}
            )
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _EventStream(self._listen(_Listener(names)), headers)

    async def close(self) -> None:
        """End all streams, and stop watching."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
        await self._stop()

    async def _listen(self, listener: _Listener) -> AsyncGenerator[bytes, None]:
        self._listeners.add(listener)
        try:
            if self._watching is None:
                self._first_look = asyncio.Event()
                self._watching = asyncio.create_task(self._watch(self._first_look))
            await self._first_look.wait()  # so that nothing between the listener's own look and ours is missed
            async for part in listener.stream():
                yield part
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._cancel()

    def _cancel(self) -> asyncio.Task[None] | None:
        task, self._watching = self._watching, None
        if task is not None:
            task.cancel()
        self._first_look.set()
        return task

    async def _stop(self) -> None:
        if (task := self._cancel()) is not None:
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, first_look: asyncio.Event) -> None:
        while True:
            try:
                now = await self._in_thread(self._store.summaries)
                if first_look.is_set():
                    self._report_runs(now)
                self._seen = now
                first_look.set()
                await self._report_metrics()
            except Exception:  # a defect of ours: the streams go on, and somebody can read about it
                _log.exception("The runs could not be looked at; it is tried again.")
            await asyncio.sleep(_EVERY)

    def _report_runs(self, now: dict[str, RunSummary]) -> None:
        before = self._seen
        for name, summary in reversed(now.items()):  # the newest last, as it happened
            if before.get(name) != summary:
                self._tell("run", name, vars(summary))
        for name in before.keys() - now.keys():
            self._tell("gone", name, {"name": name})

    def _tell(self, event: str, name: str, data: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.put(event, name, data)

    async def _report_metrics(self) -> None:
        for name in frozenset().union(*(listener.names for listener in self._listeners)):
            version = await self._in_thread(partial(self._store.metrics_version, name))
            for listener in self._listeners:
                before = listener.versions.get(name)
                if name not in listener.names or version is None or version == before:
                    continue
                listener.versions[name] = version
                reset = before is not None and before[1] != version[1]
                listener.put("metrics", name, {"run": name, "version": version[0], "reset": reset})
