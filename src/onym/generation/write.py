"""Texts from a model: ``onym.generate``, and what the command and the server build on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.generation.engine import Engine, Finish, Request
from onym.generation.opening import model_and_tokenizer
from onym.generation.sampling import Sampling
from onym.generation.text import Text
from onym.generation.ways import Compile, Dtype
from onym.gpt.causal_lm import CausalLM


@dataclass(frozen=True)
class Token:
    """A token of a text; printing the texts of all of them prints the text."""

    text: str
    """What became certain with it: nothing while a character, or what may be a stop string, is incomplete."""
    id: int | None
    """None where the text ends with a stop token, which is not part of it."""
    logprob: float
    """In nats, of the model's own logits: before temperature, penalties and biases."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens instead of it and their log-probabilities, if asked for."""
    finish: Finish | None = None
    """With the last one: ``"stop"`` or ``"length"``."""
    request: int = 0
    """Of several texts, whose it is."""
    prompt_logprobs: tuple[float, ...] | None = None
    """With the first one, if asked for: of the prompt's tokens from the second on."""
    prompt_best: tuple[tuple[tuple[int, float], ...], ...] = ()
    """With these, the likeliest tokens in each place."""
    stop_id: int | None = None
    """The stop token that ended the text, with the last one."""


def generate(
    model: CausalLM | str | Path,
    prompt: str | Sequence[int] = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    seed: int | None = None,
    logprobs: int = 0,
    tokenizer: Tokenizer | str | Path | None = None,
    dtype: Dtype = "auto",
    compile: Compile = "auto",  # as in every command
    device: str | torch.device = "cpu",
) -> Iterator[Token]:
    """Continue a text.

    >>> for token in onym.generate("runs/first", "def main():", seed=1):  # doctest: +SKIP
    ...     print(token.text, end="", flush=True)

    Args:
        model: a :class:`onym.GPT` or :class:`onym.Decoder`, or where one is: a run, a checkpoint, a file or folder of Onym's or
            another program's. It is put into evaluation mode. Its weights are copied for decoding, so changes that follow are
            not seen.
        prompt: text, or token ids. Without any text: a new document. Of one longer than the context, the last tokens are read.
        max_new_tokens: when to stop at the latest.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see
            :class:`onym.generation.sampling.Sampling`.
        logit_bias: added to the logits of these tokens.
        stop: end before the first of these strings.
        stop_ids: end before one of these tokens; by default the end of a document.
        seed: for the same text again.
        logprobs: how many of the likeliest tokens to report with each one, up to 20.
        tokenizer: where the model has none beside it.
        dtype: of the weights: ``"auto"``, ``"fp32"``, ``"bf16"``, or ``"int8"``, which rounds them.
        compile: ``"auto"``: where it was measured to be faster and pays; ``"on"``, ``"off"``.
        device: where to put a model that is opened.

    Raises:
        OnymError: the model or its tokenizer cannot be opened, or a value is out of range; before the first token.
    """
    model, known = model_and_tokenizer(model, tokenizer, device)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = prompt_ids(known, prompt)
    request = Request(
        ids,
        max_new_tokens,
        sampling,
        seed,
        stops,
        (known.end_of_text,) if stop_ids is None else stop_ids,
        logprobs,
        logit_bias=logit_bias or {},
    )
    capacity = len(ids) + max(max_new_tokens, 1)
    engine = Engine(model.eval(), dtype=dtype, compile=compile, capacity=capacity, expected_tokens=max_new_tokens)
    return write(engine, known, [request])


def write(engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request]) -> Iterator[Token]:
    """Write texts side by side, to the end of each.

    Args:
        engine: which has nothing else to do.
        requests: one a text; :attr:`Token.request` is its place here.

    Raises:
        ConfigError: a request is out of range; before the first token.
    """
    writer = Writer(engine, tokenizer)
    return _written(writer, writer.submit_all(requests))


class Writer:
    """Writes texts with an engine that nobody else uses; requests come and go between two steps."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._texts: dict[int, Text] = {}

    def submit_all(self, requests: Sequence[Request]) -> list[int]:
        """The number of each; :attr:`Token.request` of its tokens. See :meth:`Engine.submit_all`."""
        numbers = self.engine.submit_all(requests)
        for number, request in zip(numbers, requests, strict=True):
            self._texts[number] = Text(self._tokenizer, request.stop)
        return numbers

    def cancel(self, number: int) -> None:
        """Forget a request, waiting or under way; one that has ended already is no mistake."""
        self.engine.cancel(number)
        self._texts.pop(number, None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to write."""
        return self.engine.busy

    def step(self) -> list[Token]:
        """What one step of the engine gives."""
        tokens = []
        for event in self.engine.step():
            text = self._texts[event.request]
            finish, piece = event.finish, "" if event.token is None else text.add(event.token)
            if text.stopped:
                finish = "stop"
            elif finish is not None:
                piece += text.rest()
                finish = "stop" if text.stopped else finish
            if finish is not None:
                self.cancel(event.request)
            tokens.append(
                Token(
                    piece,
                    event.token,
                    event.logprob,
                    event.best,
                    finish,
                    event.request,
                    event.prompt_logprobs,
                    event.prompt_best,
                    event.stop_id,
                )
            )
        return tokens


def _written(writer: Writer, numbers: Sequence[int]) -> Iterator[Token]:
    places = {number: place for place, number in enumerate(numbers)}
    try:
        while writer.busy:
            for token in writer.step():
                yield replace(token, request=places[token.request])
    finally:
        for number in numbers:
            writer.cancel(number)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a prompt; of an empty text, the token that a new document follows.

    Raises:
        ConfigError: it is not valid UTF-8 text.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("The prompt is not valid UTF-8 text.") from error
    (ids,) = tokenizer.encode_batch([prompt])  # without the GIL, as encode is not: 1 MB takes 0.4 s
    return ids or [tokenizer.end_of_text]
