"""The one thread that computes, and what the event loop knows of it.

    submit -> the writer of a model takes it -> a step of each writer that is busy -> tokens -> the job, on the event loop

CUDA graphs and compiled code hold state of their thread, so all of generation is on one. Nothing here blocks the event loop,
and nothing on the event loop makes a text wait: a step hands its tokens over and goes on. What a client does not read waits in
its job, which is as long as the text at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from onym.errors import OnymError, is_out_of_memory
from onym.generation.engine import Request
from onym.generation.write import Token, Writer
from onym.gpt.hardware import is_broken
from onym.serve.errors import ApiError
from onym.serve.threads import result_of

T = TypeVar("T")

_TOGETHER = 0.01
"""Seconds of tokens that are handed over at once, after the first: each time costs the step 20 to 60 microseconds."""
_TURN = 0.001
"""Seconds that the event loop has for a first or last token before the next step begins."""
_LOG = logging.getLogger("onym.serve")


class Job:
    """The texts of one request, on the event loop."""

    def __init__(self, worker: Worker, writer: Writer, texts: int) -> None:
        self._worker, self.writer = worker, writer
        self._tokens: list[Token] = []
        self._failure: ApiError | None = None
        self._something = asyncio.Event()
        self.texts = self.unfinished = texts
        self.numbers: list[int] = []
        """Of each text, the number that its tokens have; empty until the thread has taken the job."""
        self.ended = False
        self.begun = False  # of the thread: it has handed a token over

    async def tokens(self) -> list[Token]:
        """Those that have come since the last call, at least one.

        Raises:
            ApiError: the texts cannot be written to their end.
        """
        await self._something.wait()
        self._something.clear()
        if self._failure is not None:
            raise self._failure
        taken, self._tokens = self._tokens, []
        return taken

    def place(self, token: Token) -> int:
        """Which of the texts a token belongs to."""
        return self.numbers.index(token.request)

    def cancel(self) -> None:
        """Nobody waits for it."""
        self._worker.cancel(self)

    def fail(self, error: ApiError) -> None:
        """End with an error, wherever it is; one that has ended stays as it is."""
        if not self.ended:
            self._failure = error
            self.cancel()
            self._something.set()

    def add(self, token: Token) -> None:
        """A token came."""
        self._tokens.append(token)
        self._something.set()
        if token.finish is not None:
            self.unfinished -= 1
            if not self.unfinished:
                self._worker.end(self)


class Worker:
    """The thread. Made and used on the event loop."""

    def __init__(self, queue_length: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writers: set[Writer] = set()  # of the thread: those that may be busy
        self._of_number: dict[tuple[Writer, int], Job] = {}  # of the thread
        self._handed_over: list[tuple[Job, Token | ApiError]] = []  # of the thread
        self._handed_over_at = 0.0
        self.queue_length = queue_length
        self.jobs: set[Job] = set()
        """Those that have not ended."""
        self.broken: asyncio.Future[str] = self._loop.create_future()
        """Why nothing can be computed in this process any more, once that is so."""
        self._thread = threading.Thread(target=self._run, name="onym-serve", daemon=True)
        self._thread.start()

    # -- on the event loop

    def running_and_waiting(self) -> tuple[int, int]:
        """Texts that are being written, and texts in the queue, of all models."""
        of_writer = Counter[Writer]()
        for job in self.jobs:
            of_writer[job.writer] += job.unfinished
        running = sum(min(texts, writer.engine.slots) for writer, texts in of_writer.items())
        return running, of_writer.total() - running

    def submit(self, writer: Writer, requests: Sequence[Request]) -> Job:
        """Have texts written.

        Raises:
            ApiError: more of them wait already than the queue takes.
        """
        slots = writer.engine.slots
        if len(requests) > slots + self.queue_length:
            raise ApiError(
                400,
                f"The request asks for {len(requests)} texts, and this server writes or queues {slots + self.queue_length} at "
                "once: send fewer prompts, or a smaller n.",
                param="n",
            )
        unfinished = sum(job.unfinished for job in self.jobs if job.writer is writer)
        if unfinished + len(requests) > slots + self.queue_length:
            raise ApiError(
                429,
                f"The queue is full: {self.queue_length} texts wait already. Try again in a second or two.",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        job = Job(self, writer, len(requests))
        self.jobs.add(job)

        def take() -> None:
            if job.ended:
                return
            try:
                job.numbers = writer.submit_all(requests)
            except Exception as error:
                self._hand_over(job, _as_api_error(error))
                return
            self._of_number.update({(writer, number): job for number in job.numbers})
            self._writers.add(writer)

        self._calls.put(take)
        return job

    def cancel(self, job: Job) -> None:
        """Stop writing, within one step; one that has ended already is no mistake."""
        if job.ended:
            return
        self.end(job)

        def forget() -> None:
            for number in job.numbers:
                job.writer.cancel(number)
                self._of_number.pop((job.writer, number), None)

        self._calls.put(forget)

    def end(self, job: Job) -> None:
        """No more tokens come."""
        job.ended = True
        self.jobs.discard(job)

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that the thread runs between two steps."""
        return await result_of(function, self._calls.put)

    async def close(self) -> None:
        """Let the thread end."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, 2)  # it may be compiling

    # -- in the thread

    def _run(self) -> None:
        while self._take_calls():
            for writer in list(self._writers):
                try:
                    self._step(writer)
                except Exception as error:  # of the device, or of weights that are not finite: the other models go on
                    _LOG.exception("A step failed")
                    self._abandon(writer, _as_api_error(error))
                    if is_broken(error):
                        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                            self._loop.call_soon_threadsafe(self._break, str(error).splitlines()[0])
            if not self._writers or time.monotonic() - self._handed_over_at > _TOGETHER:
                waited_for = self._handed_over_at == 0.0
                self._flush()
                if waited_for and self._writers:  # a compiled step holds the GIL to its end
                    time.sleep(_TURN)

    def _break(self, reason: str) -> None:
        if not self.broken.done():
            self.broken.set_result(reason)

    def _take_calls(self) -> bool:
        """Run what was asked for; wait for it where there is nothing to write. False at the end."""
        while True:
            try:
                call = self._calls.get(block=not self._writers)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _step(self, writer: Writer) -> None:
        if not writer.busy:
            self._writers.discard(writer)
            return
        for token in writer.step():
            key = (writer, token.request)
            job = self._of_number.pop(key) if token.finish is not None else self._of_number[key]
            self._handed_over.append((job, token))
            if token.finish is not None or not job.begun:  # these are waited for
                job.begun, self._handed_over_at = True, 0.0
        if not writer.busy:
            self._writers.discard(writer)

    def _abandon(self, writer: Writer, error: ApiError) -> None:
        self._writers.discard(writer)
        for key, job in list(self._of_number.items()):
            if key[0] is writer:
                writer.cancel(key[1])
                del self._of_number[key]
                self._hand_over(job, error)

    def _hand_over(self, job: Job, what: Token | ApiError) -> None:
        self._handed_over.append((job, what))
        self._flush()

    def _flush(self) -> None:
        if self._handed_over:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody listens
                self._loop.call_soon_threadsafe(_deliver, self._handed_over)
            self._handed_over = []
        self._handed_over_at = time.monotonic()


def _deliver(pieces: Sequence[tuple[Job, Token | ApiError]]) -> None:
    for job, piece in pieces:
        if job.ended:
            continue
        if isinstance(piece, ApiError):
            job.fail(piece)
        else:
            job.add(piece)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, OnymError):
        return ApiError(500, str(error))
    if is_out_of_memory(error):
        return ApiError(
            503, "The server is out of memory for this: ask for less at once, or try again later.", headers={"Retry-After": "5"}
        )
    return ApiError(500, f"The model failed ({type(error).__name__}); the server's log says more.")
