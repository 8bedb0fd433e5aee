"""What is asked for: the JSON of OpenAI's completions and chat, with vLLM's further fields, and two of our own.

A field that is not known is ignored; one that is known and would change the text, but is not supported, is refused: a client
that asks for JSON by a grammar must not get something else. Each field is a row of a table, and its reader says what it wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from onym.data.conversations import Message
from onym.format.manifest import is_text
from onym.generation.engine import MOST_LOGPROBS
from onym.generation.sampling import Sampling
from onym.serve.errors import ApiError

MOST_TEXTS = 128
"""Prompts times n of one request."""
MOST_STOPS = 4
MOST_STOP_CHARACTERS = 1000
MOST_NAME_CHARACTERS = 300
MOST_TOKENS = 32_768
"""Of a text that is longer than the context."""

_SAMPLING = Sampling(temperature=1.0)  # as OpenAI's

Prompt = str | list[int]


@dataclass(frozen=True)
class Asked:
    """What both kinds of requests have in common."""

    model: str | None = None
    max_tokens: int | None = None
    """None: what is left of the context."""
    sampling: Sampling = _SAMPLING
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    return_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass(frozen=True)
class Completion(Asked):
    """``/v1/completions``."""

    prompt: Sequence[Prompt] = ("",)
    logprobs: int | None = None
    """How many of the likeliest tokens; None for no log-probabilities at all."""
    echo: bool = False
    slide: bool = False
    """Ours: the text may be longer than the context; the model sees the last part of it."""


@dataclass(frozen=True)
class ChatCompletion(Asked):
    """``/v1/chat/completions``."""

    messages: Sequence[Message] = ()
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


class _Wrong(Exception):
    """What a field has to be."""


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON has one kind of numbers
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Wrong(f"a whole number from {low} to {high}")
        return value

    return read


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not good or (above and value == low):
            raise _Wrong(f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}")
        return float(value)

    return read


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("a text")
    return value


def _model(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MOST_NAME_CHARACTERS:
        raise _Wrong(f"a name of 1 to {MOST_NAME_CHARACTERS} characters, of those that GET /v1/models lists")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(stop, str) for stop in stops)
    if not good or not all(0 < len(stop) <= MOST_STOP_CHARACTERS for stop in stops):
        raise _Wrong(f"a text or up to {MOST_STOPS} of them, of 1 to {MOST_STOP_CHARACTERS} characters each")
    return tuple(stops)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise _Wrong("a list of token ids")
    return value


def _bias(value: Any) -> dict[int, float]:
    try:
        bias = {int(token): float(number) for token, number in value.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        bias = {-1: math.nan}
    if not all(token >= 0 and abs(number) <= 100 for token, number in bias.items()):
        raise _Wrong('an object of token ids with numbers from -100 to 100, as {"50256": -100}')
    return bias


def _prompts(value: Any) -> list[Prompt]:
    wrong = _Wrong(f"a text, a list of token ids, or a list of 1 to {MOST_TEXTS} of either")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong
    if all(type(each) is int for each in value):
        return [value]
    if len(value) > MOST_TEXTS:
        raise wrong
    for each in value:
        if not isinstance(each, str) and not (isinstance(each, list) and each and all(type(i) is int for i in each)):
            raise wrong
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Wrong('a list of at least one message, as [{"role": "user", "content": "Hello"}]')
    return [_message(each) for each in value]


def _message(value: Any) -> Message:
    role = value.get("role") if isinstance(value, dict) else None
    if role == "developer":  # what OpenAI calls it since 2024
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise _Wrong("messages of the roles system, user and assistant")
    content = value.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise _Wrong("messages whose content is text")
    if not is_text(content):
        raise _Wrong("messages whose content is valid UTF-8 text")
    return Message(str(role), content)


def _stream_options(value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise _Wrong('an object, as {"include_usage": true}')
    return {name: option is True for name, option in value.items()}


Table = Mapping[str, Callable[[Any], Any]]

_COMMON: Table = {
    "model": _model,
    "max_tokens": _integer(0, 10**18),  # whether the context holds so many is for the model to say
    "temperature": _number(0, 100),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(-1, 10**9),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),  # far below, logits are no finite numbers any more
    "presence_penalty": _number(-100, 100),
    "frequency_penalty": _number(-100, 100),
    "logit_bias": _bias,
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stops,
    "stop_token_ids": _ids,
    "ignore_eos": _boolean,
    "n": _integer(1, MOST_TEXTS),
    "stream": _boolean,
    "stream_options": _stream_options,
    "return_token_ids": _boolean,
}
_COMPLETION: Table = {
    **_COMMON,
    "prompt": _prompts,
    "logprobs": _integer(0, MOST_LOGPROBS),
    "echo": _boolean,
    "slide": _boolean,
}
_CHAT: Table = {
    **_COMMON,
    "messages": _messages,
    "max_completion_tokens": _integer(1, 10**18),
    "logprobs": _boolean,
    "top_logprobs": _integer(0, MOST_LOGPROBS),
}
_NOT_SUPPORTED: Mapping[str, Collection[Any]] = {
    # with the values that ask for nothing
    "best_of": (1,),
    "suffix": ("",),
    "min_tokens": (0,),
    "typical_p": (1, 1.0),
    "length_penalty": (1, 1.0),
    "mirostat": (0,),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "grammar": ("",),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")


def read_completion(body: Mapping[str, Any], unknown: Callable[[str], None]) -> Completion:
    """A request for texts.

    Args:
        body: the JSON.
        unknown: called with each field that is ignored.

    Raises:
        ApiError: a field is not what it has to be, or is not supported.
    """
    asked = Completion(**_read(body, _COMPLETION, unknown))
    if len(asked.prompt) * asked.n > MOST_TEXTS:
        raise _refused("n", f"n times the prompts must be at most {MOST_TEXTS}, not {len(asked.prompt) * asked.n}")
    if asked.max_tokens == 0 and not asked.echo:
        raise _refused("max_tokens", "max_tokens must be at least 1; 0 is for scoring a prompt, with echo and logprobs")
    return asked


def read_chat(body: Mapping[str, Any], unknown: Callable[[str], None]) -> ChatCompletion:
    """A request for a reply; as :func:`read_completion`."""
    values = _read(body, _CHAT, unknown)
    if "messages" not in values:
        raise _refused("messages", "messages is missing: the conversation so far")
    asked = ChatCompletion(**values)
    if asked.top_logprobs and not asked.logprobs:
        raise _refused("top_logprobs", "top_logprobs needs logprobs: true")
    if asked.max_tokens == 0:
        raise _refused("max_tokens", "max_tokens must be at least 1")
    return asked


def read_tokenize(body: Mapping[str, Any]) -> tuple[str | None, str]:
    """A model's name, and a text."""
    values = _read(body, {"model": _model, "prompt": _text}, lambda _: None)
    if "prompt" not in values:
        raise _refused("prompt", "prompt is missing: the text")
    return values.get("model"), values["prompt"]


