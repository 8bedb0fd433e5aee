"""How likely a model finds a text: log-likelihoods of token sequences of any length.

A sequence that is longer than the context is read in windows. The first one predicts as many tokens as fit; each further one
begins ``stride`` tokens later and predicts the tokens that are new in it, so that each token is predicted exactly once:

    context 4, stride 2      window 1  reads  E 0 1 2          predicts  0 1 2 3
    E: end-of-text           window 2  reads      1 2 3 4      predicts          4 5
                             window 3  reads          3 4 5 6  predicts              6 7

So each prediction but those of the first window sees at least ``context - stride + 1`` tokens before it. A small stride costs
more passes, and gives a better (lower) loss. The last window is moved back so that it is as long as the others.

Windows of all sequences are batched by their lengths, and padded on the right, which a causal model does not see. Logits exist
for a chunk of the predicted tokens at a time: for a whole batch they would take 1.6 GB at 8 x 1,024 tokens of 50,257.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from onym.compile.in_place import without_compilation
from onym.data.survey import PIECE
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.generation.opening import model_and_tokenizer
from onym.gpt.causal_lm import CausalLM
from onym.gpt.head_loss import chunk_rows

Progress = Callable[[int, int], None]
"""Called with how many tokens are scored, and how many there are."""


class Likelihood(NamedTuple):
    """What a model says of a sequence of tokens."""

    log_likelihood: float
    """Sum of the tokens' log-probabilities, in nats."""
    greedy: bool
    """Whether each token is the likeliest one at its place."""
    tokens: int


