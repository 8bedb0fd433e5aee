"""The built-in suite: the same questions each time, of text that was held out, answered by a model that knows the text."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onym import GPT, save
from onym.cli import evaluate
from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.tokenizer import Tokenizer
from onym.tools.suite import CLOZE, CONTINUATION, DESCRIPTION, Item, fingerprint, make_items, measure, suite_items
from tests.conftest import TINY, Run

DOCUMENTS = {
    "Return the name of the river. It is never longer than the stone.": "river_name",
    "Open the garden for the teacher. The window stays closed in winter.": "openGarden",
    "Write a letter to the engine. Every letter has the shadow of a lamp.": "write_letter",
    "Look into the mirror of the island. There is a harvest behind the mirror.": "look",
    "Count all things that are there. Things that are gone count as one thing.": "__len__",
}


def test_items_are_made_of_held_out_documents_alone() -> None:
    held_out = "\0".join(survey(Corpus(), 0.05).held_out_texts())
    joined = " ".join(held_out.split())
    items = suite_items()
    counts = Counter(item.task for item in items)
    assert all(counts[task] > 80 for task in (CLOZE, CONTINUATION, DESCRIPTION)), counts
    for item in items:
        assert all(" ".join(choice.split()) in joined for choice in item.choices)
        if item.task != DESCRIPTION:
            assert item.context in held_out
            assert f"{item.context}{item.choices[item.answer]}" in held_out or item.task == CONTINUATION
        assert len(set(item.choices)) == (1 if item.task == CLOZE else 4)
    places = Counter(item.answer for item in items if item.task != CLOZE)
    assert all(count > 50 for count in places.values()), "the true one may stand anywhere"


def test_items_are_the_same_in_every_process(in_fresh_process: Callable[[str], str]) -> None:
    """Sets of texts have another order in each."""
    program = f"from onym.tools.suite import *; print(fingerprint(list(make_items({DOCUMENTS!r}))))"
    assert in_fresh_process(program).strip() == fingerprint(list(make_items(DOCUMENTS)))
    assert fingerprint(list(make_items(dict(list(DOCUMENTS.items())[:4])))) != fingerprint(list(make_items(DOCUMENTS)))


def test_what_the_items_ask() -> None:
    items = list(make_items(DOCUMENTS))
    assert Counter(item.task for item in items) == {CLOZE: 10, CONTINUATION: 5, DESCRIPTION: 4}, "nothing is called __len__"
    assert items[1].context.endswith(" It is never longer than the")
    assert items[1].choices == (" stone",)
    asked = {item.context: item.choices[item.answer] for item in items if item.task == DESCRIPTION}
    assert asked["open garden\n\n"] == "Open the garden for the teacher."
    follows = next(item for item in items if item.task == CONTINUATION)
    assert follows.context == "Return the name of the river."
    assert follows.choices[follows.answer] == " It is never longer than the stone."


def test_a_model_that_knows_the_text_is_right() -> None:
    tokenizer = Tokenizer.train(list(DOCUMENTS) * 9, 350)
    documents = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in DOCUMENTS]
    time = max(map(len, documents)) - 1
    inputs, targets = torch.zeros(len(documents), time, dtype=torch.int64), torch.full((len(documents), time), -100)
    for row, tokens in enumerate(documents):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    model = GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, context_length=64))
    items = list(make_items(DOCUMENTS))
    before = measure(model.eval(), tokenizer, items)
    assert before[CLOZE].accuracy < 0.5
    assert (before[CLOZE].chance, before[CONTINUATION].chance, before[CLOZE].items) == (0, 0.25, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()
    after = measure(model, tokenizer, items)
    assert (after[CLOZE].accuracy, after[CLOZE].standard_error) == (1, 0)
    assert {task: result.accuracy for task, result in after.items() if task != CLOZE} == by_hand(model, tokenizer, items)
    share = before[CONTINUATION].accuracy
    assert before[CONTINUATION].standard_error == math.sqrt(share * (1 - share) / 4)
    with torch.no_grad():
        model.tok_emb.weight.fill_(math.nan)
    assert [each.accuracy for each in measure(model, tokenizer, items).values()] == [0, 0, 0], "a NaN is never right"


def by_hand(model: GPT, tokenizer: Tokenizer, items: list[Item]) -> dict[str, float]:
    """The accuracy of multiple choice, each choice run alone."""

    def likelihood(context: str, choice: str) -> float:
        before, after = [tokenizer.end_of_text, *tokenizer.encode(context)], tokenizer.encode(choice)
        with torch.no_grad():
            values = model(torch.tensor([[*before, *after]]))[0].log_softmax(dim=-1)
        return sum(float(values[len(before) - 1 + place, token]) for place, token in enumerate(after))

    right: dict[str, list[bool]] = {}
    neutral = {CONTINUATION: "This is a sentence.", DESCRIPTION: ""}
    for item in items:
        if item.task != CLOZE:
            gains = [likelihood(item.context, choice) - likelihood(neutral[item.task], choice) for choice in item.choices]
            right.setdefault(item.task, []).append(gains.index(max(gains)) == item.answer)
    return {task: sum(each) / len(each) for task, each in right.items()}


@pytest.fixture
def part_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it takes a minute where other tests run too."""
    monkeypatch.setattr(evaluate, "suite_items", lambda: suite_items()[::20])


def test_the_command_answers_it_on_pythons_documentation(onym: Run, tmp_path: Path, part_of_the_suite: None) -> None:
    tokenizer = Tokenizer.train(list(DOCUMENTS) * 9, 350)
    save(GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)), tmp_path / "m.safetensors")
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    done = onym("evaluate", "m.safetensors", "--tokenizer", "t.json", "--limit", "2KB", "--suite")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("The held-out part of Python's own documentation: ")
    assert lines[1].split()[-3:] == ["cloze", "continuation", "description"]
    assert lines[3].split() == ["a", "guess", "0.0", "%", "25.0", "%", "25.0", "%"]
    assert lines[4].startswith("Suite: ")