def read_detokenize(body: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """A model's name, and token ids."""
    values = _read(body, {"model": _model, "tokens": _ids}, lambda _: None)
    if "tokens" not in values:
        raise _refused("tokens", "tokens is missing: a list of token ids")
    return values.get("model"), values["tokens"]


def _read(body: Mapping[str, Any], table: Table, unknown: Callable[[str], None]) -> dict[str, Any]:
    values = {}
    for name, value in body.items():
        if name in table:
            if value is not None:
                values[name] = _read_value(name, value, table[name])
        elif name in _NOT_SUPPORTED:
            if value is not None and value not in _NOT_SUPPORTED[name]:
                raise _refused(name, f"{name} is not supported here, and would change the text: leave it out")
        elif name not in _IGNORED:
            unknown(name)
    given = {each.name: values.pop(each.name) for each in fields(Sampling) if each.name in values}
    if given.get("top_k") == -1:  # vLLM's word for all of them
        given["top_k"] = 0
    return {**values, "sampling": replace(_SAMPLING, **given)} if given else values


def _read_value(name: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except _Wrong as wrong:
        shown = repr(value)
        raise _refused(name, f"{name} must be {wrong}, not {shown if len(shown) <= 60 else shown[:60] + '…'}") from None


def _refused(name: str, reason: str) -> ApiError:
    return ApiError(400, f"{reason}.", param=name)
