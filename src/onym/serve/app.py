"""The paths of the server and what each answers; no path computes anything itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onym.serve.answers import Answer
from onym.serve.errors import ApiError, error_response
from onym.serve.guard import Access, Guard, read_json
from onym.serve.json_body import json_response
from onym.serve.metrics import CONTENT_TYPE, Metrics
from onym.serve.models import Models
from onym.serve.protocol import read_chat, read_completion, read_detokenize, read_tokenize
from onym.serve.texts import ChatTexts, CompletionTexts, Texts
from onym.serve.worker import Worker

PAGE = Path(__file__).parent / "page"
_LOG = logging.getLogger("onym.serve")


class Service:
    """What the paths share.

    Args:
        worker: the thread that computes.
        models: what is served.
        has_runs: whether there is a page of runs.
    """

    def __init__(self, worker: Worker, models: Models, *, has_runs: bool) -> None:
        self.worker, self.models, self.has_runs = worker, models, has_runs
        self.metrics = Metrics()
        self.draining = False
        """Whether the server is about to stop, and takes no new texts."""
        self._reported: set[str] = set()

    # -- texts

    async def completions(self, request: Request) -> ASGIApp:
        """``POST /v1/completions``."""
        asked = read_completion(await self._body(request), self._ignored)
        return self._answer(await asyncio.to_thread(CompletionTexts, asked, await self.models.get(asked.model)))

    async def chat(self, request: Request) -> ASGIApp:
        """``POST /v1/chat/completions``."""
        asked = read_chat(await self._body(request), self._ignored)
        return self._answer(await asyncio.to_thread(ChatTexts, asked, await self.models.get(asked.model)))

    async def _body(self, request: Request) -> dict[str, object]:
        self._require_open()
        return await read_json(request)

    def _require_open(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})

    def _answer(self, texts: Texts) -> Answer:
        self._require_open()  # it may have begun to stop while the model was opened
        job = self.worker.submit(texts.model.writer, texts.requests)
        self.metrics.prompt_tokens += sum(map(len, texts.prompts))
        return Answer(texts, job, self.metrics)

    def _ignored(self, name: str) -> None:
        name = name[:60]
        if len(self._reported) < 100 and name not in self._reported:
            self._reported.add(name)
            _LOG.warning("A client sends %r, which this server does not know: it is ignored.", name)

    # -- models and their tokens

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": await self.models.listed()})

    async def show_model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = request.path_params["name"]
        found = next((each for each in await self.models.listed() if each["id"] == name), None)
        if found is None:
            raise ApiError(404, f"There is no model {name[:100]!r}: GET /v1/models lists them.", code="model_not_found")
        return json_response(found)

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        name, text = read_tokenize(await read_json(request))
        model = await self.models.get(name)
        tokenizer = model.tokenizer
        special = {**tokenizer.special_tokens, tokenizer.end_of_text_token: tokenizer.end_of_text}
        if text in special:  # lm-eval asks so for the id of the token that ends a text; within a text its name is text
            tokens = [special[text]]
        else:
            (tokens,) = await asyncio.to_thread(tokenizer.encode_batch, [_as_utf8(text)])  # without the GIL
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": model.context})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        name, tokens = read_detokenize(await read_json(request))
        tokenizer = (await self.models.get(name)).tokenizer
        unknown = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
        if unknown is not None:
            raise ApiError(400, f"There is no token {str(unknown)[:20]}: ids are below {tokenizer.vocab_size}.", param="tokens")
        return json_response({"prompt": tokenizer.decode(tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        """``GET /tokenizer_info``."""
        model = await self.models.get(request.query_params.get("model"))
        special = {"eos_token": model.tokenizer.end_of_text_token, "bos_token": None, "pad_token": None}
        if model.template is not None:
            special |= {**model.template.special, "chat_template": model.template.source}
        return json_response({"vocab_size": model.tokenizer.vocab_size, "max_model_len": model.context, **special})

    # -- the server itself

    async def health(self, request: Request) -> Response:
        """``GET /health``: it lives."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: it takes texts now."""
        self._require_open()
        if not self.models.ready:
            raise ApiError(503, "The model is being loaded.", headers={"Retry-After": "2"})
        return json_response({"status": "ready"})

    async def prometheus(self, request: Request) -> Response:
        """``GET /metrics``."""
        running, waiting = self.worker.running_and_waiting()
        return PlainTextResponse(self.metrics.text(running=running, waiting=waiting), media_type=CONTENT_TYPE)

    async def write_page(self, request: Request) -> Response:
        """``GET /``: the page to write in, or where there is no model, that of the runs."""
        if not self.models.any and self.has_runs:
            return RedirectResponse("/runs")
        return _page("write.html")

    async def runs_page(self, request: Request) -> Response:
        """``GET /runs``."""
        if not self.has_runs:
            raise ApiError(404, "This server shows no runs: start it with a run, or a folder of runs.")
        return _page("runs.html")


def make_app(service: Service, access: Access, further: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The whole app.

    Args:
        service: what answers.
        access: who may ask.
        further: routes of runs.
    """
    paths: list[tuple[str, str, Callable[[Request], Awaitable[ASGIApp]]]] = [
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat),
        ("GET", "/v1/models", service.list_models),
        ("GET", "/v1/models/{name:path}", service.show_model),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/detokenize", service.detokenize),
        ("GET", "/tokenizer_info", service.tokenizer_info),
        ("GET", "/health", service.health),
        ("GET", "/ready", service.ready),
        ("GET", "/metrics", service.prometheus),
        ("GET", "/", service.write_page),
        ("GET", "/runs", service.runs_page),
    ]
    routes: list[BaseRoute] = [Route(path, answer, methods=[method]) for method, path, answer in paths]
    routes += [*further, Mount("/page", StaticFiles(directory=PAGE))]
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},  # type: ignore[dict-item]
    )
    known = {path for _, path, _ in paths}
    return _counted(Guard(app, access), service.metrics, known)


def _counted(app: ASGIApp, metrics: Metrics, known: set[str]) -> ASGIApp:
    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in known else "other"
                metrics.requests[path, message["status"]] += 1
            await send(message)

        await app(scope, receive, counting)

    return counted


async def _api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:100]
    message = {
        404: f"There is nothing at {path!r}: docs/serving.md lists the paths.",
        405: f"{request.method} is not what {path!r} answers.",
    }.get(error.status_code, f"{error.detail}.")
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _failure(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(ApiError(500, f"The server failed ({type(error).__name__}); its log says more."))


def _page(name: str) -> Response:
    return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})


def _as_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "prompt is not valid UTF-8 text.", param="prompt") from None
    return text
