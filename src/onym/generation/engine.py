"""Texts from a model, token by token, several side by side.

    submit -> a free slot -> prefill, a chunk of the prompt at a time -> one token for every slot in each step -> its end

**A text does not depend on what is written beside it.** The number of slots is fixed, and all of them are computed in each
step, so each product has the same shape whether they are in use or not; attention is of each text's own length, or of all
positions with those behind it masked; prompts are read one at a time, in chunks that begin at multiples of :data:`CHUNK` (on a
GPU, of 512); and each request draws from its own generator. The same
seed and prompt give the same text on the same machine, for the same number of slots, dtype and way of compiling. What a slot
holds of an earlier text is used again where a prompt begins alike, in whole chunks, which are equal to the bit.

While a text fits the context, each new token costs one forward pass of one token, and the logits are those of the whole
sequence (within float tolerance). Past the context the window slides: keys and values hold their positions, so what is kept
must be read again at its new ones. Sliding by one token each time is what the book's loop does, and costs a whole
context a token; sliding by a quarter of the context costs three tokens a token, and the model still sees at least three
quarters of what it could.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from onym.compile.in_place import without_compilation
from onym.errors import CheckpointError, ConfigError
from onym.generation.cache import Slots
from onym.generation.captured import CapturedStep, rounded_capacity
from onym.generation.sampling import Sampling, choose, penalised
from onym.generation.steps import StepFunction, arrange, run_eagerly
from onym.generation.text import check_stops
from onym.generation.ways import Compile, Dtype
from onym.generation.weights import bytes_a_token, resolve
from onym.gpt.attention import KVCache
from onym.gpt.causal_lm import CausalLM
from onym.gpt.hardware import computes_in_bf16
from onym.state.collectives import broadcast_from_rank0
from onym.state.dtensor import any_sharded, computes_on, reshard, without_gradients

CHUNK = 128
"""Tokens of a prompt that are read at once."""
_CHUNK_ON_GPUS = 512  # which 128 do not keep busy
MOST_LOGPROBS = 20

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A text to be written."""

    prompt: Sequence[int]
    """Token ids, at least one. Of more than the context, the last ones are read."""
    max_new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    """For the same text again; None for another one each time."""
    stop: Sequence[str] = ()
    """Ends before the first of these strings, where :func:`onym.generation.write.write` makes text of the tokens."""
    stop_ids: Collection[int] = ()
    """Ends before one of these tokens."""
    logprobs: int = 0
    """How many of the likeliest tokens to report with each one."""
    prompt_logprobs: bool = False
    """Whether to report the log-probability of each token of the prompt."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""


@dataclass(frozen=True)
class Event:
    """A token of a text, or its end."""

    request: int
    """The number that :meth:`Engine.submit` gave."""
    token: int | None
    """None where the text ends without one more."""
    logprob: float = 0.0
    """In nats, of the model's own logits: before temperature, penalties and biases."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities."""
    finish: Finish | None = None
    """With the last event of a request: ``"stop"`` at a stop id, or ``"length"``."""
    prompt_logprobs: tuple[float, ...] | None = None
    """With the first one, if asked for: of the prompt's tokens from the second on."""
    prompt_best: tuple[tuple[tuple[int, float], ...], ...] = ()
    """With these, if ``logprobs`` are asked for too: the likeliest tokens in each place."""
    stop_id: int | None = None
    """With the last one, the stop id that ended the text; ``logprob`` and ``best`` are of its place then."""


@dataclass
class _Slot:
    """One text that is being written, and what the slot's buffers hold."""

    number: int
    held: list[int] = field(default_factory=list)
    """The tokens whose keys and values are in the buffers."""
    in_chunks: int = 0
    """How many of these were read in whole chunks from the first on, and can be used again."""
    request: Request | None = None
    id: int = -1
    unread: list[int] = field(default_factory=list)
    """Tokens to be read before the next one can be chosen."""
    text: list[int] = field(default_factory=list)
    """Prompt and what was written."""
    written: Counter[int] = field(default_factory=Counter)
    draws: random.Random = field(default_factory=random.Random)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_best: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        """Whether one token is to be read, and that alone."""
        return self.request is not None and len(self.unread) == 1 and bool(self.held)