@dataclass(frozen=True)
class Score:
    """How likely a text is to a model.

    >>> Score(log_likelihood=-100 * math.log(2), tokens=25, bytes=100).bits_per_byte
    1.0
    """

    log_likelihood: float
    """Sum of the log-probabilities of all tokens, in nats."""
    tokens: int
    bytes: int
    """Of the text in UTF-8."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats a token, which depends on the tokenizer."""
        return -self.log_likelihood / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf if self.loss == self.loss else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text: comparable between tokenizers."""
        return -self.log_likelihood / math.log(2) / self.bytes

    @classmethod
    def total(cls, scores: Iterable[Score]) -> Score:
        """That of all texts together."""
        scores = list(scores)
        return cls(
            math.fsum(each.log_likelihood for each in scores),
            sum(each.tokens for each in scores),
            sum(each.bytes for each in scores),
        )


def score(
    model_or_path: CausalLM | str | Path,
    texts: Sequence[str],
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
) -> list[Score]:
    """The log-likelihood of each text under a GPT, of any length, as a document of its own.

    The first token is predicted from end-of-text. Weights and computation are as the model has them.

    Args:
        model_or_path: a model, which stays where it is; or anything that :func:`onym.load_model` opens.
        texts: none of them empty.
        tokenizer: of the model; needed where a model is given, or where its folder holds none. A path, a hub name or an object.
        stride: new tokens in each further window of a text that is longer than the context; half of the context by default.
        batch_size: windows that are computed at once.
        device: where a model that is opened is put.

    Raises:
        ConfigError: a text is empty, or a number is out of its range.
        CheckpointError: there is no such model.
        TokenizerError: there is no tokenizer, or it does not fit the model.

    >>> import onym
    >>> from onym.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.train(["one two three"], 260)
    >>> model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=260))
    >>> [text] = onym.score(model, ["one two"], tokenizer=tokenizer)
    >>> text.bytes, abs(text.loss - math.log(260)) < 1  # before any training
    (7, True)
    """
    if isinstance(texts, str):
        raise ConfigError("texts is a list of texts, not one text: put it into brackets.")
    model, known = model_and_tokenizer(model_or_path, tokenizer, device)
    return score_texts(model, known, texts, stride=stride, batch_size=batch_size)


def score_texts(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Score]:
    """:func:`score` of a model that is open already, with its tokenizer."""
    try:
        sizes = [len(text.encode()) for text in texts]
    except UnicodeEncodeError as error:
        raise ConfigError("A text is not valid UTF-8.") from error
    documents = [_encoded(tokenizer, text) for text in texts]
    if empty := next((number for number, tokens in enumerate(documents, start=1) if not tokens), None):
        raise ConfigError(f"Text {empty:,} of {len(texts):,} is empty: there is nothing to score.")
    pairs = [([tokenizer.end_of_text], tokens) for tokens in documents]
    found = log_likelihoods(model, pairs, stride=stride, batch_size=batch_size, progress=progress)
    return [Score(each.log_likelihood, each.tokens, size) for each, size in zip(found, sizes, strict=True)]


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """A long text in pieces that end with lines, as for training: encoded at once, it would take twenty times its size."""
    pieces, start = list[str](), 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:cut])
        start = cut
    return [token for tokens in tokenizer.encode_batch([*pieces, text[start:]]) for token in tokens]


class Window(NamedTuple):
    """A part of a sequence that the model reads at once: ``[start, end - 1)``, to predict ``[first, end)``."""

    start: int
    first: int
    end: int


def windows(length: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """The windows that predict each token of a sequence from ``first`` on exactly once.

    >>> list(windows(9, 1, context=4, stride=2))
    [Window(start=0, first=1, end=5), Window(start=2, first=5, end=7), Window(start=4, first=7, end=9)]
    """
    end = min(length, max(context + 1, first + stride))
    while first < length:
        yield Window(max(0, end - 1 - context), first, end)
        first, end = end, min(length, end + stride)


def log_likelihoods(
    model: CausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """The log-likelihood of continuations, each given its context; of a document's tokens, given end-of-text alone.

    Args:
        model: runs without compilation, in evaluation mode, which is left as it was.
        pairs: contexts, of at least one token, and continuations, token ids. Of a context that does not fit, the last ones
            are read.
        stride: see above; half of the context by default. With the whole context, a continuation that fits is one window.
        batch_size: windows that are computed at once.
        progress: called after each batch.

    Raises:
        ConfigError: a number is out of its range, a context is empty, or the model does not know a token.
    """
    context, rows = model.config.context_length, model.config.vocab_size
    stride = stride_of(context, stride)
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {batch_size}.")
    sequences: list[Tensor] = []
    found: list[tuple[int, Window]] = []  # the number of the sequence, and a window of it
    for number, (before, tokens) in enumerate(pairs):
        if not before:
            raise ConfigError("A context has no tokens: begin with the tokenizer's end-of-text.")
        sequence = torch.tensor([*before, *tokens], dtype=torch.int64)
        if int(sequence.min()) < 0 or int(sequence.max()) >= rows:
            raise ConfigError(
                f"The text has token {int(sequence.max())}, the model knows {rows}: use the tokenizer that it was trained with."
            )
        sequences.append(sequence)
        found += [(number, window) for window in windows(len(sequence), len(before), context, stride)]
    found.sort(key=lambda each: each[1].start - each[1].end)  # the longest first: each batch has little padding
    sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
    done, total = 0, sum(len(tokens) for _, tokens in pairs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_compilation():
            for start in range(0, len(found), batch_size):
                batch = found[start : start + batch_size]
                values, likeliest = _predicted(model, [(sequences[number], window) for number, window in batch])
                position = 0
                for number, (_, first, end) in batch:
                    part = slice(position, position + end - first)
                    sums[number] += float(values[part].sum(dtype=torch.float64))
                    greedy[number] &= bool(likeliest[part].all())
                    position = part.stop
                done += position
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(was_training)
    return [Likelihood(*each, len(tokens)) for each, (_, tokens) in zip(zip(sums, greedy, strict=True), pairs, strict=True)]


def stride_of(context: int, stride: int | None) -> int:
    """Half of the context where no stride is given.

    Raises:
        ConfigError: it would leave tokens out, or never end.
    """
    if stride is None:
        return max(1, context // 2)
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride must be from 1 to the model's context of {context}, not {stride}.")
    return stride


def _predicted(model: CausalLM, batch: Sequence[tuple[Tensor, Window]]) -> tuple[Tensor, Tensor]:
    """Of each predicted token, one window after another: its log-probability (fp32), and whether it is the likeliest."""
    device = model.tok_emb.weight.device
    inputs = torch.zeros(len(batch), max(end - 1 - start for _, (start, _, end) in batch), dtype=torch.int64)
    is_predicted = torch.zeros(inputs.shape, dtype=torch.bool)
    for row, (sequence, (start, first, end)) in enumerate(batch):
        inputs[row, : end - 1 - start] = sequence[start : end - 1]
        is_predicted[row, first - 1 - start : end - 1 - start] = True
    targets = torch.cat([sequence[first:end] for sequence, (_, first, end) in batch]).to(device)
    x = model.hidden_states(inputs.to(device))[is_predicted.to(device)]  # [predicted, emb]
    rows = chunk_rows(len(x), model.config.vocab_size, torch.float32, device)
    values, likeliest = [], []
    for chunk, goals in zip(x.split(rows), targets.split(rows), strict=True):
        logits = model.out_head(chunk).float()  # [chunk, vocab]
        chosen = logits.gather(1, goals[:, None]).squeeze(1)
        values.append((chosen - logits.logsumexp(dim=1)).cpu())
        likeliest.append((logits.argmax(dim=1) == goals).cpu())
    return torch.cat(values), torch.cat(likeliest)
