"""``onym generate``: text from a trained GPT, as it comes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onym.cli.arguments import GenerateArguments
from onym.cli.report import as_step
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError, OnymError, storage_error
from onym.generation.engine import Engine, Request
from onym.generation.opening import FoundModel, find_model
from onym.generation.scoring import Score, score_texts
from onym.generation.write import Token, prompt_ids, write
from onym.gpt.causal_lm import CausalLM
from onym.gpt.hardware import read_bandwidth
from onym.train.precision import choose_compute
from onym.units import plural

_MOST_SLOTS = 8  # texts side by side: on a CPU more of them take as many times as long
_GIB = 1 << 30
_SCORED_BYTES = 8192  # of held-out text, to tell what int8 costs


def run(given: GenerateArguments) -> int:
    """``onym generate``."""
    prompts = list(_prompts(given))
    _check(given)
    found = find_model(
        given.model,
        step=as_step(given.step),
        part=given.part,
        settings={name: getattr(given, name) for name in ("n_heads", "rope_base", "context_length")},
        tokenizer=given.tokenizer,
        note=_note,
    )
    opened = found.load(choose_compute(given.device, "fp32").device)
    tokenizer = opened.tokenizer
    requests = list(_requests(given, tokenizer, prompts))
    context = opened.model.config.context_length
    if (longest := max(len(request.prompt) for request in requests)) > context:
        _note(f"The prompt has {longest:,} tokens and the model reads {context:,}: it sees the last ones alone.")
    engine = Engine(
        opened.model,
        slots=min(len(requests), _MOST_SLOTS),
        dtype=given.dtype,
        compile=given.compile,
        capacity=longest + max(given.max_new_tokens, 1),
        expected_tokens=given.max_new_tokens * -(-len(requests) // _MOST_SLOTS),
        note=_note,
    )
    tokens = write(engine, tokenizer, requests)
    if engine.dtype == "int8":
        _note(_cost_of_int8(given.model, found, opened.model, engine))
    texts = [prompt for prompt in prompts for _ in range(given.n)]
    if given.json:
        for place, of_text in _whole(tokens, len(requests)):
            print(json.dumps(_as_json(texts[place], requests[place], of_text, tokenizer), ensure_ascii=False), flush=True)
    elif len(requests) == 1:
        _put(prompts[0])
        for token in tokens:
            _put(token.text)
        _put("\n")
    else:
        for place, of_text in _whole(tokens, len(requests)):
            _put(f"{'' if place == 0 else chr(10)}--- {place + 1} of {len(requests)}, seed {requests[place].seed}\n")
            _put(texts[place] + "".join(token.text for token in of_text) + "\n")
    _note(_speed(engine))
    return 0


def _prompts(given: GenerateArguments) -> Iterator[str]:
    if not given.prompts:
        yield given.prompt
        return
    if given.prompt:
        raise ConfigError("--prompt and --prompts exclude each other: give one of them.")
    try:
        text = sys.stdin.buffer.read() if given.prompts == "-" else Path(given.prompts).read_bytes()
        lines = text.decode().splitlines()
    except OSError as error:
        raise storage_error("read", Path(given.prompts), error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts '{given.prompts}' is not UTF-8 text.") from error
    if not any(lines):
        raise ConfigError(f"--prompts '{given.prompts}' has no line of text.")
    yield from (line for line in lines if line)


def _check(given: GenerateArguments) -> None:
    if given.n < 1:
        raise ConfigError(f"--n must be at least 1, not {given.n}.")
    if not given.json and (given.logprobs or given.prompt_logprobs):
        raise ConfigError("--logprobs and --prompt-logprobs need --json, which has a place for them.")


def _requests(given: GenerateArguments, tokenizer: Tokenizer, prompts: Sequence[str]) -> Iterator[Request]:
    first = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    bias, stop_ids = _bias(given.logit_bias), (tokenizer.end_of_text, *given.stop_ids)
    for number, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt)
        for sample in range(given.n):
            yield Request(
                ids,
                given.max_new_tokens,
                given.sampling,
                first + number * given.n + sample,
                given.stop,
                stop_ids,
                given.logprobs,
                given.prompt_logprobs,
                bias,
            )


def _bias(text: str) -> dict[int, float]:
    """``ID=BIAS,…`` as numbers."""
    try:
        pairs = [pair.split("=") for pair in text.split(",") if pair]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError as error:
        raise ConfigError(f"--logit-bias '{text}' is not of the form ID=BIAS,…: 50256=-100, say.") from error


def _whole(tokens: Iterator[Token], count: int) -> Iterator[tuple[int, list[Token]]]:
    """The tokens of each text together, in the order of the requests, as soon as they have come."""
    of_text: list[list[Token]] = [[] for _ in range(count)]
    following, done = 0, set()
    for token in tokens:
        of_text[token.request].append(token)
        if token.finish is not None:
            done.add(token.request)
        while following in done:
            yield following, of_text[following]
            following += 1


def _as_json(prompt: str, request: Request, tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    written = [token for token in tokens if token.id is not None]
    values: dict[str, Any] = {
        "prompt": prompt,
        "text": "".join(token.text for token in tokens),
        "tokens": [token.id for token in written],
        "logprobs": [token.logprob for token in written],
        "finish_reason": tokens[-1].finish,
        "seed": request.seed,
    }
    if request.logprobs:
        values["top_logprobs"] = [
            [{"id": i, "text": tokenizer.decode([i]), "logprob": logprob} for i, logprob in token.best] for token in written
        ]
    if request.prompt_logprobs:
        values["prompt_tokens"], values["prompt_logprobs"] = list(request.prompt), [None, *(tokens[0].prompt_logprobs or ())]
    return values


def _cost_of_int8(name: str, found: FoundModel, model: CausalLM, engine: Engine) -> str:
    """The loss on held-out text with rounded weights, beside that with the model's own."""
    from rich.console import Console

    from onym.tools.evaluation import Candidate, held_out_text
    from onym.train.display import Display

    try:
        text = held_out_text([Candidate(name, found)], _SCORED_BYTES, Display(Console(stderr=True, quiet=True)))
    except OnymError as error:
        return f"What int8 costs is not known: {error}"
    exact, rounded = (Score.total(score_texts(each, found.tokenizer, text.documents)).loss for each in (model, engine.model))
    return f"int8: loss {rounded:.4f}, fp32 {exact:.4f}, on {text.bytes:,} bytes of {text.description}"


def _speed(engine: Engine) -> str:
    """How fast it was, and how much of what the memory could do."""
    parts = []
    if engine.prefill_seconds:
        speed = engine.prefilled_tokens / engine.prefill_seconds
        parts.append(f"prompt: {plural(engine.prefilled_tokens, 'token')}, {speed:,.0f} tokens/s")
    if engine.decoded_tokens:
        bandwidth = read_bandwidth(engine.device)
        share = engine.bytes_read / engine.decode_seconds / bandwidth
        parts.append(
            f"text: {engine.decoded_tokens / engine.decode_seconds:,.0f} tokens/s, {engine.dtype}, "
            f"{engine.how}, {share:.0%} of the memory's {bandwidth / _GIB:.0f} GiB/s"
        )
    return "; ".join(parts)


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr)