class Engine:
    """Writes texts.

    Args:
        model: in evaluation mode. Its weights are copied in another dtype or order where that is faster, so later changes of
            it are not seen.
        slots: texts that are written side by side.
        dtype: of the weights; ``"auto"``: bf16 where the device multiplies it in hardware, else fp32; ``"int8"`` rounds them.
            None: the model as it is, nothing copied, for a model that trains or is sharded.
        compile: ``"auto"``: the step is compiled where that was measured to be faster and is there already, or pays within
            ``expected_tokens``. On a GPU it is captured as a CUDA graph in any case, but for ``"off"``.
        capacity: tokens of a text that the buffers hold, the context by default.
        slide: tokens dropped from the front when the context is full, a quarter of it by default; 1 gives exactly the result of
            cropping to the last ``context_length`` tokens at each step.
        expected_tokens: steps that are to come, as far as is known.
        note: called with a sentence that says why the step is not compiled where it was to be.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        slots: int = 1,
        dtype: Dtype | None = "auto",
        compile: Compile = "auto",  # as in every command
        capacity: int | None = None,
        slide: int | None = None,
        expected_tokens: int = 0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, not {slots}.")
        self.vocab_size, context = model.config.vocab_size, model.config.context_length
        self.device, self._sharded = computes_on(model.tok_emb.weight), any_sharded([model])
        self._source = model if self._sharded else None  # else it may be freed, where its weights are copied
        self.dtype = None if dtype is None else resolve(dtype, self.device)
        narrow = self.dtype in ("bf16", "int8") and computes_in_bf16(self.device)
        buffers = torch.bfloat16 if narrow else model.tok_emb.weight.dtype
        buffers = torch.float32 if self.device.type == "cpu" else buffers
        if capacity is not None and self.device.type == "cuda":
            capacity = rounded_capacity(capacity)
        fitting = context if capacity is not None else Slots.fitting(model.config, slots, self.device, buffers)
        if fitting < context:
            texts = "a text" if slots == 1 else f"{slots} texts"
            note(f"The GPU's free memory is too small for {texts} of {context:,} tokens: each sees its last {fitting:,}.")
        self.context = min(context, fitting)
        self.slide = max(1, self.context // 4) if slide is None else slide
        if not 1 <= self.slide <= self.context:
            raise ConfigError(f"slide must be from 1 to the context length {self.context}, not {slide}.")
        self._chunk = CHUNK if self.device.type == "cpu" else _CHUNK_ON_GPUS
        self._cache = Slots(model.config, slots, min(self.context, capacity or self.context), self.device, buffers)
        self._slots = [_Slot(number) for number in range(slots)]
        self._waiting: deque[tuple[int, Request]] = deque()
        self._submitted = 0
        self.reset_timings()
        self._model: CausalLM = model
        self._step_function: StepFunction | None = None
        if self.dtype is not None:
            with torch.no_grad(), without_compilation():
                self._model, self._step_function = arrange(model, self._cache, self.dtype, compile, expected_tokens, note)
        self._bytes_of_weights = bytes_a_token(self._model)

    @property
    def model(self) -> CausalLM:
        """With the weights that it computes with."""
        return self._model

    @property
    def slots(self) -> int:
        """Texts that are written side by side."""
        return len(self._slots)

    @property
    def compiled(self) -> bool:
        """Whether steps are compiled."""
        return self._step_function is not None and self._step_function.compiled

    @property
    def captured(self) -> bool:
        """Whether steps are a CUDA graph."""
        return isinstance(self._step_function, CapturedStep)

    @property
    def how(self) -> str:
        """How steps are computed, in words."""
        return ("compiled" if self.compiled else "not compiled") + (", a CUDA graph" if self.captured else "")

    def submit(self, request: Request) -> int:
        """Put a request into the queue; its number.

        Raises:
            ConfigError: the prompt is empty or has ids that the model does not know, or a number is out of range.
        """
        self.check(request)
        self._submitted += 1
        self._waiting.append((self._submitted - 1, request))
        return self._submitted - 1

    def submit_all(self, requests: Iterable[Request]) -> list[int]:
        """All of them, or none where one is refused."""
        requests = list(requests)
        for request in requests:
            self.check(request)
        return [self.submit(request) for request in requests]

    def cancel(self, number: int) -> None:
        """Forget a request, waiting or under way; one that has ended already is no mistake."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        for slot in self._slots:
            if slot.request is not None and slot.id == number:
                self._leave(slot)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or any(slot.request is not None for slot in self._slots)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit requests, and take steps until all of them have ended.

        Where FSDP2 has sharded the model, all processes have to call this, and take all events; tokens are those that the first
        one draws.
        """
        numbers = self.submit_all(requests)
        try:
            while self.busy:
                yield from self.step()
        finally:
            for number in numbers:
                self.cancel(number)
            if self._source is not None:
                reshard(self._source)

    def step(self) -> list[Event]:
        """Read prompts, :data:`CHUNK` tokens or a little more, then write one token of each text that is under way."""
        # Entered anew for each step: a caller may do other things between two of them.
        with without_gradients(self._sharded), without_compilation():
            self._admit()
            events: list[Event] = []
            decoding = [slot for slot in self._slots if slot.decoding]
            began, before = time.perf_counter(), self.prefilled_tokens
            for slot in self._slots:
                if slot.request is not None and not slot.decoding and self.prefilled_tokens - before < self._chunk:
                    logits = self._read_chunk(slot)
                    if logits is not None:
                        events += self._choose([(slot, logits)])
            self.prefill_seconds += time.perf_counter() - began
            if decoding:
                began = time.perf_counter()
                logits = self._decode(decoding)
                events += self._choose([(slot, logits[slot.number]) for slot in decoding])
                self.decode_seconds += time.perf_counter() - began
                self.decoded_tokens += len(decoding)
                self.bytes_read += self._bytes_of_weights + self._cache.bytes_a_position * sum(
                    len(slot.held) for slot in decoding
                )
            return events

    def reset_timings(self) -> None:
        """Set the sums to nothing: seconds, tokens, and the bytes of weights, keys and values that decoding has read."""
        self.prefill_seconds = self.decode_seconds = 0.0
        self.prefilled_tokens = self.decoded_tokens = self.bytes_read = 0

    # -- from here on, what a step is made of

    def _admit(self) -> None:
        for slot in self._slots:
            if slot.request is None and self._waiting:
                number, request = self._waiting.popleft()
                prompt = list(request.prompt)
                slot.request, slot.id, slot.text, slot.written = request, number, prompt, Counter()
                slot.draws = random.Random(request.seed)
                slot.prompt_logprobs, slot.prompt_best = [], []
                self._begin(slot, prompt[-self.context :], reuse=not request.prompt_logprobs)

    def _begin(self, slot: _Slot, tokens: list[int], *, reuse: bool) -> None:
        """Let a slot read tokens from position 0; what any slot holds of them in whole chunks is taken from there."""
        best, source = 0, slot
        for other in self._slots if reuse else []:
            # At least one token is left to be read, for its logits.
            most = min(other.in_chunks, len(tokens) - 1)
            common = next((i for i in range(most) if tokens[i] != other.held[i]), most) // self._chunk * self._chunk
            if common > best or (common == best and other is slot):
                best, source = common, other
        if best and source is not slot:
            self._cache.copy(source.number, slot.number, best)
        slot.held, slot.in_chunks, slot.unread = tokens[:best], best, tokens[best:]

    def _read_chunk(self, slot: _Slot) -> Tensor | None:
        """Read the next chunk of a prompt: the logits [vocab] that follow it, if it was the last one."""
        request = slot.request
        assert request is not None
        chunk = slot.unread[: self._chunk]
        cache = self._cache.of_slot(slot.number, len(slot.held))
        scored = request.prompt_logprobs and not slot.written
        logits = self._logits(chunk, cache, every=scored)
        if scored:
            start = len(slot.held)
            following = request.prompt[-self.context :][start + 1 : start + 1 + len(chunk)]
            each = torch.tensor(following, dtype=torch.long, device=self.device)[:, None]
            of_prompt = logits[: len(following)].log_softmax(dim=-1)
            slot.prompt_logprobs += of_prompt.gather(1, each)[:, 0].tolist()
            if request.logprobs:
                slot.prompt_best += _likeliest(of_prompt, request.logprobs)
        if len(chunk) == self._chunk and slot.in_chunks == len(slot.held):
            slot.in_chunks += self._chunk
        slot.held += chunk
        slot.unread = slot.unread[self._chunk :]
        self.prefilled_tokens += len(chunk)
        return None if slot.unread else logits[-1]

    def _decode(self, decoding: list[_Slot]) -> Tensor:
        """Read one token of each of these slots: the logits [slots, vocab] that follow."""
        lengths = [len(slot.held) + 1 if slot in decoding else 0 for slot in self._slots]
        tokens = [slot.unread[0] if length else 0 for slot, length in zip(self._slots, lengths, strict=True)]
        longest = max(lengths)
        positions = []
        for slot in self._slots:
            # A compiled or captured step writes to every slot: to one that is not decoding, behind what it holds.
            if slot.request is None and len(slot.held) >= longest:
                slot.held, slot.in_chunks = (
                    slot.held[: longest - 1],
                    min(slot.in_chunks, (longest - 1) // self._chunk * self._chunk),
                )
            positions.append(len(slot.held))
        longest = max(positions) + 1
        logits = self._step(tokens, positions, lengths, longest)
        for slot in decoding:
            slot.held.append(slot.unread.pop())
        return logits

    def _step(self, tokens: list[int], positions: list[int], lengths: list[int], longest: int) -> Tensor:
        token, position = torch.tensor(tokens), torch.tensor(positions)
        if self._step_function is not None:
            return self._step_function(token, position, longest)
        token, position = (each.to(self.device, non_blocking=True) for each in (token, position))
        return run_eagerly(self._model, self._cache, token, position, lengths).float()

    def _logits(self, chunk: list[int], cache: KVCache, *, every: bool) -> Tensor:
        """[time, vocab] fp32 that follow each token of a chunk, or of the last one alone [1, vocab]."""
        tokens = torch.tensor([chunk], device=self.device)
        if self.dtype is None:  # as it is called in training: FSDP2 gathers weights where a model is called, nowhere else
            logits = self._model(tokens, cache=cache)
            return logits[0].float() if every else logits[0, -1:].float()  # type: ignore[no-any-return]
        hidden = self._model.hidden_states(tokens, cache=cache)
        return self._model.out_head(hidden if every else hidden[:, -1:])[0].float()  # type: ignore[no-any-return]

    def _choose(self, ready: Sequence[tuple[_Slot, Tensor]]) -> list[Event]:
        """The next token of each of these slots by its logits [vocab] fp32. The device is waited for once."""

        def draw() -> list[list[float]]:
            drawn = []
            for slot, logits in ready:
                request = slot.request
                assert request is not None
                changed = penalised(logits, request.sampling, request.prompt, slot.written, request.logit_bias)
                token = choose(changed, request.sampling, slot.draws.random())
                logit = logits.gather(0, token[None])[0]
                normaliser = logits.logsumexp(dim=-1)
                row = [token, logit, normaliser, normaliser if changed is logits else changed.max()]
                drawn.append(torch.stack([each.double() for each in row]))
            return torch.stack(drawn).tolist()

        chosen = broadcast_from_rank0(draw, self._sharded)
        return [self._take(*each, *values) for each, values in zip(ready, chosen, strict=True)]

    def _take(self, slot: _Slot, logits: Tensor, chosen: float, logit: float, normaliser: float, largest: float) -> Event:
        """Write a token that was drawn.

        Args:
            slot: it is written to.
            logits: [vocab] fp32, as the model gave them.
            chosen, logit: the token, and its logit.
            normaliser: the logarithm of the sum of the exponentials of all logits.
            largest: of the logits after penalties and biases.
        """
        request = slot.request
        assert request is not None
        if not math.isfinite(normaliser):
            raise CheckpointError("The model's output is non-finite, and so are its weights: take an earlier step.")
        if largest == -math.inf:
            raise ConfigError("--logit-bias leaves no token to choose: allow some.")
        token, logprob = int(chosen), logit - normaliser
        best = _likeliest(logits[None], request.logprobs, normaliser)[0] if request.logprobs else ()
        first = request.prompt_logprobs and not slot.written
        scored = tuple(slot.prompt_logprobs) if first else None
        best_of_prompt = tuple(slot.prompt_best) if first else ()
        if token in request.stop_ids:
            number = slot.id
            self._leave(slot)
            return Event(number, None, logprob, best, "stop", scored, best_of_prompt, stop_id=token)
        slot.text.append(token)
        slot.written[token] += 1
        finish: Finish | None = "length" if slot.written.total() == request.max_new_tokens else None
        event = Event(slot.id, token, logprob, best, finish, scored, best_of_prompt)
        if finish is not None:
            self._leave(slot)
        elif len(slot.held) == self.context:
            self._begin(slot, slot.text[-(self.context - self.slide + 1) :], reuse=False)
        else:
            slot.unread = [token]
        return event

    def _leave(self, slot: _Slot) -> None:
        slot.request, slot.unread = None, []

    def check(self, request: Request) -> None:
        """Raise a ConfigError for a request that :meth:`submit` would refuse."""
        if request.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, not {request.max_new_tokens}.")
        if request.seed is not None and not 0 <= request.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2^63 - 1, not {request.seed}.")
        if not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise ConfigError(f"--logprobs must be from 0 to {MOST_LOGPROBS}, not {request.logprobs}.")
        if not request.prompt:
            raise ConfigError("The prompt has no tokens: give it some text.")
        for what, tokens in (("The prompt", request.prompt), ("--logit-bias", request.logit_bias)):
            unknown = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if unknown is not None:
                raise ConfigError(
                    f"{what} has token {unknown}, the model knows {self.vocab_size}: "
                    "use the tokenizer that the model was trained with."
                )
        if (bias := next((each for each in request.logit_bias.values() if not each < math.inf), None)) is not None:
            raise ConfigError(f"--logit-bias must be a number or -inf, not {bias}.")
        request.sampling.check()
        check_stops(request.stop)
        needed = min(self.context, len(request.prompt) + request.max_new_tokens)
        if needed > self._cache.capacity:
            raise ConfigError(f"{needed} tokens do not fit the engine's capacity of {self._cache.capacity}: make it larger.")


def _likeliest(logits: Tensor, count: int, normaliser: float = 0.0) -> list[tuple[tuple[int, float], ...]]:
    """Of each row [rows, vocab], the tokens with the largest logits, and these less the normaliser."""
    values, tokens = logits.topk(count)
    rows = zip(tokens.tolist(), values.tolist(), strict=True)
    return [tuple((token, value - normaliser) for token, value in zip(*row, strict=True)) for row in rows]


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    end_of_text: int | None = None,
    slide: int | None = None,
) -> Iterator[int]:
    """Continue a prompt with a model as it is, one token id at a time: nothing is copied, so it may be one that trains.

    Args:
        model: in evaluation mode; runs without compilation. Where FSDP2 has sharded it, all processes have to call this, and
            take all tokens; they are those that the first one draws.
        prompt: token ids, at least one. Of one longer than the context, the last ones are read.
        max_new_tokens: when to stop at the latest.
        sampling: how tokens are chosen.
        seed: for the same text again; None for another one each time.
        end_of_text: stop before this token.
        slide: see :class:`Engine`.

    Raises:
        ConfigError: the prompt is empty or has ids that the model does not know, or a number is out of range.
    """
    stop = () if end_of_text is None else (end_of_text,)
    request = Request(prompt, max_new_tokens, sampling or Sampling(), seed, stop_ids=stop)
    capacity = len(prompt) + max(max_new_tokens, 1)
    engine = Engine(model, dtype=None, capacity=capacity, slide=slide)
    engine.submit(request)
    return (event.token for event in engine.run([]) if event.token is not None)
