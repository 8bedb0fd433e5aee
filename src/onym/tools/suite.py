"""A small suite of tasks that needs no download: cloze and multiple choice from the documentation that Python carries.

Items are made from the documents that are held out of the default corpus alone, so a model that ``onym train`` trained by
default has not seen them. They depend on the version of Python alone; :func:`fingerprint` is equal for equal items. They
compare models with each other, of equal tokenizers or not. They are no published benchmark, and all of one kind of text.

- ``cloze``: the last word of a sentence, given the document up to it. Right where each of its tokens is the likeliest (as in
  LAMBADA, Paperno et al. 2016).
- ``continuation``: which of four sentences follows, given the document up to it; the wrong ones are of other documents.
- ``description``: which of four first sentences of docstrings belongs to a function's name.

Of four choices that one is taken which the context makes likelier by more than the others: the log-likelihood after the context
minus that after a neutral one (Holtzman et al. 2021, "Surface form competition"). That takes away that some sentences are
likelier than others anyway: by log-likelihood a byte, models of a million parameters are right in 30 % of the continuations, by
this in 45 to 50 %.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from blake3 import blake3

from onym.data.corpus import Corpus, python_documentation
from onym.data.survey import survey
from onym.data.tokenizer import Tokenizer
from onym.generation.scoring import Progress, log_likelihoods
from onym.gpt.causal_lm import CausalLM
from onym.train.options import DataOptions

CLOZE, CONTINUATION, DESCRIPTION = "cloze", "continuation", "description"
_CHOICES = 4
_SENTENCE = re.compile(r"[A-Z][^.!?:\n]*(?:\n[^.!?:\n]+)*\.(?=\s|$)")  # no blank line in it
_LAST_WORD = re.compile(r"(?<=[a-z,)'])( [a-z]{3,})\.$")
_FEWEST_WORDS = 5
_NEUTRAL = {CONTINUATION: "This is a sentence.", DESCRIPTION: ""}  # nothing: a docstring begins with its first sentence
_MOST_A_DOCUMENT = 6  # or a few long ones would be half of a task


@dataclass(frozen=True)
class Item:
    """One question: which of the choices follows the context. A cloze has one choice, and every other word is wrong."""

    task: str
    context: str
    choices: tuple[str, ...]
    answer: int = 0
    """The index of the true one."""


@dataclass(frozen=True)
class TaskResult:
    """How often a model was right."""

    accuracy: float
    standard_error: float
    """Of the accuracy, from the number of items: that of a share of independent trials."""
    chance: float
    """The accuracy of guessing; 0 for the cloze."""
    items: int


@cache
def suite_items() -> tuple[Item, ...]:
    """All items, always the same with one version of Python."""
    held_out = set(survey(Corpus(), DataOptions().held_out).held_out_texts())
    names: dict[str, str] = {}  # by text: of equal documents the first
    for document in python_documentation():
        if document.text in held_out:
            names.setdefault(document.text, document.source.rpartition(":")[2])
    return tuple(make_items(names))


def make_items(names: Mapping[str, str]) -> Iterator[Item]:
    """Items from documents, by text, with what each describes."""
    continuations: list[tuple[str, str]] = []
    descriptions: list[tuple[str, str]] = []
    for text, name in names.items():
        sentences = [found for found in _SENTENCE.finditer(text) if len(found.group().split()) >= _FEWEST_WORDS]
        for sentence in sentences:
            if word := _LAST_WORD.search(sentence.group()):
                yield Item(CLOZE, text[: sentence.start() + word.start()], (word.group(1),))
        for follows in sentences[1 : 1 + _MOST_A_DOCUMENT]:
            continuations.append((text[: follows.start()].rstrip(), f" {' '.join(follows.group().split())}"))
        if sentences and sentences[0].start() == 0 and (words := _words(name)):
            descriptions.append((f"{words}\n\n", sentences[0].group()))
    yield from _multiple_choice(CONTINUATION, continuations)
    yield from _multiple_choice(DESCRIPTION, descriptions)


def _words(name: str) -> str:
    """``getFooBar`` and ``get_foo_bar`` as ``get foo bar``; nothing of ``__init__`` and of modules."""
    if not name or name.startswith("__"):
        return ""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower().strip()


def _multiple_choice(task: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Item]:
    """Each pair's second part among those of others, which a hash draws; so is the place of the true one."""
    for number, (context, true) in enumerate(pairs):

        def drawn(text: str, seed: str = context + true) -> bytes:
            return blake3((seed + "\0" + text).encode()).digest()

        others = sorted({other for place, (_, other) in enumerate(pairs) if place != number and other != true}, key=drawn)
        if len(others) >= _CHOICES - 1:
            choices = sorted([true, *others[: _CHOICES - 1]], key=lambda text: drawn("place" + text))
            yield Item(task, context, tuple(choices), choices.index(true))


def fingerprint(items: Sequence[Item]) -> str:
    """Equal for equal items: accuracies with another one are of other questions."""
    return blake3(json.dumps([asdict(item) for item in items]).encode()).hexdigest()[:16]


def measure(
    model: CausalLM,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """How often the model is right, by task.

    A context that does not fit the model's is read from its end.
    """
    asked: dict[tuple[str, str], int] = {}  # context and choice, each once: without its context, a choice is one of many items
    for item in items:
        for context in (item.context,) if item.task == CLOZE else (item.context, _NEUTRAL[item.task]):
            for choice in item.choices:
                asked.setdefault((context, choice), len(asked))
    pairs = _encoded(tokenizer, list(asked))
    # With the whole context as stride: each choice in one window where it fits.
    found = log_likelihoods(model, pairs, stride=model.config.context_length, batch_size=batch_size, progress=progress)
    right: dict[str, list[bool]] = {}
    for item in items:
        likelihoods = [found[asked[item.context, choice]] for choice in item.choices]
        if item.task == CLOZE:
            is_right = likelihoods[0].greedy
        else:
            without = [found[asked[_NEUTRAL[item.task], choice]] for choice in item.choices]
            gains = [one.log_likelihood - other.log_likelihood for one, other in zip(likelihoods, without, strict=True)]
            is_right = all(gains[item.answer] > gain for place, gain in enumerate(gains) if place != item.answer)
        right.setdefault(item.task, []).append(is_right)
    return {task: _result(task, answers) for task, answers in right.items()}


def _encoded(tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """As the whole text is tokenised: with a tokenizer that puts a space before each text, the choice alone would differ."""
    contexts = tokenizer.encode_batch([context for context, _ in asked])
    wholes = tokenizer.encode_batch([context + choice for context, choice in asked])
    pairs = zip(contexts, wholes, strict=True)
    return [([tokenizer.end_of_text, *before], whole[len(before) :]) for before, whole in pairs]


def _result(task: str, right: Sequence[bool]) -> TaskResult:
    share, count = sum(right) / len(right), len(right)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
    return TaskResult(share, error, 0.0 if task == CLOZE else 1 / _CHOICES, count)
