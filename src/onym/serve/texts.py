"""Texts as OpenAI's clients read them: from tokens to the JSON of an answer, whole or in chunks.

A request becomes :class:`Texts`: what the engine is to write, and how its tokens are shown. In what completions and chat
differ is in the two subclasses.
"""

from __future__ import annotations

import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onym.data.tokenizer import Decoding, Tokenizer
from onym.errors import ConfigError
from onym.generation.engine import Request
from onym.generation.write import Token, prompt_ids
from onym.serve.errors import ApiError
from onym.serve.models import ServedModel
from onym.serve.protocol import MOST_TOKENS, Asked, ChatCompletion, Completion, Prompt

Best = Sequence[tuple[int, float]]
Shown = tuple[int, float | None, Best]
"""A token, its log-probability (None of the first one of a prompt), and the likeliest ones in its place."""


class Texts(ABC):
    """What one request asks for.

    Raises:
        ApiError: it does not fit the model.
    """

    prefix = ""
    kind = ""

    def __init__(self, asked: Asked, model: ServedModel, prompts: Sequence[list[int]]) -> None:
        self.asked, self.model, self.prompts = asked, model, prompts
        self.seed = random.SystemRandom().randrange(2**32) if asked.seed is None else asked.seed % 2**63
        self.completion_tokens = 0
        self.requests = [
            self._request(ids, self.seed + number * asked.n + sample)
            for number, ids in enumerate(prompts)
            for sample in range(asked.n)
        ]
        known = model.writer.engine.vocab_size
        for name, ids in (("logit_bias", asked.logit_bias or ()), *(("prompt", prompt) for prompt in prompts)):
            if (unknown := next((token for token in ids if not 0 <= token < known), None)) is not None:
                raise ApiError(400, f"{name} has token {str(unknown)[:20]}: this model's ids are below {known}.", param=name)
        self._about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model.name,
            "seed": self.seed,
        }
        self._written = [0] * len(self.requests)  # code points of each text
        self._begun = [False] * len(self.requests)

    # -- what an answer is

    def whole(self, tokens: Sequence[Sequence[Token]]) -> dict[str, Any]:
        """The answer, of the tokens of each text."""
        choices = [self.choice(place, of_text, chunk=False) for place, of_text in enumerate(tokens)]
        return {**self._about, "choices": choices, "usage": self.usage()}

    def chunks(self, tokens: Iterable[tuple[int, Token]]) -> Iterator[dict[str, Any]]:
        """Chunks of a stream, of tokens with the place of their text: one for each text that goes on."""
        of_text: dict[int, list[Token]] = {}
        for place, token in tokens:
            of_text.setdefault(place, []).append(token)
        for place, new in of_text.items():
            choice = self.choice(place, new, chunk=True)
            if self.says_something(choice):
                yield {**self._about, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last one, where it was asked for."""
        return {**self._about, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once, however many texts continue it."""
        read = sum(map(len, self.prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.completion_tokens,
            "total_tokens": read + self.completion_tokens,
        }

    @abstractmethod
    def choice(self, place: int, tokens: Sequence[Token], *, chunk: bool) -> dict[str, Any]:
        """One text, or what is new of it."""

    def says_something(self, choice: dict[str, Any]) -> bool:
        """Whether a chunk is worth sending."""
        return bool(
            choice["finish_reason"]
            or choice.get("text")
            or choice.get("delta")
            or choice["logprobs"]
            or choice.get("token_ids")
        )

    # -- what the engine writes

    @abstractmethod
    def _request(self, ids: list[int], seed: int) -> Request: ...

    def _tokens_left(self, ids: list[int], wanted: int | None, *, slide: bool = False) -> int:
        """How many tokens to write at most."""
        context = self.model.context
        left = context - len(ids)
        if wanted is None and (left > 0 or slide):
            return left if left > 0 else context
        if slide and wanted is not None:
            if wanted > MOST_TOKENS:
                raise ApiError(400, f"max_tokens must be at most {MOST_TOKENS:,}, not {wanted:,}.", param="max_tokens")
            return wanted
        if wanted is None or wanted > left:
            raise ApiError(
                400,
                f"The model's context is {context:,} tokens, and the request needs {len(ids) + (wanted or 1):,}: {len(ids):,} "
                f"for the prompt and {wanted or 1:,} for the text. Shorten the prompt, or lower max_tokens.",
                param="prompt" if left <= 0 else "max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    def _arguments(self, ids: list[int], seed: int, most: int, ends: Iterable[int]) -> dict[str, Any]:
        asked = self.asked
        return {
            "prompt": ids,
            "max_new_tokens": most,
            "sampling": asked.sampling,
            "seed": seed % 2**63,
            "stop": tuple(asked.stop),
            "stop_ids": frozenset((*(() if asked.ignore_eos else ends), *asked.stop_token_ids)),
            "logit_bias": asked.logit_bias or {},
        }

    def _ids_of(self, tokens: Sequence[Token], place: int, *, chunk: bool) -> dict[str, Any]:
        if not self.asked.return_token_ids:
            return {}
        first = not chunk or not self._begun[place]
        prompt = {"prompt_token_ids": self.prompts[place // self.asked.n]} if first else {}
        return {**prompt, "token_ids": [token.id for token in tokens if token.id is not None]}


class CompletionTexts(Texts):
    """``/v1/completions``."""

    prefix, kind = "cmpl", "text_completion"
    asked: Completion

    def __init__(self, asked: Completion, model: ServedModel) -> None:
        super().__init__(asked, model, [_ids(model.tokenizer, prompt) for prompt in asked.prompt])

    def _request(self, ids: list[int], seed: int) -> Request:
        asked = self.asked
        most = self._tokens_left(ids, asked.max_tokens or (1 if asked.max_tokens == 0 else None), slide=asked.slide)
        scored = asked.echo and asked.logprobs is not None
        if scored and len(ids) > self.model.context:
            raise ApiError(
                400,
                f"echo with logprobs scores the whole prompt, which has {len(ids):,} tokens; the context is "
                f"{self.model.context:,}: shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        how = self._arguments(ids, seed, most, (self.model.tokenizer.end_of_text,))
        return Request(**how, logprobs=asked.logprobs or 0, prompt_logprobs=scored)

    def choice(self, place: int, tokens: Sequence[Token], *, chunk: bool) -> dict[str, Any]:
        asked = self.asked
        ids = self._ids_of(tokens, place, chunk=chunk)
        first = not self._begun[place]
        self._begun[place] = True
        finish = tokens[-1].finish
        if asked.max_tokens == 0:
            scores, best_of_prompt = _of_prompt(tokens)
            tokens = [Token("", None, 0.0, prompt_logprobs=scores, prompt_best=best_of_prompt)]
            finish = "length"
        text, shown, pieces = "", list[Shown](), list[str]()
        if asked.echo and first:
            of_prompt = self.prompts[place // asked.n]
            pieces = _pieces(self.model.tokenizer, of_prompt)
            text = "".join(pieces)
            scores, best_of_prompt = _of_prompt(tokens)
            if scores is not None:
                likeliest = best_of_prompt or ((),) * len(scores)
                follow = zip(of_prompt[1:], scores, likeliest, strict=True)
                shown = [
                    (of_prompt[0], None, ()),
                    *((number, score, _with(best, number, score)) for number, score, best in follow),
                ]
        for token in tokens:
            number = token.id if token.id is not None else token.stop_id
            if number is not None:
                shown.append((number, token.logprob, _with(token.best, number, token.logprob)))
                pieces.append(token.text)
            text += token.text
            self.completion_tokens += token.id is not None
        start = self._written[place]
        self._written[place] += len(text)
        logprobs_shown = None if asked.logprobs is None else self._logprobs(shown, pieces, start)
        return {"index": place, "text": text, "logprobs": logprobs_shown, "finish_reason": finish, **ids}

    def _logprobs(self, shown: Sequence[Shown], pieces: Sequence[str], start: int) -> dict[str, Any] | None:
        if not shown:
            return None
        tokenizer, offsets = self.model.tokenizer, list[int]()
        for piece in pieces:
            offsets.append(start)
            start += len(piece)
        return {
            "tokens": [token_text(tokenizer, number) for number, _, _ in shown],
            "token_logprobs": [logprob for _, logprob, _ in shown],
            "top_logprobs": [_named(tokenizer, best) if best else None for _, _, best in shown],
            "text_offset": offsets,
            "token_ids": [number for number, _, _ in shown],
            "top_token_ids": [[number for number, _ in best] for _, _, best in shown],
        }


class ChatTexts(Texts):
    """``/v1/chat/completions``."""

    prefix, kind = "chatcmpl", "chat.completion"
    asked: ChatCompletion

    def __init__(self, asked: ChatCompletion, model: ServedModel) -> None:
        if model.template is None:
            raise ApiError(
                404,
                f"The model {model.name!r} has no chat template: it was not taught to converse. Use /v1/completions, or start "
                "the server with --chat-template.",
                code="no_chat_template",
            )
        self.template = model.template
        try:
            prompt = self.template.prompt(asked.messages)
        except ConfigError as error:
            raise ApiError(400, str(error), param="messages") from error
        super().__init__(asked, model, [prompt])
        if asked.stream:
            self._about["object"] = "chat.completion.chunk"

    def _request(self, ids: list[int], seed: int) -> Request:
        asked = self.asked
        most = self._tokens_left(ids, asked.max_completion_tokens or asked.max_tokens)
        return Request(**self._arguments(ids, seed, most, self.template.stop_ids), logprobs=asked.top_logprobs)

    def choice(self, place: int, tokens: Sequence[Token], *, chunk: bool) -> dict[str, Any]:
        ids = self._ids_of(tokens, place, chunk=chunk)
        text = "".join(token.text for token in tokens)
        self.completion_tokens += sum(token.id is not None for token in tokens)
        shown = None
        if self.asked.logprobs:
            shown = {"content": [self._logprob(token) for token in tokens if token.id is not None]}
        message: dict[str, Any] = {"content": text} if text or not chunk else {}
        if not chunk or not self._begun[place]:
            message = {"role": "assistant", **message}
        self._begun[place] = True
        key = "delta" if chunk else "message"
        return {"index": place, key: message, "logprobs": shown, "finish_reason": tokens[-1].finish, **ids}

    def says_something(self, choice: dict[str, Any]) -> bool:
        return super().says_something({**choice, "logprobs": choice["logprobs"] and choice["logprobs"]["content"]})

    def _logprob(self, token: Token) -> dict[str, Any]:
        assert token.id is not None
        shown = self._one(token.id, token.logprob)
        return {**shown, "top_logprobs": [self._one(number, logprob) for number, logprob in token.best]}

    def _one(self, number: int, logprob: float) -> dict[str, Any]:
        text = self.model.tokenizer.decode([number])
        of_token = None if "\ufffd" in text else list(text.encode())
        return {"token": token_text(self.model.tokenizer, number), "logprob": logprob, "bytes": of_token}


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """A token as text; one that is a part of a character only is named by its id, as vLLM does."""
    text = tokenizer.decode([number])
    return f"token_id:{number}" if "\ufffd" in text else text


def _with(best: Best, number: int, logprob: float) -> Best:
    """The likeliest tokens, and the one that is there where it is none of them, as OpenAI lists them."""
    return best if not best or any(number == each for each, _ in best) else (*best, (number, logprob))


def _named(tokenizer: Tokenizer, best: Best) -> dict[str, float]:
    """The likeliest tokens by their texts, in descending order; two of the same text are named by their ids."""
    named: dict[str, float] = {}
    for number, logprob in best:
        text = token_text(tokenizer, number)
        named[f"token_id:{number}" if text in named else text] = logprob
    return named


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token of a prompt adds to its text; together, what they decode to."""
    decoding = Decoding(tokenizer)
    pieces = [decoding.add(number) for number in ids]
    pieces[-1] += decoding.rest()
    return pieces


def _of_prompt(tokens: Sequence[Token]) -> tuple[tuple[float, ...] | None, tuple[tuple[tuple[int, float], ...], ...]]:
    first = next((token for token in tokens if token.prompt_logprobs is not None), None)
    return (first.prompt_logprobs, first.prompt_best) if first else (None, ())


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    try:
        return prompt_ids(tokenizer, prompt)
    except ConfigError as error:
        raise ApiError(400, str(error), param="prompt") from error
