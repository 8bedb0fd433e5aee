"""The process: a socket, the event loop, and how it ends.

bind -> answer -> load the models -> ready -> SIGTERM -> no new texts, a while for those under way -> the end
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from onym.errors import ConfigError, RunError
from onym.serve.answers import SLOW_SECONDS
from onym.serve.app import Service, make_app
from onym.serve.errors import ApiError, error_response
from onym.serve.guard import HEADERS, Access
from onym.serve.models import Models, Opening, Source
from onym.serve.runs import RunsApi
from onym.serve.worker import Worker

HEADER_SECONDS = 30.0
"""In which a request's headers have to arrive."""
_KEEP_ALIVE_SECONDS = 30
_CLOSING_SECONDS = 3  # for answers under way that are not texts


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and to whom."""

    sources: Mapping[str, Source]
    runs: Path | None = None
    """A folder of runs."""
    run: Path | None = None
    """A run whose page is shown, where no folder is."""
    opening: Opening = field(default_factory=Opening)
    access: Access = field(default_factory=Access)
    queue_length: int = 32
    grace_seconds: float = 30.0
    follow: bool = False


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the port is taken, or there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"Could not listen at {host}, port {port}: {reason}. Take another --port or --host.") from error
    bound.listen(1024)
    bound.setblocking(False)
    return bound


def serve(options: ServeOptions, bound: socket.socket, ready: Callable[[Models], None]) -> int:
    """Answer until a signal comes.

    Args:
        options: what and to whom.
        bound: see :func:`bind`.
        ready: called when the models are in memory.

    Returns:
        The number of the signal.

    Raises:
        OnymError: a model cannot be loaded, or the GPU failed.
    """
    return asyncio.run(_serve(options, bound, ready))


async def _serve(options: ServeOptions, bound: socket.socket, ready: Callable[[Models], None]) -> int:
    worker = Worker(options.queue_length)
    runs = RunsApi(options.runs, options.run)
    models = Models(worker, options.sources, runs.runs if options.runs is not None else None, options.opening)
    service = Service(worker, models, has_runs=runs.runs is not None)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(service, options.access, runs.routes),
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    server = _Server(config)
    signals = asyncio.Queue[int]()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)

    async def load() -> None:
        await models.open_all(wait_for_steps=options.follow)
        ready(models)
        if options.follow:
            await models.follow()

    listening = asyncio.ensure_future(server.serve(sockets=[bound]))
    loading = asyncio.ensure_future(load())
    stopping = asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait((listening, loading, stopping, worker.broken), return_when=asyncio.FIRST_COMPLETED)
        if not worker.broken.done() and loading.done() and not loading.exception():
            await asyncio.wait((listening, stopping, worker.broken), return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            again = asyncio.ensure_future(signals.get())
            await _drain(service, options.grace_seconds, again)
            again.cancel()
        await runs.close()
        server.should_exit = True
        await listening
        if loading.done():
            loading.result()
        if worker.broken.done():
            said = worker.broken.result()
            raise RunError(f"The GPU failed, and this process cannot use it any more: start the server again. It said: {said}")
        return stopping.result() if stopping.done() else 0
    finally:
        for task in (loading, stopping):
            task.cancel()
        await worker.close()


async def _drain(service: Service, seconds: float, again: asyncio.Future[int]) -> None:
    """Let the texts under way end; a second signal ends them at once."""
    service.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while service.worker.jobs and not again.done():
                await asyncio.wait((again,), timeout=0.05)
    for job in list(service.worker.jobs):
        job.fail(ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"}))
    await asyncio.sleep(0)


class _Server(uvicorn.Server):
    """One that leaves signals to us: uvicorn's own handlers wait for open streams for ever."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


class _Connection(H11Protocol):
    """One that is closed where a request's headers do not arrive, or where nobody reads the answer."""

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self._deadline is None:
            self._await_headers()
        elif not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # One that was only closed would wait for ever to send the rest.
        self._unread = self.loop.call_later(SLOW_SECONDS + _CLOSING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP has an answer as all others have it; uvicorn's own is a plain text."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            error = ApiError(400, "This is no HTTP request, or its headers are larger than 64 KiB.")
            response = error_response(error)
            headers = [*response.raw_headers, (b"connection", b"close")]
            headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            for event in (
                h11.Response(status_code=400, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
