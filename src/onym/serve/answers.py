"""An answer that is written as its tokens come, and given up when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from onym.generation.write import Token
from onym.serve.errors import ApiError, error_response
from onym.serve.json_body import json_bytes_response, to_json
from onym.serve.metrics import Metrics
from onym.serve.texts import Texts
from onym.serve.worker import Job

SLOW_SECONDS = 30.0
"""A client that takes nothing for so long is dropped."""
_LOG = logging.getLogger("onym.serve")
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer:
    """The response to a request for texts: an ASGI app, as each of Starlette's responses is."""

    def __init__(self, texts: Texts, job: Job, metrics: Metrics) -> None:
        self._texts, self._job, self._metrics = texts, job, metrics
        self._began = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SLOW_SECONDS):
                await send(message)

        answer = self._stream if self._texts.asked.stream else self._whole
        writing = asyncio.ensure_future(answer(scope, receive, send_in_time))
        leaving = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self._metrics.cancelled += 1
        finally:
            self._job.cancel()
            for task in (writing, leaving):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
        try:
            await writing
        except asyncio.CancelledError:
            pass
        except TimeoutError:
            self._metrics.dropped += 1
            _LOG.warning("A client read nothing for %.0f seconds, and was dropped.", SLOW_SECONDS)
        self._metrics.request_seconds.observe(time.monotonic() - self._began)
        self._metrics.completion_tokens += self._texts.completion_tokens

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_text: list[list[Token]] = [[] for _ in self._texts.requests]
        try:
            async for tokens in self._tokens():
                for place, token in tokens:
                    of_text[place].append(token)
            body = await asyncio.to_thread(
                lambda: to_json(self._texts.whole(of_text))
            )  # 0.2 s, if it has many log-probabilities
            response: Response = json_bytes_response(body)
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, ending = False, b"data: [DONE]\n\n"
        try:
            async for tokens in self._tokens():
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                    begun = True
                lines = b"".join(_event(chunk) for chunk in self._texts.chunks(tokens))
                if lines:
                    await send({"type": "http.response.body", "body": lines, "more_body": True})
            if self._texts.asked.include_usage:
                ending = _event(self._texts.usage_chunk()) + ending
        except ApiError as error:
            if not begun:
                await error_response(error)(scope, receive, send)
                return
            ending = _event(error.to_dict())
        await send({"type": "http.response.body", "body": ending, "more_body": False})

    async def _tokens(self) -> AsyncIterator[list[tuple[int, Token]]]:
        """What has come, with the place of each text, until all have ended."""
        unfinished, first = len(self._texts.requests), True
        while unfinished:
            tokens = await self._job.tokens()
            if first:
                self._metrics.first_token_seconds.observe(time.monotonic() - self._began)
                first = False
            unfinished -= sum(token.finish is not None for token in tokens)
            yield [(self._job.place(token), token) for token in tokens]


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
